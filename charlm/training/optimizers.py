"""The optimizers AdamW and Muon, and the assignment of parameters to them.

AdamW calls torch's fused kernel, without the imports of torch's class.

Muon replaces the update of a weight matrix by the nearest orthogonal matrix (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/), found by a Newton–Schulz iteration. This one processes all
matrices of one shape at once. It scales the update so that its entries are as large as AdamW's
(arXiv:2502.16982), and one learning rate serves both.

Both follow the protocol of torch's fused optimizers: if the tensor `found_inf` is not 0, a step changes
nothing, without waiting for the device.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from charlm.backends.base import DeviceBackend
from charlm.errors import InputError
from charlm.training.config import TrainerConfig

__all__ = [
    "AdamW",
    "Muon",
    "OptimizerFactory",
    "build_optimizers",
    "hidden_matrices",
    "made_by",
    "orthogonalize",
]

OptimizerFactory = Callable[[Iterator[tuple[str, nn.Parameter]]], Optimizer]
"""Argument `optimizer` of `Trainer`: makes an optimizer from named parameters. Each step sets the learning
rate of a group to that of the schedule, times the group's "lr_scale" if it has one. If no group has one and
their rates differ, each rate counts as a share of the largest."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def build_optimizers(model: nn.Module, config: TrainerConfig, backend: DeviceBackend) -> list[Optimizer]:
    """Return the optimizers that a config names, each parameter in exactly one of them.

    Args:
        model: parameters that need no gradient are left out.
        config: optimizer, learning_rate, weight_decay, betas, momentum and precision are used.
        backend: chooses the fastest implementation of AdamW, and the "auto" precision.

    Raises:
        BackendError: the device cannot do the config's precision.

    Example:
        >>> from charlm import GPT, get_backend
        >>> model = GPT.from_config("cpu-10s", vocab_size=65)
        >>> optimizers = build_optimizers(model, TrainerConfig(optimizer="muon"), get_backend("cpu"))
        >>> [type(optimizer).__name__ for optimizer in optimizers]
        ['Muon', 'AdamW']
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
        if options == {"fused": True}:
            optimizers.append(AdamW(groups, lr=config.learning_rate, betas=config.betas))
        else:
            optimizers.append(
                torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, **options)  # type: ignore[arg-type]
            )
    return optimizers


def made_by(factory: OptimizerFactory, model: nn.Module) -> tuple[Optimizer, bool]:
    """Return the optimizer of a caller's factory, and whether its groups' learning rates became shares.

    If no group has an "lr_scale" and their learning rates differ, each group gets one: its rate as a share of
    the largest. So the schedule changes all rates together.

    Raises:
        InputError: it is no optimizer, it has parameters of another model or none that is trained, or it
            cannot be used by a `Trainer`.

    Example:
        >>> def factory(named):
        ...     return torch.optim.SGD([{"params": [p], "lr": 0.1 / p.dim()} for _, p in named])
        >>> made, _ = made_by(factory, nn.Linear(2, 2))
        >>> [group["lr_scale"] for group in made.param_groups]
        [0.5, 1.0]
    """
    if not callable(factory):
        raise InputError(f"optimizer must be a factory: named parameters to an optimizer, got {factory!r}")
    made = factory(model.named_parameters())
    if not isinstance(made, Optimizer):
        raise InputError(f"optimizer must make a torch.optim.Optimizer, got {type(made).__name__}")
    own = {id(parameter) for parameter in model.parameters()}
    moved = [parameter for group in made.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in own for parameter in moved)
    if foreign:
        raise InputError(
            f"optimizer must move the parameters that it is given, but of its {len(moved)} parameters "
            f"{foreign} are not the model's: make it of the argument, lambda named: SGD(p for _, p in named)"
        )
    if not any(parameter.requires_grad for parameter in moved):
        raise InputError("optimizer must move a parameter that requires a gradient, got none")
    name = type(made).__name__
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"optimizer must step without a closure, and {name} needs one: it asks for several losses in one "
            "step. Use another optimizer"
        )
    if isinstance(made, torch.optim.SparseAdam):
        raise InputError(
            f"optimizer must take dense gradients, and {name} does not. Use AdamW: sparse ones are made dense"
        )
    rates = [float(group["lr"]) for group in made.param_groups if "lr" in group]
    if len(set(rates)) < 2 or any("lr_scale" in group for group in made.param_groups):
        return made, False
    for group in made.param_groups:
        group["lr_scale"] = float(group.get("lr", max(rates))) / max(rates)
    return made, True


def hidden_matrices(model: nn.Module) -> dict[str, int]:
    """Return the names of the matrices for Muon, each with the number of matrices that it stacks.

    These are the weights of all linear layers except the output layer: a layer with the name "lm_head" or
    "head", or with the weight of an embedding. The layer "c_attn" makes queries, keys and values at once, so
    its weight stacks three matrices, each of which is made orthogonal by itself.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parts = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if (
            isinstance(module, nn.Linear)
            and name not in {"lm_head", "head"}
            and id(module.weight) not in embeddings
        ):
            is_triple = name == "c_attn" and module.out_features % 3 == 0
            parts[f"{path}.weight" if path else "weight"] = 3 if is_triple else 1
    return parts


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return matrices with about the same singular vectors and with all singular values near 1.

    Args:
        matrices: (N, rows, columns), any scale.
        steps: Newton–Schulz iterations; after five, singular values lie in about [0.7, 1.2].

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


class _LeanOptimizer(Optimizer):
    """torch's base class, without the imports of 1.2 seconds for its first parameter group."""

    _step_supports_amp_scaling: bool = True
    found_inf: Tensor | None = None

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with its own settings."""
        decorated = Optimizer.add_param_group  # the decorator would import torch._dynamo
        getattr(decorated, "__wrapped__", decorated)(self, param_group)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients, and returns it; None: the gradients are ready.

        Returns:
            The result of the closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self) -> None:
        raise NotImplementedError


class AdamW(_LeanOptimizer):
    """AdamW (arXiv:1711.05101), for devices that have torch's fused kernel; equal to torch's own class.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: share of a parameter, times lr, that is subtracted in each step.

    Example:
        >>> weight = nn.Parameter(torch.zeros(3))
        >>> optimizer = AdamW([weight], lr=0.1)
        >>> weight.grad = torch.tensor([0.01, -5.0, 0.0])
        >>> _ = optimizer.step()
        >>> weight.data.round(decimals=4)
        tensor([-0.1000,  0.1000,  0.0000])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @override
    def _update(self) -> None:
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if not moving:
                continue
            for parameter in moving:
                state = self.state[parameter]
                if not state:
                    state.update(  # in one call, so that an interrupt leaves all of it or nothing
                        step=torch.zeros((), dtype=torch.float32, device=parameter.device),
                        exp_avg=torch.zeros_like(parameter),
                        exp_avg_sq=torch.zeros_like(parameter),
                    )
            steps = [self.state[p]["step"] for p in moving]
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                moving,
                [p.grad for p in moving],
                [self.state[p]["exp_avg"] for p in moving],
                [self.state[p]["exp_avg_sq"] for p in moving],
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=None,
                found_inf=self.found_inf,
            )
            if self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf] * len(steps))


class Muon(_LeanOptimizer):
    """Orthogonalised momentum, for the weight matrices between the embedding and the output layer.

    The update of a matrix (rows, columns) is Nesterov momentum, replaced by the nearest orthogonal matrix and
    scaled by `0.2 sqrt(max(rows, columns))`. Weight decay is decoupled.

    Args:
        params: matrices, or groups of them. "parts" of a group is the number of equal matrices that each of
            its parameters stacks.
        lr: learning rate, the same as AdamW's.
        momentum: share of the old momentum that is kept.
        weight_decay: share of a matrix, times lr, that is subtracted in each step.
        dtype: type of the Newton–Schulz products.

    Raises:
        InputError: a parameter is no matrix, or no stack of that many.

    Source:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the scale: arXiv:2502.16982.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = Muon([weight], lr=1.0)
        >>> weight.grad = torch.tensor([[100.0, 0.0], [0.0, 10.0]])
        >>> _ = optimizer.step()
        >>> weight.data.round(decimals=1)  # equally far in both directions
        tensor([[-0.2000,  0.0000],
                [ 0.0000, -0.2000]])
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
    def _update(self) -> None:
        # Matrices with the same settings are orthogonalised in one batch; tall ones are transposed.
        batches: dict[tuple[object, ...], list[tuple[Tensor, int]]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows, columns = parameter.size(0) // group["parts"], parameter.size(1)
                    key = (*sorted((rows, columns)), group["lr"], group["momentum"], group["weight_decay"])
                    batches[(*key, parameter.device)].append((parameter, group["parts"]))
        for (_, wide, lr, momentum, weight_decay, _), alike in batches.items():
            self._move(alike, lr, momentum, weight_decay, 0.2 * math.sqrt(wide))  # type: ignore[arg-type]

    def _move(
        self, alike: list[tuple[Tensor, int]], lr: float, momentum: float, weight_decay: float, scale: float
    ) -> None:
        """Update parameters of one size, each with the number of matrices that it stacks."""
        parameters = [parameter for parameter, _ in alike]
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        before = None
        if self.found_inf is not None:
            before = [tensor.clone() for tensor in (*parameters, *buffers)]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov's look ahead
        lying = [_lying(tensor, parts) for tensor, (_, parts) in zip(ahead, alike, strict=True)]
        updates = orthogonalize(torch.cat([tensor.to(self.dtype) for tensor in lying]))  # (N, short, long)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        counts = [parts for _, parts in alike]
        for (parameter, parts), update in zip(alike, updates.split(counts), strict=True):
            _lying(parameter, parts).add_(update, alpha=-lr * scale)
        if before is not None and self.found_inf is not None:
            skip = self.found_inf > 0
            for tensor, old in zip((*parameters, *buffers), before, strict=True):
                tensor.copy_(torch.where(skip, old, tensor))


def _lying(stack: Tensor, parts: int) -> Tensor:
    """Return a view of a stack of matrices, (parts, rows, columns), transposed if they are tall."""
    matrices = stack.view(parts, -1, stack.size(-1))
    return matrices.mT if matrices.size(-2) > matrices.size(-1) else matrices
