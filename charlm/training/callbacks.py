"""`Callback`: hooks for the caller's code in a run.

Callbacks run in the order of the list, after the step is done, so their random numbers never change the
training. They act on a run by `trainer.finish()`, `trainer.evaluate()` and `trainer.save()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from charlm.training.records import EvalRecord, SampleRecord, StepRecord, TrainResult
    from charlm.training.trainer import Trainer

__all__ = ["Callback"]


class Callback:
    """Base of callbacks: every method does nothing until it is overridden.

    The trainer passes itself as the first argument. An exception of a method ends the run. A method may save
    and evaluate. It must not wait for another thread that saves or evaluates, since that thread waits for the
    end of the step. Of several processes, only the first one calls the callbacks, and the others wait; there
    `trainer.evaluate()` runs in this process alone.

    Example:
        >>> class StopBelow(Callback):
        ...     def on_evaluate(self, trainer, evaluation):
        ...         if evaluation.result.loss_nats < 1.5:
        ...             trainer.finish()
    """

    def on_train_start(self, trainer: Trainer) -> None:
        """Run before the first step of this process."""

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        """Run after each step.

        Args:
            trainer: `trainer.step` is the number of steps done.
            record: of the step. Reading `record.loss` waits for the device.
        """

    def on_log(self, trainer: Trainer, record: Mapping[str, object]) -> None:
        """Run for each record that is logged, also in a run without a directory.

        Args:
            trainer: do not save or evaluate here.
            record: the values of the line in metrics.jsonl, "kind" and "step" first; NaN and infinities are
                kept. The loss of a step was read from the device.
        """

    def on_evaluate(self, trainer: Trainer, evaluation: EvalRecord) -> None:
        """Run after each scheduled evaluation and that of the last step.

        Args:
            trainer: `trainer.finish()` and `trainer.save()` may be called here.
            evaluation: the losses, and whether they are the lowest so far.
        """

    def on_sample(self, trainer: Trainer, sample: SampleRecord) -> None:
        """Run after each sample of text.

        Args:
            trainer: the trainer.
            sample: the text.
        """

    def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
        """Run after each checkpoint is safely on disk.

        Args:
            trainer: the trainer.
            checkpoint: the directory of the checkpoint.
        """

    def on_train_end(self, trainer: Trainer, result: TrainResult) -> None:
        """Run after the last step, if the run ends by itself.

        Args:
            trainer: its model holds the best weights, unless `restore_best` is False.
            result: the result of `Trainer.fit`.
        """

    def on_close(self, trainer: Trainer) -> None:
        """Run last in this process, also after an interrupt, an error or a `break`.

        Args:
            trainer: it may continue later, which begins with `on_train_start`.
        """

    def state(self) -> Mapping[str, object]:
        """Return the state that this callback needs after a resume, as values of JSON."""
        return {}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Restore the result of `state`, before the first step of a resumed run.

        Args:
            state: from the checkpoint, so tuples have become lists.
        """
