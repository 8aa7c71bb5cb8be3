"""The guard against steps whose loss or gradient is not finite: they move nothing, and in a row end the run.

It has two forms. `WaitingGuard` reads each answer at once, which on a CPU costs nothing. `MaskedGuard` leaves
the answers on a device that works on its own: there a bad step is masked out of the update, and so are all
steps after the one at which the run is to end, until somebody asks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

from charlm.backends.base import DeviceBackend
from charlm.training.config import TrainerConfig

__all__ = ["Guard", "MaskedGuard", "SkippedStep", "Verdict", "WaitingGuard", "guard_for"]

Verdict = Literal["move", "skip", "end"]
"""What becomes of a step: the optimizers move, none of them does, or the run ends before it."""

# After so many steps in a row that were not finite a run ends: then it is not the batch.
_MOST_IN_A_ROW = {"raise": 1, "skip": 10}


class SkippedStep(NamedTuple):
    """A step that changed nothing."""

    step: int
    """Which, counted from 1, as in the log."""
    loss: float
    """In nats."""
    grad_norm: float
    """Before clipping."""


class Guard(ABC):
    """Decides whether a step may move the weights.

    Args:
        limit: how many steps in a row that are not finite end the run.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._maybe_skipped: list[tuple[int, Tensor, Tensor]] = []  # step, loss, norm of the gradient

    @abstractmethod
    def judge(self, step: int, loss: Tensor, norm: Tensor, active: Sequence[Optimizer]) -> Verdict:
        """Say what becomes of a step, before its update.

        Args:
            step: counted from 0.
            loss: a scalar on the device.
            norm: of the gradient, unscaled; a scalar on the device.
            active: the optimizers that are about to move.
        """

    def ended_at(self) -> int | None:
        """Return the step, counted from 0, at which the run is to end, where `judge` could not say so."""
        return None

    @abstractmethod
    def in_a_row(self) -> int:
        """Return how many steps up to now, the last one included, were not finite; waits for the device."""

    @abstractmethod
    def begin(self, in_a_row: int = 0) -> None:
        """Begin to count, anew or where a resumed run had come to."""

    def skipped(self, done: int) -> list[SkippedStep]:
        """Return the steps that were left out since the last call; waits for the device.

        Args:
            done: how many steps are done; later ones are to be taken again, and do not count.
        """
        noted, self._maybe_skipped = self._maybe_skipped, []
        if not noted:
            return []
        read = torch.stack([torch.stack((loss, norm)) for _, loss, norm in noted]).tolist()  # (N, 2)
        steps = [SkippedStep(step + 1, *numbers) for (step, _, _), numbers in zip(noted, read, strict=True)]
        return [bad for bad in steps if bad.step <= done and not math.isfinite(bad.loss + bad.grad_norm)]


class WaitingGuard(Guard):
    """Reads from the device whether a step is finite.

    In fp16 gradients overflow now and then: no optimizer moves then, and the scaler lowers its factor. Such a
    step does not count, unless the factor is below 1 and there is nothing left to lower.

    Args:
        limit: how many steps in a row that are not finite end the run.
        scaler: of the gradients, in fp16; else None.
    """

    def __init__(self, limit: int, scaler: GradScaler | None = None) -> None:
        super().__init__(limit)
        self._scaler = scaler
        self._in_a_row = 0

    @override
    def judge(self, step: int, loss: Tensor, norm: Tensor, active: Sequence[Optimizer]) -> Verdict:
        if math.isfinite((loss + norm).item()):  # a fifth of torch.isfinite's time
            self._in_a_row = 0
            return "move"
        if self._scaler is not None and bool(torch.isfinite(loss)) and self._scaler.get_scale() >= 1:
            return "skip"
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            return "end"
        self._maybe_skipped.append((step, loss, norm))
        return "skip"

    @override
    def in_a_row(self) -> int:
        return self._in_a_row

    @override
    def begin(self, in_a_row: int = 0) -> None:
        self._in_a_row = in_a_row


class MaskedGuard(Guard):
    """Tells the optimizers on the device whether they may move, and reads nothing until it is asked.

    So `judge` always says "move"; what was not to move is found by `ended_at` and `skipped` later.

    Torch's own optimizers take the number for it, `found_inf`, from the gradient scaler's protocol: where it
    is not 0 they leave weights and moments as they are.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        # On the device: bad steps in a row; 1 once the run is to end; the step at which it was to.
        self._noted: tuple[Tensor, Tensor, Tensor] | None = None
        self._began_with = 0

    @override
    def judge(self, step: int, loss: Tensor, norm: Tensor, active: Sequence[Optimizer]) -> Verdict:
        bad = (~torch.isfinite(loss + norm)).float()
        if self._noted is None:
            row = torch.full_like(bad, self._began_with)
            self._noted = row, torch.zeros_like(bad), torch.zeros_like(bad, dtype=torch.int64)
        in_a_row, ended, last = self._noted
        in_a_row = (in_a_row + 1) * bad
        last = torch.where(ended > 0, last, step)
        ended = torch.maximum(ended, (in_a_row >= self.limit).float())
        self._noted = in_a_row, ended, last
        for optimizer in active:
            optimizer.found_inf = torch.maximum(bad, ended)  # type: ignore[attr-defined]
        if self.limit > 1:
            self._maybe_skipped.append((step, loss, norm))
        return "move"

    @override
    def ended_at(self) -> int | None:
        if self._noted is None or not bool(self._noted[1]):
            return None
        return int(self._noted[2])

    @override
    def in_a_row(self) -> int:
        return self._began_with if self._noted is None else int(self._noted[0])

    @override
    def begin(self, in_a_row: int = 0) -> None:
        self._noted, self._began_with = None, in_a_row


def guard_for(
    config: TrainerConfig,
    backend: DeviceBackend,
    *,
    scaler: GradScaler | None,
    optimizers: Sequence[Optimizer],
    must_wait: bool = False,
) -> Guard:
    """Return the guard of a run: one that waits, unless the device works on its own and can do without.

    In fp16 the scaler skips steps of its own, and an optimizer of the caller's may know nothing of
    `found_inf`: these wait. So do several processes (`must_wait`), which are to end at the same step.
    """
    limit = _MOST_IN_A_ROW[config.nonfinite]
    masks = all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in optimizers)
    if backend.asynchronous and scaler is None and masks and not must_wait:
        return MaskedGuard(limit)
    return WaitingGuard(limit, scaler)
