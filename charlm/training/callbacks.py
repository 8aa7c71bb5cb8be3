"""`Callback`: what a caller may do at the turning points of a run.

Callbacks run in the order of the list, after the step is done, so that what they draw or print never
changes the training. They act on a run by `trainer.finish()`, `trainer.evaluate()` and `trainer.save()`.
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

    The trainer calls the callbacks in the order of its list, with itself as the first argument. What a method
    raises ends the run. A method may save and evaluate, but not wait for another thread that does: that one
    waits for the end of the step. Of several processes the first one alone calls them, while the others wait;
    what `trainer.evaluate()` scores there, it scores alone.

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
            record: what the step did. Asking for `record.loss` waits for the device.
        """

    def on_log(self, trainer: Trainer, record: Mapping[str, object]) -> None:
        """Run for each record of metrics.jsonl as it is written, also of a run without a directory.

        Args:
            trainer: where it comes from. It may not be told to save or to evaluate here.
            record: what the line holds, "kind" and "step" first; a number that is not finite stands in it as
                it is. The loss of a step was read from the device.
        """

    def on_evaluate(self, trainer: Trainer, evaluation: EvalRecord) -> None:
        """Run after each evaluation: those of the schedule, and that of the last step before an end.

        Args:
            trainer: may be told to `finish()`, or to `save()`.
            evaluation: the losses, and whether no others were as low.
        """

    def on_sample(self, trainer: Trainer, sample: SampleRecord) -> None:
        """Run after each sample of text.

        Args:
            trainer: where it comes from.
            sample: the text.
        """

    def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
        """Run after each checkpoint is safely on disk.

        Args:
            trainer: whose state it is.
            checkpoint: its directory.
        """

    def on_train_end(self, trainer: Trainer, result: TrainResult) -> None:
        """Run after the last step, when the run ends by itself.

        Args:
            trainer: its model holds the best weights, unless `restore_best` is False.
            result: what `Trainer.fit` will return.
        """

    def on_close(self, trainer: Trainer) -> None:
        """Run last, however the steps of this process end: also by an interrupt, an error or a `break`.

        Args:
            trainer: may be told to go on afterwards, and then begins with `on_train_start`.
        """

    def state(self) -> Mapping[str, object]:
        """Return what this callback must remember across a resume, as JSON has it."""
        return {}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Take back what `state` returned, before the first step of a resumed run.

        Args:
            state: read from the checkpoint, so that tuples have become lists.
        """
