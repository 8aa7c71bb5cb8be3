"""What training tells: a record for each step, evaluation and sample, and a result at the end.

A record says what happened at a step of a run; a result is what a function returns (`EvalResult` of
`evaluate`, `TrainResult` of `fit`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor

from charlm.evaluation.evaluate import EvalResult
from charlm.evaluation.markup import figure, table

__all__ = ["EvalRecord", "SampleRecord", "StepRecord", "StopReason", "TrainResult"]

StopReason = Literal["max_steps", "minutes", "max_seconds", "patience", "callback", "interrupted"]
"""Why a run ended: all steps done, its minutes used, max_seconds over, no better evaluation, a callback; or
it was left before that."""


@dataclass(frozen=True)
class StepRecord:
    """One step of training."""

    step: int
    """How many steps are done, this one included."""
    learning_rate: float
    """Of this step."""
    chars: int
    """Characters that were predicted in this step."""
    seconds: float
    """What the step took, without evaluation, saving and callbacks. On a device that works on its own, what
    it took to hand the step over."""
    loss_tensor: Tensor = field(repr=False)
    """The same as `loss`, a scalar on the device: not waited for until it is read."""
    grad_norm_tensor: Tensor = field(repr=False)
    """The same as `grad_norm`, on the device."""

    @cached_property
    def loss(self) -> float:
        """Mean loss of the step's batch in nats, before the update. Read from the device when asked."""
        return self.loss_tensor.item()

    @cached_property
    def grad_norm(self) -> float:
        """Global norm of the gradient before clipping. Read from the device when asked."""
        return self.grad_norm_tensor.item()

    @property
    def skipped(self) -> bool:
        """Whether nothing was updated, since the loss or the gradient was not finite. Asks the device."""
        return not math.isfinite(self.loss + self.grad_norm)

    @property
    def chars_per_second(self) -> float:
        """Speed of this step, by its `seconds`."""
        return self.chars / self.seconds


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation over the validation text, or over what `eval_chars` leaves of it."""

    step: int
    """How many steps were done."""
    result: EvalResult
    """Losses and accuracy."""
    is_best: bool
    """Whether no evaluation before had as low a loss."""
    seconds: float
    """What it took."""


@dataclass(frozen=True)
class SampleRecord:
    """A text that the model wrote during training."""

    step: int
    """How many steps were done."""
    text: str
    """The sample."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run came to."""

    steps: int
    """Steps done in the whole run, those before a resume included."""
    seconds: float
    """Time of the whole run, evaluation and saving included."""
    chars_seen: int
    """Characters predicted in training."""
    final: EvalResult | None
    """The last evaluation, or None without validation data."""
    best: EvalResult | None
    """The evaluation with the lowest loss."""
    best_step: int | None
    """The step after which that was."""
    history: Sequence[EvalRecord]
    """All evaluations of this process, in order."""
    reason: StopReason
    """Why it ended."""
    checkpoint: Path | None
    """The last checkpoint, or None without a directory."""

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        rows = [["characters", f"{self.chars_seen:,}", "predicted in training"]]
        for name, result in (("best", self.best), ("final", self.final)):
            if result is not None:
                step = self.best_step if name == "best" else self.steps
                bits = f"nats = {figure(result.bits_per_char)} bits per character, at step {step:,}"
                rows.append([f"{name} loss", figure(result.loss_nats), bits])
        if self.checkpoint is not None:
            rows.append(["checkpoint", "", str(self.checkpoint)])
        title = f"{self.steps:,} steps in {self.seconds:,.1f} s ({self.reason})"
        evaluations = [
            [
                f"{record.step:,}",
                figure(record.result.loss_nats),
                figure(record.result.bits_per_char),
                "best so far" if record.is_best else "",
            ]
            for record in self.history
        ]
        head = ("step", "nats", "bits", "")
        folded = table(evaluations, head=head, folded=f"{len(evaluations)} evaluations")
        return table(rows, title=title) + (folded if evaluations else "")
