"""Optimizers: torch's AdamW, Muon, and which parameter goes to which.

Muon replaces the update of a weight matrix by the nearest orthogonal matrix (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/), found by a Newton–Schulz iteration. This one works on all
matrices of one shape at once, and scales the update so that its entries are as large as AdamW's
(arXiv:2502.16982), so that one learning rate serves both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from charlm.backends.base import DeviceBackend
from charlm.errors import InputError
from charlm.training.config import TrainerConfig

__all__ = ["Muon", "OptimizerFactory", "build_optimizers", "hidden_matrices", "orthogonalize"]

OptimizerFactory = Callable[[Iterator[tuple[str, nn.Parameter]]], Optimizer]
"""What `Trainer(optimizer=...)` takes: named parameters to an optimizer. Its learning rate is set at each
step: the schedule's, times the group's own "lr_scale" if it has one."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def build_optimizers(model: nn.Module, config: TrainerConfig, backend: DeviceBackend) -> list[Optimizer]:
    """Return the optimizers that a config names, each parameter in exactly one of them.

    Args:
        model: parameters that need no gradient are left out.
        config: optimizer, learning_rate, weight_decay, betas, momentum and precision are used.
        backend: knows which implementation of AdamW is fastest, and what "auto" precision is.
    """
    dtype = torch.bfloat16 if backend.precision(config.precision) == "bf16" else torch.float32
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon":
        matrices = {name: parts for name, parts in hidden_matrices(model).items() if name in named}
        by_parts: dict[int, list[nn.Parameter]] = defaultdict(list)
        for name, parts in matrices.items():
            by_parts[parts].append(named.pop(name))
        if matrices:
            optimizers.append(
                Muon(
                    [{"params": group, "parts": parts} for parts, group in by_parts.items()],
                    lr=config.learning_rate,
                    momentum=config.momentum,
                    weight_decay=config.weight_decay,
                    dtype=dtype,
                )
            )
    rest = list(named.values())
    decay = config.weight_decay if config.optimizer == "adamw" else 0.0
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        options = backend.optimizer_options("AdamW")
        optimizers.append(AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8, **options))  # type: ignore[arg-type]
    return optimizers


def hidden_matrices(model: nn.Module) -> dict[str, int]:
    """Return the names of the matrices that Muon is for, and of how many matrices each is a stack.

    These are the weights of linear layers, but not the output's: the layer called "lm_head" or "head", or
    whose weight is also an embedding's. A layer called "c_attn" makes queries, keys and values at once: its
    weight is three matrices, and each is to be orthogonal by itself.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if (
            isinstance(module, nn.Linear)
            and name not in {"lm_head", "head"}
            and id(module.weight) not in embeddings
        ):
            is_triple = name == "c_attn" and module.out_features % 3 == 0
            found[f"{path}.weight" if path else "weight"] = 3 if is_triple else 1
    return found


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return matrices with (about) the same singular vectors and all singular values near 1.

    Args:
        matrices: (N, rows, columns), any scale.
        steps: Newton–Schulz iterations; five bring singular values into about [0.7, 1.2].

    Returns:
        (N, rows, columns), in the type of `matrices`. bfloat16 is enough.
    """
    a, b, c = _COEFFICIENTS
    x: Tensor
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices  # the Gram matrix below is then the smaller one
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (N, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(Optimizer):
    """Momentum, orthogonalised: for the weight matrices between embedding and output layer.

    Each matrix W (rows, columns) with gradient G moves as Nesterov momentum does, but along the nearest
    orthogonal matrix, scaled by `0.2 sqrt(max(rows, columns))`; weight decay is decoupled.

    Args:
        params: matrices, or groups of them. A group's "parts" says of how many equal matrices, one above
            the other, each of its parameters is a stack.
        lr: learning rate, the same as AdamW's.
        momentum: share of the old momentum that is kept.
        weight_decay: share of W, times lr, taken off at each step.
        dtype: what the Newton–Schulz products run in.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2 or parameter.size(0) % group["parts"]:
                    raise InputError(
                        f"Muon moves matrices in {group['parts']} equal parts, got a parameter of shape "
                        f"{tuple(parameter.shape)}"
                    )

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for alike in by_shape.values():
                self._move(alike, group["lr"], group["momentum"], group["weight_decay"], group["parts"])
        return loss

    def _move(self, alike: list[Tensor], lr: float, momentum: float, weight_decay: float, parts: int) -> None:
        """Move parameters of one shape, each a stack of `parts` matrices."""
        gradients = [p.grad for p in alike if p.grad is not None]
        for parameter in alike:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in alike]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov's look ahead
        rows, columns = alike[0].size(0) // parts, alike[0].size(1)
        stacked = torch.stack(list(ahead)).view(-1, rows, columns)  # (N parts, rows, columns)
        updates = (
            orthogonalize(stacked.to(self.dtype)).reshape(len(alike), *alike[0].shape).to(alike[0].dtype)
        )
        torch._foreach_mul_(alike, 1 - lr * weight_decay)
        torch._foreach_add_(alike, list(updates.unbind()), alpha=-lr * 0.2 * math.sqrt(max(rows, columns)))
