"""Loggers: what they are told, that it is what the log holds, and that no logger ever touches a run."""

from __future__ import annotations

import copy
import json
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from harness.threads import in_world
from harness.tiny_training import TOKENIZER, PlainModule, quick_config, same_tensors, tensors_of, tiny_split
from torch import Tensor
from typing_extensions import override

from charlm import BigramLM, Trainer
from charlm.backends.world import World
from charlm.training import Callback, Logger, TrainerConfig, loggers
from charlm.training.records import StepRecord

CONFIG = quick_config(log_interval=2, eval_interval=4, sample_interval=6, sample_chars=20)
Told = list[tuple[int, dict[str, float | str]]]


class Listener(Logger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.opened: list[tuple[Path | None, int]] = []
        self.told: Told = []
        self.closed = 0

    @override
    def open(self, directory: Path | None, settings: Mapping[str, Mapping[str, object]], step: int) -> None:
        assert settings["training"]["max_steps"] == 12
        self.opened.append((directory, step))
        self.told = [(at, values) for at, values in self.told if at <= step]

    @override
    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        self.told.append((step, dict(values)))

    @override
    def close(self) -> None:
        self.closed += 1


def trainer_with(
    *callbacks: Callback, out_dir: Path | None = None, config: TrainerConfig = CONFIG
) -> Trainer:
    train, val = tiny_split()
    torch.manual_seed(0)
    return Trainer(
        BigramLM(TOKENIZER.vocab_size),
        train,
        config,
        val_data=val,
        tokenizer=TOKENIZER,
        out_dir=out_dir,
        callbacks=callbacks,
        device="cpu",
    )


def in_log(run: Path) -> Told:
    """Return what metrics.jsonl holds of interest, under the names of loggers."""
    names = {
        "step": {
            "loss": "train/loss",
            "learning_rate": "learning_rate",
            "grad_norm": "grad_norm",
            "chars_per_second": "chars_per_second",
        },
        "eval": {"loss_nats": "val/loss", "bits_per_char": "val/bits_per_char"},
        "sample": {"text": "sample"},
    }
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [
        (r["step"], {tag: r[name] for name, tag in names[r["kind"]].items()})
        for r in records
        if r["kind"] in names
    ]


def test_a_logger_is_told_what_the_log_holds(tmp_path: Path) -> None:
    listener = Listener()
    trainer_with(listener, out_dir=tmp_path / "run").fit()
    assert listener.told == in_log(tmp_path / "run")
    assert {step for step, values in listener.told if "train/loss" in values} == {2, 4, 6, 8, 10, 12}
    assert {step for step, values in listener.told if "val/bits_per_char" in values} == {4, 8, 12}
    assert {step for step, values in listener.told if "sample" in values} == {6, 12}
    assert (listener.opened, listener.closed) == ([(tmp_path / "run", 0)], 1)


def test_a_run_without_a_directory_is_logged_too() -> None:
    listener = Listener()
    trainer_with(listener).fit()
    assert [step for step, values in listener.told if "train/loss" in values] == [2, 4, 6, 8, 10, 12]
    assert listener.opened == [(None, 0)]


def test_what_a_callback_before_a_logger_logs_at_the_begin_is_told_too() -> None:
    class Before(Callback):
        @override
        def on_train_start(self, trainer: Trainer) -> None:
            trainer.log("old", {"loss_nats": 3.0, "bits_per_char": 4.0})

    listener = Listener()
    trainer_with(Before(), listener).fit()
    assert listener.told[0] == (0, {"old/loss": 3.0, "old/bits_per_char": 4.0})


@pytest.mark.parametrize("left_at", [1, 4, 7, 11])
def test_after_a_resume_all_is_told_again_and_no_step_twice(tmp_path: Path, left_at: int) -> None:
    run, listener = tmp_path / "run", Listener()
    for record in trainer_with(listener, out_dir=run).steps():
        if record.step == left_at:
            break
    if left_at < 4:  # nothing is saved yet: begun anew
        trainer_with(listener, out_dir=run).fit()
    else:
        train, val = tiny_split()
        Trainer.resume(run, train, val_data=val, callbacks=[listener], device="cpu").fit()
    assert listener.told == in_log(run)
    assert listener.closed == 2


def test_what_is_logged_while_the_log_is_still_read_is_told_once(tmp_path: Path) -> None:
    class Late(Listener):
        """Opens when the steps below are done, so that the log holds them already."""

        @override
        def open(
            self, directory: Path | None, settings: Mapping[str, Mapping[str, object]], step: int
        ) -> None:
            assert done.wait(60)
            super().open(directory, settings, step)

    run, (train, val), done, listener = tmp_path / "run", tiny_split(), threading.Event(), Late()
    for record in trainer_with(out_dir=run).steps():
        if record.step == 4:
            break
    for record in Trainer.resume(run, train, val_data=val, callbacks=[listener], device="cpu").steps():
        if record.step == 9:
            done.set()
    assert listener.told == in_log(run)


def test_without_a_directory_a_trainer_that_goes_on_voids_what_lies_behind_its_step() -> None:
    listener = Listener()
    trainer = trainer_with(listener)
    for record in trainer.steps():
        if record.step == 5:
            break
    trainer.fit()
    assert listener.opened == [(None, 0), (None, 5)]
    steps = [step for step, values in listener.told if "train/loss" in values]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_what_is_not_finite_is_told_as_it_is(tmp_path: Path) -> None:
    class Sometimes(PlainModule):
        @override
        def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits, loss = super().forward(idx, targets)
            return logits, loss / 0 if self.training else loss

    class Plain(Listener):
        @override
        def open(self, directory: Path | None, settings: object, step: int) -> None: ...

    train, _ = tiny_split()
    live, replayed = Plain(), Plain()
    config = quick_config(log_interval=1, nonfinite="skip", max_steps=3)
    model = Sometimes(TOKENIZER.vocab_size)
    with pytest.warns(RuntimeWarning, match="was skipped"):
        Trainer(model, train, config, out_dir=tmp_path / "run", callbacks=[live], device="cpu").fit()
    assert [values["train/loss"] for _, values in live.told] == [math.inf] * 3
    with pytest.warns(RuntimeWarning, match="was skipped"):
        Trainer.resume(
            tmp_path / "run", train, model=model, callbacks=[replayed], device="cpu", max_steps=4
        ).fit()
    assert str(replayed.told[:3]) == str(live.told)  # as text, since NaN is not equal to itself


class Raises(Logger):
    """Fails at one of its methods."""

    def __init__(self, where: str) -> None:
        self.where = where

    def _fail(self, where: str) -> None:
        if where == self.where:
            raise OSError("the disk\nis full")

    @override
    def open(self, directory: object, settings: object, step: int) -> None:
        self._fail("open")

    @override
    def write(self, step: int, values: object) -> None:
        self._fail("write")

    @override
    def close(self) -> None:
        self._fail("close")


class Hangs(Logger):
    """Answers no more, until it is released."""

    def __init__(self) -> None:
        self.released = threading.Event()

    @override
    def write(self, step: int, values: object) -> None:
        self.released.wait()


def reference() -> dict[str, Tensor]:
    trainer = trainer_with()
    trainer.fit()
    return tensors_of(trainer)


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_a_logger_that_raises_is_warned_of_once_and_changes_nothing(tmp_path: Path, where: str) -> None:
    trainer = trainer_with(Raises(where), out_dir=tmp_path / "run")
    with pytest.warns(RuntimeWarning, match="Raises has stopped") as caught:
        trainer.fit()
    assert [str(warning.message) for warning in caught] == [
        "Raises has stopped: the disk; the run goes on without it"
    ]
    assert same_tensors(tensors_of(trainer), reference())


def test_a_logger_that_fails_while_it_writes_is_closed() -> None:
    class Failing(Listener):
        @override
        def write(self, step: int, values: Mapping[str, float | str]) -> None:
            raise OSError("the disk is full")

        @override
        def close(self) -> None:
            super().close()
            raise ValueError("nor can it be closed")

    failing = Failing()
    with pytest.warns(RuntimeWarning, match="Failing has stopped: the disk is full"):
        trainer_with(failing).fit()
    assert failing.closed == 1


@pytest.mark.parametrize("room", [3, 1_000])
def test_a_logger_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(loggers, "_LAST_WAIT", 0.05)
    monkeypatch.setattr(loggers, "_MOST_WAITING", room)
    logger, began = Hangs(), time.monotonic()
    why = "does not answer" if room == 3 else "has not finished in 0.05 seconds"
    trainer = trainer_with(logger, out_dir=tmp_path / "run")
    with pytest.warns(RuntimeWarning, match=f"Hangs {why}; the run goes on without it") as caught:
        trainer.fit()
    logger.released.set()
    assert len(caught) == 1
    assert time.monotonic() - began < 60
    assert same_tensors(tensors_of(trainer), reference())


def test_a_slow_logger_is_waited_for_at_the_end() -> None:
    class Slow(Listener):
        @override
        def write(self, step: int, values: Mapping[str, float | str]) -> None:
            time.sleep(0.01)
            super().write(step, values)

    listener = Slow()
    trainer_with(listener).fit()
    assert len(listener.told) == 6 + 3 + 2
    assert listener.closed == 1


def test_a_logger_is_closed_however_the_steps_end() -> None:
    class Breaks(Callback):
        @override
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            raise KeyboardInterrupt

    listener = Listener()
    with pytest.raises(KeyboardInterrupt):
        trainer_with(listener, Breaks()).fit()
    assert listener.closed == 1


def test_of_several_processes_the_first_alone_logs(tmp_path: Path) -> None:
    listeners = {0: Listener(), 1: Listener()}

    def trained(world: World) -> None:
        train, val = tiny_split()
        config = quick_config(log_interval=2, accumulate=2, batch_size=2)
        own = listeners[world.rank]
        Trainer(
            BigramLM(TOKENIZER.vocab_size),
            train,
            config,
            val_data=val,
            out_dir=tmp_path / "run",
            device="cpu",
            callbacks=[own],
        ).fit()

    in_world(2, trained)
    assert listeners[0].told == in_log(tmp_path / "run")
    assert (listeners[1].told, listeners[1].opened, listeners[1].closed) == ([], [], 0)


def test_a_trainer_with_a_logger_can_be_copied() -> None:
    trainer = trainer_with(Listener())
    for _ in trainer.steps():
        twin = copy.deepcopy(trainer)
        break
    assert twin.fit().steps == 12


def test_without_a_log_and_a_logger_the_device_is_not_asked_for_a_loss() -> None:
    def asked(*callbacks: Callback) -> list[int]:
        return [r.step for r in trainer_with(*callbacks).steps() if "loss" in vars(r)]

    assert asked() == []
    assert asked(Listener()) == [2, 4, 6, 8, 10, 12]
