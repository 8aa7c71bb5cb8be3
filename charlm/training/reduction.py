"""Sums the gradients of a step's micro-batches, in one process and over several.

`TreeSum` adds them in a fixed binary tree over all V micro-batches: it halves their row as long as that is
possible, and adds the rest in order. Each of W processes, W a power of two that divides V, owns one node of
the tree, so the sum has the same bits for every W. Between processes, each one adds its Wth part of all
numbers and sends the result to all. That moves as much data as an all-reduce (a reduce-scatter and a gather),
but fixes the order of the sum.
`Overlapped` leaves the sum to torch's DistributedDataParallel (arXiv:2006.15704), which begins it during the
backward pass. It is faster over a slow link; the result is close, not equal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from typing_extensions import override

from charlm.backends.world import World
from charlm.errors import ConfigError
from charlm.training.config import TrainerConfig

__all__ = ["Backward", "Overlapped", "Reduction", "TreeSum", "check_world", "copies_kept", "reduction_for"]

Backward = Callable[[nn.Module, int, int], Tensor]
"""Runs a model forward and backward on a micro-batch, its loss divided by a number; returns that loss."""


class Reduction(ABC):
    """Sums the gradients of a step.

    Args:
        model: the model.
        parameters: those that an optimizer updates.
        count: V, micro-batches in a step.
        world: the processes that share them.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], count: int, world: World
    ) -> None:
        self._model, self._parameters, self._count, self._world = model, parameters, count, world

    @abstractmethod
    def run(self, backward: Backward) -> Tensor:
        """Compute the mean gradient of all micro-batches in the parameters, and return their mean loss."""

    def _make_dense(self) -> None:
        for parameter in self._parameters:  # the gradient of an embedding with sparse=True has no norm
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()


class TreeSum(Reduction):
    """Adds in the tree; several processes need two more copies of the gradients."""

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], count: int, world: World
    ) -> None:
        super().__init__(model, parameters, count, world)
        self._rows = (
            []
            if world.size == 1
            else [
                _Row([p for p in parameters if p.dtype == dtype], world)
                for dtype in sorted({p.dtype for p in parameters}, key=str)
            ]
        )

    @override
    def run(self, backward: Backward) -> Tensor:
        world = self._world
        each = self._count // world.size
        loss = self._node(backward, world.rank * each, each)
        if world.size == 1:
            return loss
        here = [parameter.grad is not None for parameter in self._parameters]
        if any(row[0] for row in world.agree([not all(here)])):  # also shows that no process has failed
            anywhere = world.gather(torch.tensor(here, device="cpu")).any(0).tolist()
            for parameter, is_wanted in zip(self._parameters, anywhere, strict=True):
                if is_wanted and parameter.grad is None:  # x + -0.0 is x, also for 0.0 and -0.0
                    parameter.grad = torch.full_like(parameter, -0.0)
        for row in self._rows:
            row.add_up()
        return _added(world.gather(loss))

    def _node(self, backward: Backward, first: int, count: int) -> Tensor:
        """Sum the gradients of some micro-batches in the parameters, and return the sum of their losses."""
        if count % 2 or count == 2:  # in order, as autograd adds
            loss = backward(self._model, first, self._count)
            for micro in range(first + 1, first + count):
                loss = loss + backward(self._model, micro, self._count)
            self._make_dense()
            return loss
        half = count // 2
        loss = self._node(backward, first, half)
        kept = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        loss = loss + self._node(backward, first + half, half)
        for parameter, before in zip(self._parameters, kept, strict=True):
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        return loss


class _Row:
    """The gradients of all parameters of one type in a row of numbers, with a part for each process."""

    def __init__(self, parameters: Sequence[nn.Parameter], world: World) -> None:
        self._parameters, self._world = parameters, world
        sizes = [parameter.numel() for parameter in parameters]
        each = -(-sum(sizes) // world.size)
        self._row = torch.zeros((world.size, each), dtype=parameters[0].dtype, device=parameters[0].device)
        self._traded = torch.zeros_like(self._row)
        self._views = [
            view.view_as(parameter)
            for view, parameter in zip(self._row.view(-1)[: sum(sizes)].split(sizes), parameters, strict=True)
        ]

    def add_up(self) -> None:
        """Replace each parameter's gradient by its sum over all processes."""
        pairs = [
            (p.grad, view)
            for p, view in zip(self._parameters, self._views, strict=True)
            if p.grad is not None
        ]
        if not pairs:
            return
        grads, views = [grad for grad, _ in pairs], [view for _, view in pairs]
        torch._foreach_copy_(views, grads)
        self._world.trade(self._row, self._traded)  # row i is now process i's share of this one's part
        self._world.gather(_added(self._traded), self._row)
        # Back into separate tensors, as in one process: some kernels depend on the alignment of memory.
        torch._foreach_copy_(grads, views)


def _added(rows: Tensor) -> Tensor:
    """Return the sum of (W, …) over processes, neighbours first, as in the tree's upper levels; in place."""
    while len(rows) > 1:
        rows = rows[::2].add_(rows[1::2])
    return rows[0]


class Overlapped(Reduction):
    """Lets DistributedDataParallel add gradients during the backward pass."""

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], count: int, world: World
    ) -> None:
        super().__init__(model, parameters, count, world)
        self._wrapped = world.overlapping(model)

    @override
    def run(self, backward: Backward) -> Tensor:
        each = self._count // self._world.size  # DistributedDataParallel divides by W
        first = self._world.rank * each
        losses = []
        with self._world.unannounced():
            for micro in range(first, first + each):
                # Around both passes: the forward pass prepares the sum of the backward pass.
                with nullcontext() if micro == first + each - 1 else self._wrapped.no_sync():
                    losses.append(backward(self._wrapped, micro, each))
        self._make_dense()
        self._world.agree()
        return self._world.gather(torch.stack(losses).sum()).mean()


def copies_kept(count: int) -> int:
    """Return the most copies of the gradients that the tree stores, beside those of the parameters.

    Example:
        >>> [copies_kept(count) for count in (1, 2, 3, 4, 6, 8)]
        [0, 0, 0, 1, 1, 2]
    """
    return 0 if count % 2 or count == 2 else 1 + copies_kept(count // 2)


def reduction_for(
    model: nn.Module, parameters: Sequence[nn.Parameter], config: TrainerConfig, world: World
) -> Reduction:
    """Return the reduction of a config; in one process it is always the tree."""
    kind = Overlapped if config.reduce == "fast" and world.size > 1 else TreeSum
    return kind(model, parameters, config.accumulate, world)


def check_world(config: TrainerConfig, size: int) -> None:
    """Raise ConfigError unless the micro-batches can be divided among the processes.

    The message names settings that can, with as many blocks in a step.
    """
    V, blocks = config.accumulate, config.accumulate * config.batch_size
    if config.reduce == "exact" and size & (size - 1):
        raise ConfigError(
            f"an exact sum needs 1, 2, 4, 8, … processes, got {size}. Start as many, or set reduce='fast' "
            "(--reduce fast) with an accumulate that they divide"
        )
    if V % size == 0:
        return
    fitting = next(
        (count for count in range(size, blocks + 1, size) if blocks % count == 0 and count > V), None
    )
    fitting = fitting or next((n for n in range(size, blocks + 1, size) if blocks % n == 0), None)
    advice = f"Use at most {blocks} processes, or larger steps"
    if fitting is not None:
        B = blocks // fitting
        advice = (
            f"The same {blocks} blocks in a step are batch_size={B}, accumulate={fitting} "
            f"(--batch-size {B} --accumulate {fitting})"
        )
    raise ConfigError(f"accumulate must be a multiple of the {size} processes, got {V}. {advice}.")
