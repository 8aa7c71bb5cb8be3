"""`RunState`: the numbers of a run that a resume needs, in the trainer and in state.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from charlm.errors import FileFormatError, quoted
from charlm.evaluation.evaluate import EvalResult
from charlm.files.strict_json import take
from charlm.runs.log import eval_values, finite
from charlm.training.records import EvalRecord

__all__ = ["RunState"]

_MOST_SECONDS = 1e12


@dataclass(kw_only=True)
class RunState:
    """The progress of a run.

    Weights and moments are stored elsewhere. Batches and dropout need no state: they follow from the seed and
    the step.
    """

    step: int = 0
    """Number of steps done."""
    chars_seen: int = 0
    """Number of tokens predicted in training."""
    seconds: float = 0.0
    """Time of the run so far."""
    evaluations_since_best: int = 0
    """Scheduled evaluations since the one with the lowest loss."""
    best: EvalRecord | None = None
    """The evaluation with the lowest loss so far."""
    last: EvalRecord | None = None
    """The last evaluation."""
    skipped_in_a_row: int = 0
    """Number of skipped steps in a row, up to the last step."""

    def has_lost(self, patience: int | None) -> bool:
        """Return whether `patience` scheduled evaluations in a row were no better."""
        return patience is not None and self.evaluations_since_best >= patience

    @property
    def val_loss(self) -> float | None:
        """Validation loss at this step in nats, which ranks its checkpoint; None: unknown."""
        if self.last is None or self.last.step != self.step or not math.isfinite(self.last.result.loss_nats):
            return None
        return self.last.result.loss_nats

    def to_dict(self) -> dict[str, object]:
        """Return the fields as values of JSON; `skipped_in_a_row` only if it is not 0."""
        values: dict[str, object] = {
            "step": self.step,
            "chars_seen": self.chars_seen,
            "seconds": self.seconds,
            "evaluations_since_best": self.evaluations_since_best,
            "best": _record_values(self.best),
            "last": _record_values(self.last),
        }
        return {**values, "skipped_in_a_row": self.skipped_in_a_row} if self.skipped_in_a_row else values

    @classmethod
    def from_dict(cls, values: Mapping[str, object], *, path: str) -> Self:
        """Make a state from the values of `to_dict`.

        Raises:
            FileFormatError: the file `path` holds something else.
        """
        return cls(
            step=take(values, "step", int, path=path),
            chars_seen=take(values, "chars_seen", int, path=path),
            seconds=_seconds(values, path),
            evaluations_since_best=take(values, "evaluations_since_best", int, path=path),
            best=_read_record(values, "best", path),
            last=_read_record(values, "last", path),
            skipped_in_a_row=take({"skipped_in_a_row": 0, **values}, "skipped_in_a_row", int, path=path),
        )


def _record_values(record: EvalRecord | None) -> dict[str, object] | None:
    if record is None:
        return None
    return {
        "step": record.step,
        "is_best": record.is_best,
        "seconds": record.seconds,
        **finite(eval_values(record.result)),
        **({} if record.result.unit == "character" else {"unit": record.result.unit}),
    }


def _read_record(values: Mapping[str, object], name: str, path: str) -> EvalRecord | None:
    if values.get(name) is None:
        return None
    saved = take(values, name, dict, path=path)
    nonfinite = take({"nonfinite": {}, **saved}, "nonfinite", dict, path=path)
    if nonfinite.get("loss_nats") == "nan":
        loss = math.nan
    elif saved.get("loss_nats") is None:
        loss = math.inf
    else:
        loss = take(saved, "loss_nats", float, path=path)
    return EvalRecord(
        step=take(saved, "step", int, path=path),
        result=EvalResult(
            loss_nats=loss,
            accuracy=take(saved, "accuracy", float, path=path),
            n_chars=take(saved, "n_chars", int, path=path),
            n_left_out=take({"n_left_out": 0, **saved}, "n_left_out", int, path=path),
            unit="byte" if saved.get("unit") == "byte" else "character",
        ),
        is_best=take(saved, "is_best", bool, path=path),
        seconds=_seconds(saved, path),
    )


def _seconds(values: Mapping[str, Any], path: str) -> float:
    seconds = take(values, "seconds", float, path=path)
    if not 0 <= seconds <= _MOST_SECONDS:
        raise FileFormatError(f"{quoted(path)} must hold a time in 'seconds', got {seconds}")
    return seconds
