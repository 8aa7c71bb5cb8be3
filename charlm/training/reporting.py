"""`Reporter`: writes the log of a run and calls its callbacks. It decides nothing.

Of several processes, only the first one has a log and calls callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from charlm.errors import InputError, NonFiniteError, shown, warn
from charlm.runs.log import eval_values
from charlm.training.callbacks import Callback
from charlm.training.guard import SkippedStep
from charlm.training.records import EvalRecord, SampleRecord, StepRecord

if TYPE_CHECKING:
    from charlm.training.trainer import Trainer

__all__ = ["Reporter"]

_OWN_KINDS = {"step", "eval", "sample", "end", "skip"}


class Reporter:
    """Writes records into metrics.jsonl and calls the callbacks, in their order.

    Args:
        trainer: is passed to its callbacks; its step and seconds are part of each record.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._logged_at = (0, 0.0)  # chars_seen and seconds at the last logged step
        self._logged_step = 0
        self._is_silent = not trainer._world.is_first
        self._readers = [c for c in trainer.callbacks if type(c).on_log is not Callback.on_log]
        if self._is_silent:
            self._readers.clear()

    def began(self) -> None:
        """Report that the first step of this process is next."""
        self._logged_at = (self._trainer.chars_seen, self._trainer.seconds)
        self._logged_step = 0
        self._call(lambda callback: callback.on_train_start(self._trainer))

    def stepped(self, record: StepRecord) -> None:
        """Report a step."""
        self._call(lambda callback: callback.on_step_end(self._trainer, record))

    def log_step(self, record: StepRecord) -> None:
        """Log a step, once. Without a log or reader, the loss is not read from the device."""
        is_read = self._trainer._writer is not None or self._readers
        if not is_read or self._logged_step == record.step:
            return
        self._logged_step = record.step
        now = (self._trainer.chars_seen, self._trainer.seconds)
        chars, seconds = now[0] - self._logged_at[0], now[1] - self._logged_at[1]
        self._logged_at = now
        self._log(
            "step",
            {
                "loss": record.loss,
                "learning_rate": record.learning_rate,
                "grad_norm": record.grad_norm,
                "chars_per_second": chars / max(seconds, 1e-9),
            },
        )

    def log(self, kind: str, values: Mapping[str, object]) -> None:
        """Log a callback's own record; see `Trainer.log`."""
        if kind in _OWN_KINDS:
            raise InputError(f"kind must be a name of your own, got {shown(kind)}, which is the trainer's")
        self._log(kind, values)

    def log_planned_end(self, end: int) -> None:
        """Log the end that the clock has fixed."""
        self._log("end", {"end": end})

    def evaluated(self, record: EvalRecord) -> None:
        """Log and report an evaluation."""
        self._log("eval", eval_values(record.result))
        self._call(lambda callback: callback.on_evaluate(self._trainer, record))

    def sampled(self, record: SampleRecord) -> None:
        """Log and report a sample."""
        self._log("sample", {"text": record.text})
        self._call(lambda callback: callback.on_sample(self._trainer, record))

    def saved(self, checkpoint: Path) -> None:
        """Report a checkpoint."""
        self._call(lambda callback: callback.on_save(self._trainer, checkpoint))

    def ended(self) -> None:
        """Report that the run has ended by itself."""
        self._call(lambda callback: callback.on_train_end(self._trainer, self._trainer.result()))

    def closed(self) -> None:
        """Report that this process makes no more steps for now."""
        self._call(lambda callback: callback.on_close(self._trainer))

    def skipped(self, steps: Sequence[SkippedStep]) -> None:
        """Log and warn of skipped steps."""
        for bad in steps:
            self._log("skip", {"loss": bad.loss, "grad_norm": bad.grad_norm}, step=bad.step)
            if self._is_silent:
                continue
            warn(
                f"step {bad.step} was skipped: its loss is {bad.loss}, its gradient's norm {bad.grad_norm}; "
                "the weights are those before it"
            )

    def failed(self, error: NonFiniteError) -> None:
        """Log the step that ends the run with an error; the trainer is in the state before it."""
        step = self._trainer.step + 1
        self._log("step", {"loss": error.loss, "grad_norm": error.grad_norm}, step=step)

    def _call(self, tell: Callable[[Callback], None]) -> None:
        if self._is_silent:
            return
        with self._trainer._turns.between():
            for callback in self._trainer.callbacks:
                tell(callback)

    def _log(self, kind: str, values: Mapping[str, object], *, step: int | None = None) -> None:
        step, writer = step or self._trainer.step, self._trainer._writer
        values = {**values, "seconds": self._trainer.seconds}
        if writer is not None:
            writer.log(kind, step, values)
        for callback in self._readers:
            callback.on_log(self._trainer, {"kind": kind, "step": step, **values})
