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
from charlm.cli.baseline import compared, count_baseline
from charlm.cli.output import Console, aligned
from charlm.cli.progress import Progress, clock
from charlm.cli.rundir import Origin, delete_run, lasting, write_record
from charlm.cli.settings import Settings
from charlm.cli.signals import Signals
from charlm.data.blocks import BlockDataset
from charlm.errors import DataError, TrainingInterrupted, quoted
from charlm.models.config import GPTConfig, PresetName
from charlm.models.gpt import GPT
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from charlm.training.budget import steps_within
from charlm.training.config import TrainerConfig
from charlm.training.memory import check_memory
from charlm.training.recipes import recommend
from charlm.training.trainer import Trainer

__all__ = ["begin", "resume"]

_EVALUATIONS = 5  # of a run with a budget in minutes
_RESERVE = 0.5, 0.02  # of such a budget, for saving and for ending: seconds, and a share


def begin(
    args: argparse.Namespace,
    gathered: Callable[[PresetName, Mapping[str, object]], Settings],
    text: str,
    *,
    val_fraction: float,
    console: Console,
    signals: Signals,
    began: float,
) -> int:
    """Train a new model; `gathered` returns the settings for a preset and what of it is to differ."""
    kind = args.tokenizer or "char"
    tokenizer = _tokenizer(kind, text)
    backend = get_backend(args.device or "auto")
    advice = None
    if args.preset is None:
        length = len(text.encode()) if kind == "byte" else len(text)
        advice = recommend(
            int((1 - val_fraction) * length),
            length - int((1 - val_fraction) * length) if val_fraction else None,
            minutes=args.minutes,
            on_gpu=backend.device.type != "cpu",
        )
    settings = gathered(args.preset, {}) if advice is None else gathered(advice.preset, advice.changes)
    config = GPTConfig.from_dict({**settings.model, "vocab_size": tokenizer.vocab_size})
    training = settings.training
    precision = backend.precision(training.precision)
    train, val = _split(text, tokenizer, config.block_size, val_fraction)
    check_memory(  # before the model is built, and before an old run is deleted
        config,
        training,
        block_size=config.block_size,
        backend=backend,
        precision=precision,
        evaluates=val is not None,
    )
    torch.manual_seed(training.seed)
    model = GPT(config)
    console.say(_described_text(args.files, text, tokenizer, train, val))
    console.say(
        f"recipe  {settings.preset}, " + ("as given" if advice is None else "; ".join(advice.reasons))
    )
    console.say(
        f"model   {config.n_layer} layers of {config.n_head} heads, width "
        f"{config.n_embd}, block {config.block_size}; {model.num_parameters():,} parameters"
    )
    count = torch.get_num_threads()
    threads = f" with {count} thread{'s' * (count > 1)}" if backend.name == "cpu" else ""
    console.say(f"device  {backend.name}{threads}, {precision}")
    baseline = count_baseline(train, val, tokenizer, console) if args.baseline else None
    budget = ""
    if args.minutes is not None:
        training = _within(
            args.minutes, model, train, val, training, given=settings.given, device=backend, began=began
        )
        budget = f", as many as fit into {args.minutes:g} min"
    if advice is not None and "max_steps" not in settings.given:
        enough = max(1, advice.most_chars // (training.batch_size * training.accumulate * config.block_size))
        if enough < training.max_steps:
            budget = ", which is enough for so short a text"
            training = training.replace(max_steps=enough)
    console.say(
        f"steps   {training.max_steps:,}{budget}; each {training.batch_size * training.accumulate} blocks of "
        f"{config.block_size} characters"
    )
    signals.check()
    if args.overwrite:
        delete_run(Path(args.out))

    def record(path: Path) -> None:
        values = {
            "sources": [lasting(source) for source in args.files],
            "val_fraction": float(val_fraction),
            "tokenizer": kind,
            "preset": settings.preset,
            "minutes": args.minutes,
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
    )
    found = None if baseline is None else baseline.values
    return _fit(trainer, progress, args.out, console, signals, baseline=found)


def resume(
    args: argparse.Namespace,
    origin: Origin,
    text: str,
    *,
    sources: Sequence[str],
    max_steps: int | None,
    console: Console,
    signals: Signals,
) -> int:
    """Go on with a run."""
    tokenizer = _tokenizer(origin.tokenizer, text)
    train, val = _split(text, tokenizer, origin.block_size, origin.val_fraction)

    def record(path: Path) -> None:
        commands = origin.values.get("commands")
        changed = {
            "sources": [lasting(source) for source in sources],
            "training": trainer.config.to_dict(),
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
    console.say(_described_text(sources, text, tokenizer, train, val))
    console.say(f"device  {trainer.backend.name}, {trainer.precision}")
    if trainer.step >= trainer.config.max_steps:
        console.say(
            f"steps   all {trainer.config.max_steps:,} are done; --max-steps N with a larger N goes on"
        )
        return 0
    console.say(f"steps   {trainer.step:,} of {trainer.config.max_steps:,} are done")
    signals.check()
    return _fit(trainer, progress, args.out, console, signals, baseline=origin.values.get("baseline"))


def _fit(
    trainer: Trainer, progress: Progress, out: str, console: Console, signals: Signals, *, baseline: object
) -> int:
    try:
        result = trainer.fit()
    except TrainingInterrupted as stopped:
        progress.close()
        console.complain(
            f"stopped after step {stopped.step:,} of {trainer.config.max_steps:,}; all is saved in "
            f"{quoted(out)}\nTo go on: charlm train --resume -o {shlex.quote(out)}"
        )
        return signals.exit_code
    finally:
        progress.close()
    rows = [["done", f"{result.steps:,} steps in {clock(result.seconds)}" + _REASONS[result.reason]]]
    if result.best is not None and result.final is not None:
        best, final = result.best, result.final
        rows.append(
            [
                "loss",
                f"best {best.loss_nats:.4f} nats ({best.bits_per_char:.4f} bits/char) at step "
                f"{result.best_step:,}, final {final.loss_nats:.4f}",
            ]
        )
        verdict = compared(baseline, best.loss_nats)
        rows += [] if verdict is None else [["n-gram", verdict]]
    rows += [["run", out], ["next", f"charlm generate {shlex.quote(out)}"]]
    console.say(aligned([name.ljust(6), value] for name, value in rows).rstrip("\n"))
    return 0


_REASONS = {
    "max_steps": "",
    "max_seconds": ", as max_seconds is over",
    "patience": ", as the validation loss no longer falls",
    "callback": "",
}


def _within(
    minutes: float,
    model: GPT,
    train: BlockDataset,
    val: BlockDataset | None,
    training: TrainerConfig,
    *,
    given: frozenset[str],
    device: DeviceBackend,
    began: float,
) -> TrainerConfig:
    """Return the settings with as many steps as fit into the time that is left."""
    seconds = 60 * minutes
    end = began + seconds - _RESERVE[0] - _RESERVE[1] * seconds

    def steps(evaluations: int) -> int:
        left = end - time.perf_counter()
        if left <= 0:
            raise DataError(
                f"--minutes {minutes:g} is over before the training can begin: loading took "
                f"{time.perf_counter() - began:.0f} seconds. Give it more."
            )
        return steps_within(
            left, model, train, training, val_data=val, evaluations=evaluations, device=device
        )

    count = steps(0 if val is None else _EVALUATIONS)
    changes: dict[str, object] = {}
    if "eval_interval" not in given:
        changes["eval_interval"] = -(-count // _EVALUATIONS)
    elif val is not None:  # how many evaluations there will be depends on the steps, and these on them
        count = steps(-(-count // training.eval_interval))
    return training.replace(max_steps=count, **changes)


def _tokenizer(kind: str, text: str) -> Tokenizer:
    return ByteTokenizer() if kind == "byte" else CharTokenizer.from_text(text)


def _split(
    text: str, tokenizer: Tokenizer, block_size: int, val_fraction: float
) -> tuple[BlockDataset, BlockDataset | None]:
    try:
        data = BlockDataset.from_text(text, tokenizer, block_size)
        return data.split(1 - val_fraction) if val_fraction else (data, None)
    except DataError as error:
        raise DataError(
            f"{error} On the command line: --block-size N, or --val-fraction 0 to train on all of the text."
        ) from error


def _described_text(
    sources: Sequence[str], text: str, tokenizer: Tokenizer, train: BlockDataset, val: BlockDataset | None
) -> str:
    names = ", ".join("standard input" if s == "-" else s for s in sources[:3])
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    unit = "bytes" if isinstance(tokenizer, ByteTokenizer) else "characters"
    kept = f"{len(val.ids):,} for validation" if val is not None else "none for validation"
    return (
        f"text    {names}{more}: {len(text):,} characters, vocabulary {tokenizer.vocab_size:,}; "
        f"{len(train.ids):,} {unit} to train on, {kept}"
    )


def _versions() -> dict[str, str]:
    return {
        "charlm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def _command() -> str:
    return shlex.join(["charlm", *sys.argv[1:]]).encode("utf-8", "backslashreplace").decode()
