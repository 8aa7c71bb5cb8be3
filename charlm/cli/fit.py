"""The training itself: text, model, device and budget put together, and what is said about them.

Being a program, it may do what the library never does: seed torch's global generator.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from charlm import __version__
from charlm.backends.base import DeviceBackend
from charlm.backends.registry import get_backend
from charlm.cli.baseline import COUNTING_SHARE, compared, count_within, score_baseline, scored_part
from charlm.cli.encoded import Encoded
from charlm.cli.output import Console, aligned, escaped
from charlm.cli.progress import Progress, clock
from charlm.cli.rundir import Origin, delete_run, lasting, write_record
from charlm.cli.settings import Settings
from charlm.cli.signals import Signals
from charlm.cli.verdict import UNLIKE, judged
from charlm.data.blocks import BlockDataset
from charlm.errors import DataError, TrainingInterrupted, quoted
from charlm.models.config import GPTConfig, PresetName
from charlm.models.gpt import GPT
from charlm.models.ngram import NGramLM
from charlm.training.budget import steps_within
from charlm.training.config import MOST_STEPS, TrainerConfig
from charlm.training.memory import check_memory
from charlm.training.recipes import recommend
from charlm.training.records import TrainResult
from charlm.training.resume import read_timetable, warn_if_different
from charlm.training.timetable import EVALUATION_SHARE, LONGEST_EVALUATION, planned_end
from charlm.training.timing import chars_within
from charlm.training.trainer import Trainer

__all__ = ["begin", "resume"]

_SCORING_SHARE = 0.02  # of a run's minutes, for scoring with the n-gram model


def begin(
    args: argparse.Namespace,
    gathered: Callable[[PresetName, Mapping[str, object]], Settings],
    encoded: Encoded,
    *,
    minutes: float | None,
    val_fraction: float,
    console: Console,
    signals: Signals,
    began: float,
) -> int:
    """Train a new model; `gathered` returns the settings for a preset and what of it is to differ."""
    tokenizer, N = encoded.tokenizer, len(encoded.ids)
    timetable = read_timetable(args.repeat) if args.repeat is not None and minutes is not None else None
    backend = get_backend(args.device or "auto")
    advice = None
    if args.preset is None and args.repeat is None:
        cut = int((1 - val_fraction) * N)
        advice = recommend(
            cut, N - cut if val_fraction else None, minutes=minutes, on_gpu=backend.device.type != "cpu"
        )
    settings = gathered(args.preset, {}) if advice is None else gathered(advice.preset, advice.changes)
    config = GPTConfig.from_dict({**settings.model, "vocab_size": tokenizer.vocab_size})
    training = settings.training
    train, val = _split(encoded, config.block_size, val_fraction)
    if args.repeat is not None:
        warn_if_different(args.repeat, train, val, backend)
    check_memory(  # before the model is built, and before an old run is deleted
        config,
        training,
        block_size=config.block_size,
        backend=backend,
        precision=backend.precision(training.precision),
        evaluates=val is not None,
    )
    torch.manual_seed(training.seed)
    model = GPT(config)
    console.say(_described_text(args.files or [], encoded, train, val))
    console.say(
        f"recipe  {settings.preset}, " + ("as given" if advice is None else "; ".join(advice.reasons))
    )
    console.say(_described_model(model))
    console.say(_described_device(backend, training))
    most = None
    if advice is not None and "max_steps" not in settings.given:
        most = max(1, advice.most_chars // (training.batch_size * training.accumulate * config.block_size))
    if args.repeat is None:
        training = _planned(training, most, given=settings.given)
    counted = None
    if args.baseline:
        seconds = None if minutes is None else COUNTING_SHARE * 60 * minutes
        counted = count_within(train, tokenizer.vocab_size, seconds)
    if timetable is None and minutes is not None and val is not None and training.eval_chars is None:
        chars = _eval_chars(minutes, model, None if counted is None else counted.model, val, backend)
        training = training.replace(eval_chars=chars)
    baseline = None
    if counted is not None:
        baseline = score_baseline(counted, train, val, tokenizer, console, eval_chars=training.eval_chars)
        if baseline.unlike:
            console.complain(UNLIKE)
    signals.check()
    if training.minutes is not None and timetable is None:
        training = _estimated(training, model, train, device=backend, began=began, console=console)
    console.say(_described_steps(training, train, repeats=args.repeat is not None, most=most))
    if args.overwrite:
        delete_run(Path(args.out))

    def record(path: Path) -> None:
        values = {
            "sources": [lasting(source) for source in args.files],
            "val_fraction": float(val_fraction),
            "tokenizer": encoded.kind,
            "preset": settings.preset,
            "device": args.device or "auto",
            "model": config.to_dict(),
            "training": training.to_dict(),
            "versions": _versions(),
            "commands": [_command()],
            "baseline": None if baseline is None else baseline.values,
        }
        write_record(path, values)
        if baseline is not None:
            baseline.save(path, console)

    progress = Progress(console, signals, record)
    trainer = Trainer(
        model,
        train,
        training,
        val_data=val,
        tokenizer=tokenizer,
        out_dir=args.out,
        device=backend,
        callbacks=[progress],
        timetable=timetable,
    )
    found = None if baseline is None else baseline.values
    enough = most is not None and training.max_steps == most
    return _fit(trainer, progress, args.out, console, signals, baseline=found, began=began, enough=enough)


def resume(
    args: argparse.Namespace,
    origin: Origin,
    encoded: Encoded,
    *,
    sources: Sequence[str],
    max_steps: int | None,
    console: Console,
    signals: Signals,
    began: float,
) -> int:
    """Go on with a run."""
    train, val = _split(encoded, origin.block_size, origin.val_fraction)

    def record(path: Path) -> None:
        commands = origin.values.get("commands")
        changed = {
            "sources": [lasting(source) for source in sources],
            "training": trainer.config.to_dict(),
            "moved_end": bool(origin.values.get("moved_end")) or max_steps is not None,
            "versions": _versions(),
            "commands": [*(commands if isinstance(commands, list) else []), _command()],
        }
        write_record(path, {**origin.values, **changed})

    progress = Progress(console, signals, record)
    trainer = Trainer.resume(
        args.out,
        train,
        val_data=val,
        callbacks=[progress],
        device=args.device or origin.device,
        max_steps=max_steps,
    )
    console.say(_described_text(sources, encoded, train, val))
    console.say(f"device  {trainer.backend.name}, {trainer.precision}")
    config, timetable = trainer.config, trainer.timetable
    end = config.max_steps if timetable is None else timetable.end
    if end is not None and trainer.step >= end:
        console.say(f"steps   all {end:,} are done; --max-steps N with a larger N goes on")
        return 0
    done = f"steps   {trainer.step:,}" + (f" of {end:,}" if timetable is None else "") + " are done"
    if config.minutes is not None:
        done += f", {clock(trainer.seconds)} of {config.minutes:g} min are used"
    console.say(done)
    signals.check()
    found = origin.values.get("baseline")
    return _fit(trainer, progress, args.out, console, signals, baseline=found, began=began)


def _fit(
    trainer: Trainer,
    progress: Progress,
    out: str,
    console: Console,
    signals: Signals,
    *,
    baseline: object,
    began: float,
    enough: bool = False,
) -> int:
    trainer.seconds += time.perf_counter() - began  # what came before the first step is part of the minutes
    try:
        result = trainer.fit()
    except TrainingInterrupted as stopped:
        progress.close()
        expected, timetable = trainer.expected_steps, trainer.timetable
        about = "about " if timetable is not None and timetable.end != expected else ""
        of = "" if expected is None else f" of {about}{expected:,}"
        console.complain(
            f"stopped after step {stopped.step:,}{of}; all is saved in "
            f"{quoted(out)}\nTo go on: charlm train --resume -o {shlex.quote(out)}"
        )
        return signals.exit_code
    finally:
        progress.close()
    rows = [["done", f"{result.steps:,} steps in {clock(result.seconds)}" + _why(result, enough=enough)]]
    verdict = None
    if result.best is not None and result.final is not None:
        best, final = result.best, result.final
        rows.append(
            [
                "loss",
                f"best {best.loss_nats:.4f} nats ({best.bits_per_char:.4f} bits/char) at step "
                f"{result.best_step:,}, final {final.loss_nats:.4f}{scored_part(best)}",
            ]
        )
        against = compared(baseline, best)
        rows += [] if against is None else [["n-gram", against]]
        verdict = judged(trainer, result, baseline)
    rows += [] if verdict is None else [["note", verdict]]
    rows += [["run", out], ["next", f"charlm generate {shlex.quote(out)}"]]
    console.say(aligned([name.ljust(6), value] for name, value in rows).rstrip("\n"))
    return 0


_REASONS = {
    "max_seconds": ", as max_seconds is over",
    "patience": ", as the validation loss no longer falls",
}


def _why(result: TrainResult, *, enough: bool) -> str:
    """Return why a run has ended, where that is not simply what was asked for."""
    if enough and result.reason == "max_steps":
        return ", as many as so short a text is good for"
    return _REASONS.get(result.reason, "")


def _planned(training: TrainerConfig, most: int | None, *, given: frozenset[str]) -> TrainerConfig:
    """Return the settings with as many steps as the text and the time are good for."""
    changes: dict[str, object] = {}
    if training.minutes is not None:
        if "max_steps" not in given:
            changes["max_steps"] = most or MOST_STEPS
        if "eval_interval" not in given:
            changes["eval_interval"] = None
    elif most is not None and most < training.max_steps:
        changes["max_steps"] = most
    return training.replace(**changes)


def _eval_chars(
    minutes: float, model: GPT, ngram: NGramLM | None, val: BlockDataset, backend: DeviceBackend
) -> int:
    """Return how much of the validation text is scored in each evaluation, by both models."""
    seconds = 60 * minutes
    backend.prepare(model)
    chars = [chars_within(LONGEST_EVALUATION * seconds, model, val, backend=backend)[0]]
    if ngram is not None:
        chars.append(chars_within(_SCORING_SHARE * seconds, ngram, val, backend=DeviceBackend("cpu"))[0])
    return min([len(val.ids) - 1, *(n for n in chars if n is not None)])


def _estimated(
    training: TrainerConfig,
    model: GPT,
    train: BlockDataset,
    *,
    device: DeviceBackend,
    began: float,
    console: Console,
) -> TrainerConfig:
    """Refuse a time that is over, and give a schedule that needs its end beforehand an estimate of it."""
    minutes = training.minutes or 0.0
    left = 60 * minutes - (time.perf_counter() - began)
    if left <= 0:
        raise DataError(
            f"--minutes {minutes:g} is over before the training can begin: loading took "
            f"{time.perf_counter() - began:.0f} seconds. Give it more."
        )
    if not planned_end(training):
        return training
    estimate = steps_within((1 - EVALUATION_SHARE) * left, model, train, training, device=device)
    steps = min(estimate.steps, training.max_steps)
    console.say(
        f"note    {training.schedule} needs its end beforehand: it falls over {steps:,} steps, an estimate "
        f"({estimate.fewest:,} to {estimate.most:,}), and the clock stops it; wsd needs none"
    )
    return training.replace(max_steps=steps)


def _split(
    encoded: Encoded, block_size: int, val_fraction: float
) -> tuple[BlockDataset, BlockDataset | None]:
    try:
        data = BlockDataset(encoded.ids, block_size)
        return data.split(1 - val_fraction) if val_fraction else (data, None)
    except DataError as error:
        raise DataError(
            f"{error} On the command line: --block-size N, or --val-fraction 0 to train on all of the text."
        ) from error


def _described_text(
    sources: Sequence[str], encoded: Encoded, train: BlockDataset, val: BlockDataset | None
) -> str:
    names = escaped(", ".join("standard input" if s == "-" else s for s in sources[:3]))
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    unit = "bytes" if encoded.kind == "byte" else "characters"
    kept = f"{len(val.ids):,} for validation" if val is not None else "none for validation"
    return (
        f"text    {names}{more}: {encoded.n_chars:,} characters, vocabulary "
        f"{encoded.tokenizer.vocab_size:,}; "
        f"{len(train.ids):,} {unit} to train on, {kept}"
    )


def _described_model(model: GPT) -> str:
    config = model.config
    return (
        f"model   {config.n_layer} layers of {config.n_head} heads, width "
        f"{config.n_embd}, block {config.block_size}; {model.num_parameters():,} parameters"
    )


def _described_device(backend: DeviceBackend, training: TrainerConfig) -> str:
    count = torch.get_num_threads()
    threads = f" with {count} thread{'s' * (count > 1)}" if backend.name == "cpu" else ""
    return f"device  {backend.name}{threads}, {backend.precision(training.precision)}"


def _described_steps(training: TrainerConfig, train: BlockDataset, *, repeats: bool, most: int | None) -> str:
    each = f"; each {training.batch_size * training.accumulate} blocks of {train.block_size} characters"
    enough = ", which is enough for so short a text" if training.max_steps == most else ""
    if repeats:
        return f"steps   those of the run that is repeated{each}"
    if training.minutes is None:
        return f"steps   {training.max_steps:,}{enough}{each}"
    limit = f", at most {training.max_steps:,}" if training.max_steps not in {most, MOST_STEPS} else ""
    return f"steps   as many as fit into {training.minutes:g} min{limit}{each}"


def _versions() -> dict[str, str]:
    return {
        "charlm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def _command() -> str:
    return shlex.join(["charlm", *sys.argv[1:]]).encode("utf-8", "backslashreplace").decode()
