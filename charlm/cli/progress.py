"""What a training shows while it runs: a bar where a terminal can show one, else a line per evaluation.

The bar is tqdm's, if tqdm is installed. Losses are read from the device only where the trainer logs them, and
a few times per second for the bar, so that showing them costs nothing.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from charlm.cli.baseline import BITS, scored_part
from charlm.cli.output import Console, escaped
from charlm.cli.signals import Signals
from charlm.cli.terminal import bar_class, wants_bar
from charlm.cli.verdict import FEW_STEPS, few_steps
from charlm.data.rows import StoredRow
from charlm.text.tokenizer import Unit
from charlm.training.callbacks import Callback
from charlm.training.timetable import evaluation_interval_seconds

if TYPE_CHECKING:
    from charlm.cli.parent import OldText
    from charlm.training.records import EvalRecord, SampleRecord, StepRecord, TrainResult
    from charlm.training.trainer import Trainer

__all__ = ["Progress", "clock", "speed"]

_BAR_SECONDS = 0.25  # between two losses beside the bar
_PACE_SECONDS = 1.0  # of steps, before their number is told
_COUNTS = "{n_fmt}/{total_fmt} {elapsed}<{remaining}"


def clock(seconds: float) -> str:
    """Return a duration as 1:02 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def speed(per_second: float, unit: Unit) -> str:
    """Return a speed in three digits, such as 81.3k chars/s."""
    name = "bytes/s" if unit == "byte" else "chars/s"
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if per_second >= 0.9995 * size:
            return f"{per_second / size:.3g}{letter} {name}"
    return f"{per_second:.3g} {name}"


class Progress(Callback):
    """Shows a training on the console, and hands the signals over to it.

    Args:
        console: where to.
        signals: from the first step on, they stop the training gently.
        on_start: called with the run's directory, once it exists.
        old: scores another text, whose loss is shown beside the new one.
    """

    def __init__(
        self,
        console: Console,
        signals: Signals,
        on_start: Callable[[Path], None],
        old: OldText | None = None,
    ) -> None:
        self._old = old
        self._console = console
        self._signals = signals
        self._on_start = on_start
        self._losses: list[float] = []  # since the last evaluation
        self._seen = (0, 0.0)  # characters and seconds at the last line
        self._val: list[str] = []
        self._drawn_at = 0.0
        self._shown: int | None = None  # the last step that has a line
        self._told_pace = False
        self._rate = 0.0  # characters per second, smoothed
        self._started = 0.0  # seconds of the run, at the first step of this process
        self._last: StepRecord | None = None

    @override
    def on_train_start(self, trainer: Trainer) -> None:
        """Write the record, open the bar, and let signals stop the training."""
        config = trainer.config
        if trainer.out_dir is not None:
            self._on_start(trainer.out_dir)
        self._seen = (trainer.chars_seen, trainer.seconds)
        if trainer.last is not None:
            self._val = [f"val {trainer.last.result.loss_nats:.4f}"]
        if wants_bar() and not self._console.quiet:
            self._console.bar = _new_bar(trainer.step, trainer.expected_steps)
        chars = config.eval_chars if trainer.timetable is None else trainer.timetable.eval_chars
        val = trainer.val_data
        if chars is not None and val is not None and chars < val.n_targets:
            on_disk = isinstance(val.row, StoredRow)
            self._console.say(
                f"eval    each scores about {chars:,} of the {val.n_ids:,} {val.unit}s "
                "for validation, spread over them" + ("" if on_disk else "; charlm eval scores all")
            )
        self._started = trainer.seconds
        self._signals.stop_gently(trainer.interrupt, self._announce_stop)

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        """Collect the loss where it is logged; move the bar."""
        config, bar, unit = trainer.config, self._console.bar, trainer.train_data.unit
        now = time.monotonic()
        self._last = record
        interval = config.eval_interval
        due = interval is not None and record.step % interval == 0
        if record.step % config.log_interval == 0 or (due and not self._losses):  # or the line's only loss
            self._losses.append(record.loss)
            if self._console.verbose:
                self._console.detail(
                    f"step {record.step:,}  train loss {record.loss:.4f}  learning rate "
                    f"{record.learning_rate:.3g}  gradient norm {record.grad_norm:.3g}  "
                    f"{speed(record.chars_per_second, unit)}"
                )
        if bar is not None:
            if now - self._drawn_at >= _BAR_SECONDS or record.step == bar.total:
                self._drawn_at = now
                rate = record.chars_per_second
                self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
                facts = [f"loss {record.loss:.4f}", *self._val, speed(self._rate, unit)]
                bar.total = trainer.expected_steps
                bar.set_postfix_str(_fitting(bar, facts), refresh=False)
            bar.update(1)
        if config.minutes is not None:
            self._tell_pace(trainer, config.minutes)
            if interval is None:
                every = evaluation_interval_seconds(60 * config.minutes)
                due = trainer.seconds // every > self._seen[1] // every
        if trainer.val_data is None and due:
            self._line(trainer, record.step, "")

    @override
    def on_evaluate(self, trainer: Trainer, evaluation: EvalRecord) -> None:
        """Write a line."""
        result, unit = evaluation.result, trainer.train_data.unit
        self._val = [f"val {result.loss_nats:.4f}"]
        self._line(
            trainer,
            evaluation.step,
            f"  val loss {result.loss_nats:.4f} nats = {result.bits_per_char:.4f} {BITS[unit]}"
            + scored_part(result, unit)
            + ("" if evaluation.is_best else " (not the best)")
            + ("" if self._old is None else f"  old {self._old.loss_nats:.4f}"),
        )

    @override
    def on_sample(self, trainer: Trainer, sample: SampleRecord) -> None:
        """Show the sample, indented."""
        text = escaped(sample.text).replace("\n", "\n  | ")
        self._console.say(f"sample at step {sample.step:,}:\n  | {text}")

    @override
    def on_train_end(self, trainer: Trainer, result: TrainResult) -> None:
        """Take the bar away."""
        if trainer.val_data is None and self._shown != trainer.step:
            self._line(trainer, trainer.step, "")
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, and signals to the command."""
        self._signals.raise_again()
        bar, self._console.bar = self._console.bar, None
        if bar is not None:
            bar.close()

    def _tell_pace(self, trainer: Trainer, minutes: float) -> None:
        """Say once, as soon as it can be told, how many steps will be made, and whether that is enough."""
        steps, early = trainer.expected_steps, trainer.seconds - self._started < _PACE_SECONDS
        timetable = trainer.timetable
        if self._told_pace or steps is None or early or timetable is None or timetable.end is not None:
            return
        self._told_pace = True
        enough = steps == trainer.config.max_steps
        number = (
            f"{steps:,} steps in all, in less time" if enough else f"about {_rounded(steps):,} steps in all"
        )
        self._console.say(f"pace    {number}")
        if steps < FEW_STEPS and not enough:
            self._console.complain(f"warning: {few_steps(steps, minutes)}")

    def _line(self, trainer: Trainer, step: int, validation: str) -> None:
        chars, seconds = trainer.chars_seen - self._seen[0], trainer.seconds - self._seen[1]
        self._seen = (trainer.chars_seen, trainer.seconds)
        self._shown = step
        if not self._losses and self._last is not None:
            self._losses.append(self._last.loss)
        loss = f"  train loss {sum(self._losses) / len(self._losses):.4f}" if self._losses else ""
        self._losses.clear()
        width = len(f"{trainer.expected_steps or step:,}")
        self._console.say(
            f"step {step:{width},}{loss}{validation}  "
            f"{speed(chars / max(seconds, 1e-9), trainer.train_data.unit)}  {clock(trainer.seconds)}"
        )

    def _announce_stop(self) -> None:
        self._console.say("stopping after this step, and saving; Ctrl-C ends at once")


def _rounded(steps: int) -> int:
    """Return an estimate with two digits that count."""
    return int(float(f"{steps:.2g}"))


def _new_bar(done: int, total: int | None) -> Any:
    """Return tqdm's bar, or None where tqdm is not installed."""
    tqdm = bar_class()
    if tqdm is None:
        return None
    return tqdm(
        initial=done,
        total=total,
        unit="step",
        ascii=True,  # consoles of all kinds
        dynamic_ncols=True,
        leave=False,
        file=sys.stderr,
        bar_format=_COUNTS + "{postfix} |{bar}|",  # the bar last: in a narrow terminal it is the first to go
    )


def _fitting(bar: Any, facts: Sequence[str]) -> str:
    """Return as many facts, from the first on, as fit into the line: half a number would mislead."""
    known = bar.format_dict
    room = (known["ncols"] or math.inf) - len(bar.format_meter(**{**known, "bar_format": _COUNTS}))
    fits = [n for n in range(len(facts) + 1) if len(", ".join(["", *facts[:n]])) <= room]
    return ", ".join(facts[: max(fits, default=0)])
