"""`ProgressBar`: shows the progress of a training in a terminal, a notebook or a file.

It writes a line for each evaluation. In a terminal or notebook with tqdm, it also shows a bar. Losses are
read from the device only when the trainer logs them, and a few times per second for the bar, so showing them
costs nothing. The command line shows the same, and overrides where it goes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from charlm.data.rows import StoredRow
from charlm.evaluation.evaluate import EvalResult
from charlm.terminal import bar_class, escaped, in_notebook, wants_bar
from charlm.text.tokenizer import Unit
from charlm.training.callbacks import Callback
from charlm.training.timetable import evaluation_interval_seconds

if TYPE_CHECKING:
    from charlm.training.records import EvalRecord, SampleRecord, StepRecord, TrainResult
    from charlm.training.trainer import Trainer

__all__ = ["BITS", "ProgressBar", "clock", "scored_part", "speed"]

BITS: Mapping[Unit, str] = {"character": "bits/char", "byte": "bits/byte"}
"""The unit of a loss in bits."""

_BAR_SECONDS = 0.25  # between two updates of the bar
_PACE_SECONDS = 1.0  # of steps, before their number is estimated
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


def scored_part(result: EvalResult, unit: Unit) -> str:
    """Return the part of a text on which a loss was measured, in words; empty: the whole text."""
    if not result.n_left_out:
        return ""
    return f" on {result.n_chars:,} of {result.n_chars + result.n_left_out:,} {unit}s"


class ProgressBar(Callback):
    """Shows the progress of a training: a bar with speed and losses, and a line for each evaluation.

    It writes to standard error, or below the cell of a notebook. Without tqdm, and where a bar cannot move,
    it writes the lines alone.

    Example:
        >>> import torch
        >>> from charlm import BigramLM, BlockDataset, Trainer
        >>> data = BlockDataset(torch.arange(99) % 3, block_size=8)
        >>> trainer = Trainer(BigramLM(3), data, callbacks=[ProgressBar()], device="cpu")
    """

    def __init__(self) -> None:
        self._losses: list[float] = []  # since the last evaluation
        self._seen = (0, 0.0)  # characters and seconds at the last line
        self._val: list[str] = []
        self._drawn_at = 0.0
        self._shown: int | None = None  # the last step that has a line
        self._told_pace = False
        self._rate = 0.0  # characters per second, smoothed
        self._started = 0.0  # seconds of the run, at the first step of this process
        self._last: StepRecord | None = None
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Write a line, above the bar if there is one."""
        stream = sys.stdout if in_notebook() else sys.stderr
        if self._bar is not None:
            self._bar.write(text, file=stream)
        else:
            stream.write(f"{text}\n")
            stream.flush()

    @override
    def on_train_start(self, trainer: Trainer) -> None:
        """Open the bar."""
        config = trainer.config
        self._seen = (trainer.chars_seen, trainer.seconds)
        self._shown, self._losses = None, []
        if trainer.last is not None:
            self._val = [f"val {trainer.last.result.loss_nats:.4f}"]
        self._bar = self._new_bar(trainer)
        chars = config.eval_chars if trainer.timetable is None else trainer.timetable.eval_chars
        val = trainer.val_data
        if chars is not None and val is not None and chars < val.n_targets:
            on_disk = isinstance(val.row, StoredRow)
            self.say(
                f"eval    each scores about {chars:,} of the {val.n_ids:,} {val.unit}s "
                "for validation, spread over them" + ("" if on_disk else "; charlm eval scores all")
            )
        self._started = trainer.seconds

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        """Collect the loss if it is logged, and move the bar."""
        config, bar, unit = trainer.config, self._bar, trainer.train_data.unit
        now = time.monotonic()
        self._last = record
        interval = config.eval_interval
        due = interval is not None and record.step % interval == 0
        if record.step % config.log_interval == 0 or (due and not self._losses):  # a line needs one loss
            self._losses.append(record.loss)
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
            + self._beside(),
        )

    def _beside(self) -> str:
        """Return an addition to the line of an evaluation."""
        return ""

    @override
    def on_sample(self, trainer: Trainer, sample: SampleRecord) -> None:
        """Show the sample, indented."""
        text = escaped(sample.text).replace("\n", "\n  | ")
        self.say(f"sample at step {sample.step:,}:\n  | {text}")

    @override
    def on_train_end(self, trainer: Trainer, result: TrainResult) -> None:
        """Write the last line, unless an evaluation did."""
        if trainer.val_data is None and self._shown != trainer.step:
            self._line(trainer, trainer.step, "")

    @override
    def on_close(self, trainer: Trainer) -> None:
        """Remove the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar, if there is one."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def __getstate__(self) -> dict[str, object]:
        """Leave out the bar."""
        return {**self.__dict__, "_bar": None}

    def _new_bar(self, trainer: Trainer) -> Any:
        """Return tqdm's bar, or None if there is none."""
        tqdm = bar_class() if in_notebook() or wants_bar() else None
        if tqdm is None:
            return None
        return tqdm(
            initial=trainer.step,
            total=trainer.expected_steps,
            unit="step",
            ascii=True,  # for consoles of all kinds
            dynamic_ncols=True,
            leave=False,
            file=sys.stdout if in_notebook() else sys.stderr,
            bar_format=_COUNTS + "{postfix} |{bar}|",  # in a narrow terminal, the bar disappears first
        )

    def _tell_pace(self, trainer: Trainer, minutes: float) -> None:
        """Write once, as soon as it can be estimated, the number of steps."""
        steps, early = trainer.expected_steps, trainer.seconds - self._started < _PACE_SECONDS
        timetable = trainer.timetable
        if self._told_pace or steps is None or early or timetable is None or timetable.end is not None:
            return
        self._told_pace = True
        is_last = steps == trainer.config.max_steps
        number = (
            f"{steps:,} steps in all, in less time" if is_last else f"about {_rounded(steps):,} steps in all"
        )
        self.say(f"pace    {number}")
        if not is_last:
            self._judge_pace(trainer, steps, minutes)

    def _judge_pace(self, trainer: Trainer, steps: int, minutes: float) -> None:
        """Comment on the number of steps; for subclasses."""

    def _line(self, trainer: Trainer, step: int, validation: str) -> None:
        chars, seconds = trainer.chars_seen - self._seen[0], trainer.seconds - self._seen[1]
        self._seen = (trainer.chars_seen, trainer.seconds)
        self._shown = step
        if not self._losses and self._last is not None:
            self._losses.append(self._last.loss)
        loss = f"  train loss {sum(self._losses) / len(self._losses):.4f}" if self._losses else ""
        self._losses.clear()
        width = len(f"{trainer.expected_steps or step:,}")
        self.say(
            f"step {step:{width},}{loss}{validation}  "
            f"{speed(chars / max(seconds, 1e-9), trainer.train_data.unit)}  {clock(trainer.seconds)}"
        )


def _rounded(steps: int) -> int:
    """Return an estimate with two significant digits."""
    return int(float(f"{steps:.2g}"))


def _fitting(bar: Any, facts: Sequence[str]) -> str:
    """Return the first facts, as many as fit into the line: half a number would mislead."""
    values = bar.format_dict
    if not isinstance(values["ncols"], int):  # unknown, or in a notebook
        return ", ".join(facts)
    room = values["ncols"] - len(bar.format_meter(**{**values, "bar_format": _COUNTS}))
    fits = [n for n in range(len(facts) + 1) if len(", ".join(["", *facts[:n]])) <= room]
    return ", ".join(facts[: max(fits, default=0)])
