"""Records of steps, evaluations and samples of a run, and its result.

A record describes an event at a step of a run. A result is returned by a function: `EvalResult` by
`evaluate`, `TrainResult` by `fit`.
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
from charlm.text.tokenizer import Unit

__all__ = ["EvalRecord", "SampleRecord", "StepRecord", "StopReason", "TrainResult"]

StopReason = Literal["max_steps", "minutes", "max_seconds", "patience", "callback", "interrupted"]
"""The reason of a run's end: all steps are done, its minutes or max_seconds are over, no evaluation was
better, a callback ended it, or it was interrupted."""


@dataclass(frozen=True)
class StepRecord:
    """One step of training."""

    step: int
    """Number of steps done, this one included."""
    learning_rate: float
    """Learning rate of this step."""
    chars: int
    """Number of tokens that were predicted in this step."""
    seconds: float
    """Time of the step, without evaluation, saving and callbacks. On an asynchronous device, the time to
    submit the step."""
    loss_tensor: Tensor = field(repr=False)
    """The same as `loss`, a scalar on the device; reading it waits for the device."""
    grad_norm_tensor: Tensor = field(repr=False)
    """The same as `grad_norm`, on the device."""

    @cached_property
    def loss(self) -> float:
        """Mean loss of the step's batch in nats, before the update. Reading it waits for the device."""
        return self.loss_tensor.item()

    @cached_property
    def grad_norm(self) -> float:
        """Global norm of the gradient before clipping. Reading it waits for the device."""
        return self.grad_norm_tensor.item()

    @property
    def skipped(self) -> bool:
        """Whether nothing was updated, since loss or gradient was not finite. Reading it waits."""
        return not math.isfinite(self.loss + self.grad_norm)

    @property
    def chars_per_second(self) -> float:
        """Speed of this step, from `chars` and `seconds`."""
        return self.chars / self.seconds


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation on the validation text, or on the `eval_chars` of it."""

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
    unit: Unit = field(default="character", repr=False)
    """The unit of losses and of `chars_seen`, "character" or "byte"."""

    def _repr_html_(self) -> str:
        """Return tables for a notebook."""
        rows = [[f"{self.unit}s", f"{self.chars_seen:,}", "predicted in training"]]
        for name, result in (("best", self.best), ("final", self.final)):
            if result is not None:
                step = self.best_step if name == "best" else self.steps
                bits = f"nats = {figure(result.bits_per_char)} bits per {self.unit}, at step {step:,}"
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
