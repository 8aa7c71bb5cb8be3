"""The guard against steps whose loss or gradient is not finite: they change nothing, and some end the run.

It has two forms. `WaitingGuard` reads each result at once, which costs nothing on a CPU. `MaskedGuard` leaves
the results on an asynchronous device: there a bad step is masked out of the update, and so are all steps
after the one that ends the run, until the results are read.
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
"""The verdict on a step: update, skip the update, or end the run before it."""

# So many bad steps in a row end the run, since a single bad batch cannot be the cause.
_MOST_IN_A_ROW = {"raise": 1, "skip": 10}


class SkippedStep(NamedTuple):
    """A step that changed nothing."""

    step: int
    """Its number, counted from 1, as in the log."""
    loss: float
    """Its loss in nats."""
    grad_norm: float
    """Norm of its gradient before clipping."""


class Guard(ABC):
    """Decides whether a step may change the weights.

    Args:
        limit: so many bad steps in a row end the run.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._maybe_skipped: list[tuple[int, Tensor, Tensor]] = []  # step, loss, norm of the gradient

    @abstractmethod
    def judge(self, step: int, loss: Tensor, norm: Tensor, active: Sequence[Optimizer]) -> Verdict:
        """Return the verdict on a step, before its update.

        Args:
            step: counted from 0.
            loss: a scalar on the device.
            norm: of the unscaled gradient; a scalar on the device.
            active: the optimizers that will update.
        """

    def ended_at(self) -> int | None:
        """Return the step, counted from 0, that ends the run, if `judge` could not tell; else None."""
        return None

    @abstractmethod
    def in_a_row(self) -> int:
        """Wait for the device, and return the number of bad steps in a row up to the last step."""

    @abstractmethod
    def begin(self, in_a_row: int = 0) -> None:
        """Begin to count bad steps in a row, from 0 or from the number of a resumed run."""

    def skipped(self, done: int) -> list[SkippedStep]:
        """Wait for the device, and return the steps that were skipped since the last call.

        Args:
            done: number of steps done; later steps will be repeated, and do not count.
        """
        noted, self._maybe_skipped = self._maybe_skipped, []
        if not noted:
            return []
        read = torch.stack([torch.stack((loss, norm)) for _, loss, norm in noted]).tolist()  # (N, 2)
        steps = [SkippedStep(step + 1, *numbers) for (step, _, _), numbers in zip(noted, read, strict=True)]
        return [bad for bad in steps if bad.step <= done and not math.isfinite(bad.loss + bad.grad_norm)]


class WaitingGuard(Guard):
    """Waits for the device in each step.

    In fp16, gradients overflow now and then. Then no optimizer updates, and the scaler lowers its factor.
    Such a step is not bad, unless the factor is below 1.

    Args:
        limit: as for `Guard`.
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
    """Tells the optimizers on the device whether they may update, and does not wait.

    `judge` always returns "move"; `ended_at` and `skipped` find the bad steps later. Torch's own optimizers
    read the number `found_inf`, from the protocol of the gradient scaler: if it is not 0, they leave weights
    and moments unchanged.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        # On the device: bad steps in a row; 1 if the run must end; the step that ends it.
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
    """Return the guard of a run: `MaskedGuard` on an asynchronous device if possible, else `WaitingGuard`.

    fp16 must wait, since the scaler skips steps by itself. So must a caller's optimizer that ignores
    `found_inf`, and several processes (`must_wait`), which must end at the same step.
    """
    limit = _MOST_IN_A_ROW[config.nonfinite]
    masks = all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in optimizers)
    if backend.asynchronous and scaler is None and masks and not must_wait:
        return MaskedGuard(limit)
    return WaitingGuard(limit, scaler)
