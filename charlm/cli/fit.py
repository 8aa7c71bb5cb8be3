"""The training of `charlm train`: it joins text, model, device and time, and trains.

`charlm.cli.plan` makes the plan, and `charlm.cli.report` the lines for the user. A program may seed torch's
global generator, which the library never does.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from charlm import __version__
from charlm.backends.base import DeviceBackend
from charlm.backends.host import is_under_torchrun
from charlm.backends.registry import get_backend
from charlm.backends.world import World, join
from charlm.cli.baseline import Baseline, Counted, count_within, score_baseline
from charlm.cli.encoded import Encoded
from charlm.cli.mixing import Texts, conclude, is_concluded, time_to_conclude
from charlm.cli.output import Console, Invocation, as_word
from charlm.cli.parent import OldText, Parent, old_text
from charlm.cli.plan import Plan, plan_training
from charlm.cli.progress import Progress
from charlm.cli.reading import Reading
from charlm.cli.report import (
    device_line,
    done_line,
    model_line,
    moved_line,
    next_lines,
    recipe_line,
    result_lines,
    shares_line,
    steps_line,
    stopped_lines,
    text_line,
)
from charlm.cli.rundir import Origin, delete_run, lasting, write_record
from charlm.cli.settings import Settings
from charlm.cli.stored import MOST_EVALUATED
from charlm.data.blocks import BlockDataset
from charlm.data.prepared import PreparedCorpus
from charlm.data.rows import StoredRow
from charlm.errors import CheckpointWriteError, DataError, TrainingInterrupted
from charlm.models.gpt import GPT
from charlm.plain import as_float, as_int
from charlm.runs.directory import SERVICE_FOLDERS
from charlm.text.tokenizer import unit_of
from charlm.training.budget import steps_within
from charlm.training.callbacks import Callback
from charlm.training.config import TrainerConfig
from charlm.training.memory import check_memory
from charlm.training.reduction import check_world
from charlm.training.resume import read_timetable, warn_if_different
from charlm.training.services import TensorBoard, WandB
from charlm.training.timetable import EVALUATION_SHARE, planned_end
from charlm.training.timing import chars_within
from charlm.training.trainer import Trainer

__all__ = ["begin", "resume"]

_LEAST_TEXT = 16  # characters: no other size of the blocks makes a shorter one worth training on


@dataclass(frozen=True)
class _Prepared:
    """The parts of a training."""

    plan: Plan
    model: GPT
    texts: Texts
    backend: DeviceBackend
    world: World


def begin(
    args: argparse.Namespace,
    call: Invocation,
    settings: Settings,
    encoded: Encoded,
    *,
    reading: Reading,
    val_fraction: float,
    train_share: float,
    kept: bool,
    parent: Parent | None = None,
) -> int:
    """Train a new model, or a copy of an existing one, on a text.

    Args:
        args: the options.
        call: of the command.
        settings: of the model and the training.
        encoded: the text.
        reading: how the text was encoded.
        val_fraction: share of the text for validation.
        train_share: share of the text at which it is cut: 1 - `val_fraction`, or that of an earlier run.
        kept: whether the settings are those of an earlier run, so that nothing is chosen.
        parent: the model to begin with; None: a new one.
    """
    console = call.console
    repeats = args.repeat is not None
    timetable = read_timetable(args.repeat) if repeats and settings.training.minutes is not None else None
    run = _prepare(
        args, settings, encoded, val_fraction, train_share, console=console, kept=kept, parent=parent
    )
    old = None if parent is None else _old_text(parent.values, run.texts, console)
    baseline: Baseline | None = None

    def measure() -> tuple[dict[str, object], int | None, float]:
        nonlocal baseline
        training, baseline, aside_chars, concluding = _measure(
            run, console, counts=args.baseline, times=timetable is None, kept=kept
        )
        if old is not None and timetable is None and training.minutes is not None:
            concluding += old.seconds(run.model, training.eval_chars, run.texts.val, run.backend)
        call.signals.check()
        if timetable is None and training.minutes is not None:
            began = call.began - concluding
            training = _within_minutes(training, run, training.minutes, began, console)
        return training.to_dict(), aside_chars, concluding

    measured, aside_chars, concluding = run.world.tell(measure)  # one process looks at the clock
    training = TrainerConfig.from_dict(measured)
    most_steps = run.plan.most_steps
    console.say(steps_line(training, run.texts.train, most_steps, repeats=repeats))
    if args.overwrite and run.world.is_first:
        delete_run(Path(args.out))

    def on_start(path: Path) -> None:
        record = _record(args, encoded, run, training, baseline)
        record |= reading.record()
        if parent is not None:
            record |= {"parent": parent.values, "vocabulary": encoded.tokenizer.to_dict()}
        write_record(path, {**record, "aside_chars": aside_chars})
        if baseline is not None:
            baseline.save(path, console)

    progress = Progress(console, call.signals, on_start, old)
    trainer = Trainer(
        run.model,
        run.texts.train,
        training,
        val_data=run.texts.val,
        tokenizer=run.texts.tokenizer,
        out_dir=args.out,
        device=run.backend,
        callbacks=[*([] if old is None else [old]), progress, *_loggers(args.log_to or ())],
        timetable=timetable,
    )
    enough = most_steps is not None and training.max_steps == most_steps
    trainer.seconds += concluding  # the time after the last step is part of the minutes, too
    values = None if baseline is None else baseline.values
    anew = parent is None
    return _fit(call, trainer, progress, args.out, run.texts, baseline=values, enough=enough, anew=anew)


def resume(
    args: argparse.Namespace,
    call: Invocation,
    origin: Origin,
    encoded: Encoded,
    *,
    sources: Sequence[str],
    end: Mapping[str, object],
) -> int:
    """Resume a run; `end` is its new end, if there is one."""
    console = call.console
    texts = _cut(encoded, origin.block_size, origin.train_share(encoded.n_ids), origin.aside)
    log_to = origin.log_to if args.log_to is None else args.log_to

    def on_start(path: Path) -> None:
        commands = origin.values.get("commands")
        changed = {
            "sources": [lasting(source) for source in sources],
            "encoding": encoded.encoding,
            "training": trainer.config.to_dict(),
            "moved_end": origin.has_moved_end() or bool(end),
            "log_to": list(log_to),
            "versions": _versions(),
            "commands": [*(commands if isinstance(commands, list) else []), _command()],
        }
        write_record(path, {**origin.values, **changed})

    old = None if origin.parent is None else _old_text(origin.parent, texts, console)
    progress = Progress(console, call.signals, on_start, old)
    trainer = Trainer.resume(
        args.out,
        texts.train,
        val_data=texts.val,
        callbacks=[*([] if old is None else [old]), progress, *_loggers(log_to)],
        device=args.device or origin.device,
        max_steps=as_int(end.get("max_steps")),
        minutes=as_float(end.get("minutes")),
    )
    console.say(text_line(sources, encoded, texts))
    world = join(trainer.backend)
    console.say(device_line(trainer.backend, trainer.config, world.size))
    last = trainer.config.max_steps if trainer.timetable is None else trainer.timetable.end
    is_over = last is not None and trainer.step >= last
    if end and not is_over:
        console.say(moved_line(trainer, Path(args.out)))
    console.say(done_line(trainer, end=last))
    if is_over:
        if world.is_first and not is_concluded(args.out, texts, origin.values):  # it was killed just before
            _conclude(call, trainer, args.out, texts)
        return 0
    call.signals.check()
    values = origin.values.get("baseline")
    return _fit(call, trainer, progress, args.out, texts, baseline=values, anew=origin.parent is None)


def _loggers(names: Sequence[str]) -> list[Callback]:
    """Return the loggers that --log-to names; they write into the run's directory."""
    kinds: tuple[type[TensorBoard | WandB], ...] = (TensorBoard, WandB)
    made = dict(zip(SERVICE_FOLDERS, kinds, strict=True))
    return [made[name]() for name in names if name in made]


def _fit(
    call: Invocation,
    trainer: Trainer,
    progress: Progress,
    out: str,
    texts: Texts,
    *,
    baseline: object,
    enough: bool = False,
    anew: bool,
) -> int:
    """Train, show the result, and return the exit code."""
    console, signals, began = call
    world = join(trainer.backend)
    if not world.is_first:  # `progress` is called in the first process alone
        signals.stop_gently(trainer.interrupt, lambda: None)
    trainer.seconds += time.perf_counter() - began  # the time before the first step is part of the minutes
    try:
        trainer.fit()
    except TrainingInterrupted as stopped:
        progress.close()
        console.complain(stopped_lines(trainer, stopped.step, out))
        return signals.exit_code
    except CheckpointWriteError:  # the result is shown all the same
        progress.close()
        if trainer.step:
            console.say(result_lines(trainer, out, baseline, enough=enough, anew=anew))
        raise
    finally:
        progress.close()
    if not world.is_first:
        return 0
    console.say(result_lines(trainer, out, baseline, enough=enough, anew=anew))
    _conclude(call, trainer, out, texts)
    console.say(next_lines(out))
    return 0


def _conclude(call: Invocation, trainer: Trainer, out: str, texts: Texts) -> None:
    again = f"charlm train --resume -o {as_word(out)}"
    words = f"\nstopped before the result was chosen; to choose it: {again}\n"
    with call.signals.ending_at_once(words):
        line = conclude(out, texts, backend=trainer.backend, console=call.console)
    if line is not None:
        call.console.say(f"result  {line}")


def _prepare(
    args: argparse.Namespace,
    settings: Settings,
    encoded: Encoded,
    val_fraction: float,
    train_share: float,
    *,
    console: Console,
    kept: bool,
    parent: Parent | None,
) -> _Prepared:
    """Plan the training, cut the text, build the model, and describe them."""
    backend, tokenizer = get_backend(args.device or "auto"), encoded.tokenizer
    plan = plan_training(
        settings,
        encoded.n_ids,
        tokenizer.vocab_size,
        val_fraction=val_fraction,
        unit=unit_of(tokenizer),
        choose=args.preset is None and not kept and parent is None,
        limits=parent is not None and not kept,
        on_gpu=not backend.is_host,
        aside=args.aside,
        aside_chars=args.aside_chars,
        shares_out=is_under_torchrun() and not kept,
        epochs=args.epochs,
    )
    world = join(backend)
    check_world(plan.training, world.size)
    texts = _cut(encoded, plan.model.block_size, train_share, plan.aside)
    if args.repeat is not None:
        warn_if_different(args.repeat, texts.train, texts.val, backend)
    # Before the model is built, and before an old run is deleted.
    check_memory(
        plan.model,
        plan.training,
        block_size=plan.model.block_size,
        backend=backend,
        evaluates=texts.val is not None,
    )
    torch.manual_seed(plan.training.seed)
    model = GPT(plan.model) if parent is None else parent.copy(plan.model)
    console.say(text_line(args.files or [], encoded, texts))
    if args.aside is None and texts.aside is None:
        console.say("note    the text is too short to set a part of it aside, so the result will be the GPT")
    for remark in encoded.remarks:
        console.say(f"note    {remark}")
    console.say(recipe_line(plan, parent))
    console.say(model_line(model))
    console.say(device_line(backend, plan.training, world.size))
    if plan.shared_out:
        console.say(shares_line(plan.training))
    return _Prepared(plan, model, texts, backend, world)


def _old_text(parent: Mapping[str, object], texts: Texts, console: Console) -> OldText | None:
    data = old_text(parent, texts.tokenizer, texts.whole.block_size, console)
    return None if data is None else OldText(data, str(parent.get("path")), console)


def _cut(encoded: Encoded, block_size: int, train_share: float, aside: int) -> Texts:
    try:
        ids = StoredRow(encoded.ids) if isinstance(encoded.ids, PreparedCorpus) else encoded.ids
        whole = BlockDataset(ids, block_size, tokenizer=encoded.tokenizer, documents=encoded.documents)
        val: BlockDataset | None = None
        if train_share < 1:
            whole, val = whole.split(train_share)
        train, decisive = whole.set_aside(aside) if aside else (whole, None)
        return Texts(whole, train, decisive, val, encoded.tokenizer)
    except DataError as error:
        if (N := encoded.n_ids) < _LEAST_TEXT:
            number = f"{N} {unit_of(encoded.tokenizer)}{'s' * (N != 1)}"
            raise DataError(
                f"the text has only {number}, too few to learn from; give a longer one"
            ) from error
        without = ", or --val-fraction 0 to train on all of the text" if train_share < 1 else ""
        raise DataError(f"{error} On the command line: --block-size N{without}.") from error


def _measure(
    run: _Prepared, console: Console, *, counts: bool, times: bool, kept: bool
) -> tuple[TrainerConfig, Baseline | None, int | None, float]:
    """Count and score the n-gram model, and time the evaluations.

    Args:
        run: the parts of the training.
        console: shows the n-gram model.
        counts: whether an n-gram model is counted.
        times: whether evaluations are timed; not in a repetition.
        kept: whether another run has decided how much of the text is scored, if evaluations are not timed.

    Returns:
        The settings of the training with its `eval_chars`; the n-gram model; how many characters of the
        pieces that are set aside will be read (None: all); and the seconds to decide the result.
    """
    counted, training, texts = None, run.plan.training, run.texts
    aside_chars, concluding = run.plan.aside_chars, 0.0
    if counts:
        counted = count_within(texts.whole, texts.tokenizer.vocab_size, run.plan.counting_seconds)
    if times:
        training = training.replace(eval_chars=_eval_chars(run, counted, kept=kept))
        if counted is not None and run.plan.seconds is not None:
            aside_chars, concluding = time_to_conclude(
                texts, run.model, counted, training.eval_chars, seconds=run.plan.seconds, backend=run.backend
            )
    if counted is None:
        return training, None, aside_chars, concluding
    baseline = score_baseline(counted, texts.whole, texts.val, texts.tokenizer, training.eval_chars)
    baseline.show(console)
    return training, baseline, aside_chars, concluding


def _eval_chars(run: _Prepared, counted: Counted | None, *, kept: bool) -> int | None:
    """Return how many validation characters each evaluation scores, for both models; None: all."""
    limits, val = run.plan.scoring_seconds, run.texts.val
    if limits is None or val is None:
        asked = run.plan.training.eval_chars
        is_long = asked is None and val is not None and val.n_ids > MOST_EVALUATED and not kept
        return MOST_EVALUATED if is_long else asked
    run.backend.prepare(run.model)
    fitting = [chars_within(limits[0] * run.world.size, run.model, val, backend=run.backend)[0]]
    if counted is not None:
        fitting.append(chars_within(limits[1], counted.model, val, backend=DeviceBackend("cpu"))[0])
    return min((chars for chars in fitting if chars is not None), default=None)


def _within_minutes(
    training: TrainerConfig, run: _Prepared, minutes: float, began: float, console: Console
) -> TrainerConfig:
    """Raise if the time is over; give a schedule that needs its end beforehand an estimate of it."""
    spent = time.perf_counter() - began
    left = 60 * minutes - spent
    if left <= 0:
        raise DataError(
            f"--minutes {minutes:g} is over before the training can begin: loading took {spent:.0f} seconds. "
            "Give it more."
        )
    if not planned_end(training):
        return training
    own = training.replace(accumulate=training.accumulate // run.world.size)
    estimate = steps_within(
        (1 - EVALUATION_SHARE) * left, run.model, run.texts.train, own, device=run.backend
    )
    steps = min(estimate.steps, training.max_steps)
    console.say(
        f"note    {training.schedule} needs its end beforehand: it falls over {steps:,} steps, an estimate "
        f"({estimate.fewest:,} to {estimate.most:,}), and the clock stops it; wsd needs none"
    )
    return training.replace(max_steps=steps)


def _record(
    args: argparse.Namespace,
    encoded: Encoded,
    run: _Prepared,
    training: TrainerConfig,
    baseline: Baseline | None,
) -> dict[str, object]:
    """Return the content of train.json."""
    return {
        "sources": [lasting(source) for source in args.files],
        "encoding": encoded.encoding,
        "prepared": encoded.is_prepared,
        "val_fraction": run.plan.val_fraction,
        "train_ids": run.texts.whole.n_ids,
        "aside": run.plan.aside,
        "tokenizer": encoded.kind,
        "preset": run.plan.preset,
        "device": args.device or "auto",
        "log_to": list(args.log_to or ()),
        "epochs": args.epochs,
        "model": run.plan.model.to_dict(),
        "training": training.to_dict(),
        "versions": _versions(),
        "commands": [_command()],
        "moved_end": False,
        "baseline": None if baseline is None else baseline.values,
    }


def _versions() -> dict[str, str]:
    return {
        "charlm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def _command() -> str:
    return shlex.join(["charlm", *sys.argv[1:]]).encode("utf-8", "backslashreplace").decode()
