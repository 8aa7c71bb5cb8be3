"""The progress of a training on the console: a `ProgressBar` that respects --quiet and --verbose.

It also hands the signals over to the training, and reports when the run's directory exists.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from charlm.cli.output import Console
from charlm.cli.signals import Signals
from charlm.cli.verdict import FEW_STEPS, few_steps
from charlm.training.progress import ProgressBar, speed

if TYPE_CHECKING:
    from charlm.cli.parent import OldText
    from charlm.training.records import StepRecord
    from charlm.training.trainer import Trainer

__all__ = ["Progress"]


class Progress(ProgressBar):
    """Shows a training on the console, and hands the signals over to it.

    Args:
        console: the console.
        signals: from the first step on, they stop the training after a step.
        on_start: called with the run's directory, once it exists.
        old: scores the old text, whose loss is shown with the new one.
    """

    def __init__(
        self,
        console: Console,
        signals: Signals,
        on_start: Callable[[Path], None],
        old: OldText | None = None,
    ) -> None:
        super().__init__()
        self._old = old
        self._console = console
        self._signals = signals
        self._on_start = on_start

    @override
    def say(self, text: str) -> None:
        self._console.say(text)

    @override
    def _beside(self) -> str:
        return "" if self._old is None else f"  old {self._old.loss_nats:.4f}"

    @override
    def on_train_start(self, trainer: Trainer) -> None:
        """Write the record, open the bar, and let signals stop the training."""
        if trainer.out_dir is not None:
            self._on_start(trainer.out_dir)
        super().on_train_start(trainer)
        self._signals.stop_gently(trainer.interrupt, self._announce_stop)

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        """Write details if the console is verbose, and move the bar."""
        if self._console.verbose and record.step % trainer.config.log_interval == 0:
            self._console.detail(
                f"step {record.step:,}  train loss {record.loss:.4f}  learning rate "
                f"{record.learning_rate:.3g}  gradient norm {record.grad_norm:.3g}  "
                f"{speed(record.chars_per_second, trainer.train_data.unit)}"
            )
        super().on_step_end(trainer, record)

    @override
    def close(self) -> None:
        """Remove the bar, and leave signals to the command."""
        self._signals.raise_again()
        self._console.bar = None
        super().close()

    @override
    def _new_bar(self, trainer: Trainer) -> Any:
        if not self._console.quiet:
            self._console.bar = super()._new_bar(trainer)
        return self._console.bar

    @override
    def _judge_pace(self, trainer: Trainer, steps: int, minutes: float) -> None:
        if steps < FEW_STEPS:
            self._console.complain(f"warning: {few_steps(steps, minutes, trainer.model)}")

    def _announce_stop(self) -> None:
        self._console.say("stopping after this step, and saving; Ctrl-C ends at once")
