"""What contestants, writers and readers of one run do, each in a process of its own (see `long_lived`)."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import signal
import stat
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path

import torch
from harness.tiny_training import TOKENIZER, quick_config, tiny_split
from typing_extensions import override

import charlm
from charlm import BigramLM, BlockDataset, CharTokenizer, EvalResult, LanguageModel, Trainer
from charlm.cli.__main__ import main
from charlm.errors import CheckpointError, RunExistsError, RunLockedError
from charlm.files import safetensors
from charlm.models.saving import (
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    build_model,
    build_tokenizer,
    read_model_files,
    save_model,
)
from charlm.runs.choosing import newest_whole_checkpoint
from charlm.runs.directory import RunDirectory
from charlm.training import Callback, StepRecord, list_checkpoints

__all__ = ["finish", "fork", "leave", "load_saved", "prepare", "race", "read", "save_in_turns", "write"]

RACE_STEPS = 4


class Contestant:
    """One who wants to train; what it has won it keeps until it leaves it."""

    def __init__(self) -> None:
        self.build: Callable[[], Trainer]
        self.trainer: Trainer | None = None
        self.steps: Generator[StepRecord, None, None]


ONE = Contestant()


def prepare(folder: str, how: str) -> None:
    """Make ready to begin a "new" run, also with a trainer "built before", or to have one "resumed"."""
    train, _ = tiny_split()

    def new() -> Trainer:
        config = quick_config(max_steps=RACE_STEPS, save_interval=1)
        return Trainer(BigramLM(TOKENIZER.vocab_size), train, config, device="cpu", out_dir=folder)

    ONE.build = new if how != "resumed" else lambda: Trainer.resume(folder, train, device="cpu")
    ONE.trainer = new() if how == "built before" else None


def race(at: float) -> dict[str, object]:
    """Begin to train at that moment of the clock, and take the first step."""
    while time.monotonic() < at:
        pass
    began = time.monotonic()
    try:
        ONE.trainer = ONE.trainer or ONE.build()
        ONE.steps = ONE.trainer.steps()
        next(ONE.steps)
    except (RunExistsError, RunLockedError) as error:
        return {"refused": type(error).__name__, "seconds": time.monotonic() - began}
    return {"refused": None, "seconds": time.monotonic() - began}


def fork() -> int:
    """Start a process that lives until it is killed, as one that loads data does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork beside threads
        child = os.fork()
    if child == 0:
        for descriptor in range(64):
            with contextlib.suppress(OSError):
                mode = os.fstat(descriptor).st_mode
                if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                    os.close(descriptor)  # or whoever asked for this would wait for its end
        signal.pause()
    return child


def leave() -> None:
    """Stop to train."""
    ONE.steps.close()


def finish() -> int:
    """Train to the end, and return how many steps are done."""
    assert ONE.trainer is not None
    for _ in ONE.steps:
        pass
    return ONE.trainer.step


class Marking(Callback):
    """Gives every weight the number of the step as its value, so that a reader can tell a whole model."""

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.fill_(record.step)


class Wandering(Trainer):
    """A trainer whose validation losses go up and down, so that the best checkpoint changes."""

    @override
    def evaluate(self, data: BlockDataset | None = None, *, max_chars: int | None = None) -> EvalResult:
        loss = random.Random(self.step).uniform(1, 2) - self.step / 1_000
        return dataclasses.replace(super().evaluate(data, max_chars=max_chars), loss_nats=loss)


def write(folder: str, saves: int, keep_last: int, keep_best: int) -> int:
    """Train with an evaluation, a save and pruning in every step."""
    train, val = tiny_split()
    config = quick_config(
        max_steps=saves, eval_interval=1, log_interval=100, keep_last=keep_last, keep_best=keep_best
    )
    trainer = Wandering(
        BigramLM(TOKENIZER.vocab_size),
        train,
        config,
        val_data=BlockDataset(val.ids[:40], 8),
        tokenizer=TOKENIZER,
        device="cpu",
        out_dir=folder,
        callbacks=[Marking()],
    )
    for _ in trainer.steps():
        pass
    Path(folder, "done").touch()
    return trainer.step


def read(folder: str) -> dict[str, int]:
    """Read the run in every way, over and over until it is done; return how often, and what was seen."""
    path = Path(folder)
    run = RunDirectory.open(path)
    train, val = tiny_split()
    val = BlockDataset(val.ids[:40], 8)
    seen: set[int] = set()
    newest = reads = 0
    while True:
        done = (path / "done").exists()
        seen.add(_only_value(charlm.load(path, device="cpu").model))
        assert list_checkpoints(run.path), "an instant without a checkpoint"
        checkpoint = newest_whole_checkpoint(run)
        weights, _ = safetensors.loads(checkpoint.files[WEIGHTS_FILE], path=WEIGHTS_FILE)
        assert all((tensor == checkpoint.info.step).all() for tensor in weights.values())
        assert checkpoint.info.step >= newest, f"step {newest} was there, now it is {checkpoint.info.step}"
        with warnings.catch_warnings():  # without keep_best, or when a better one was saved this moment
            warnings.filterwarnings("ignore", "the weights of the best evaluation, .* are not on disk")
            resumed = Trainer.resume(path, train, val_data=val, device="cpu")
        assert resumed.step >= checkpoint.info.step
        assert _only_value(resumed.model) == resumed.step
        newest = resumed.step
        err = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            assert main(["info", folder, "--verify"]) == 0, err.getvalue()
        assert not err.getvalue(), err.getvalue()
        seen.add(newest)
        reads += 4
        if done:
            return {"reads": reads, "seen": len(seen), "newest": newest}


VOCABS = ("abcd", "efgh", "abcde", None)
"""Of the models that are saved in turns; the last one is saved without a tokenizer."""


def save_in_turns(folder: str, saves: int) -> None:
    """Save one model after another in the same place; each has its number as every weight."""
    for save in range(saves):
        vocab = VOCABS[save % len(VOCABS)]
        model = BigramLM(len(vocab or "abcd"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(save % len(VOCABS))
        save_model(model, folder, None if vocab is None else CharTokenizer(vocab))
    Path(folder + " done").touch()


def load_saved(folder: str) -> dict[str, int]:
    """Load what is saved in turns, in every way, until it is done; return how often, and what was seen."""
    seen: set[int] = set()
    loads = 0
    while not Path(folder + " done").exists():
        files = read_model_files(folder)
        number = _only_value(build_model(files, Path(folder), BigramLM))
        vocab = VOCABS[number]
        assert (TOKENIZER_FILE in files) == (vocab is not None), f"{number} with {sorted(files)}"
        if vocab is not None:
            assert build_tokenizer(files, Path(folder)) == CharTokenizer(vocab), (
                f"{number}, another tokenizer"
            )
        seen.add(number)
        try:
            lm = charlm.load(folder, device="cpu")
            assert lm.tokenizer == CharTokenizer(VOCABS[_only_value(lm.model)] or ""), "another tokenizer"
        except CheckpointError as error:  # of the one that has none
            if "has no tokenizer.json" not in str(error):
                raise
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main(["info", folder, "--json"]) == 0, err.getvalue()
        said = json.loads(out.getvalue())
        shown = said["model"]["settings"]["vocab_size"], said.get("tokenizer", {}).get("vocab")
        assert shown in {(len(vocab or "abcd"), vocab) for vocab in VOCABS}, f"info says {shown}"
        loads += 3
    return {"loads": loads, "seen": len(seen)}


def _only_value(model: torch.nn.Module) -> int:
    """Return the value that all weights of a model share."""
    assert isinstance(model, LanguageModel)
    (value,) = {float(value) for p in model.parameters() for value in p.detach().flatten()}
    return int(value)
