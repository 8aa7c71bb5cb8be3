"""Disks that fail, processes that die, and two trainers in one directory."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from harness.failing_calls import failing
from harness.tiny_training import TOKENIZER, Numbers, quick_config, same_tensors, tensors_of, tiny_split

from charlm import BigramLM, Trainer
from charlm.errors import CheckpointWriteError, NonFiniteError, RunLockedError
from charlm.runs.log import read_metrics
from charlm.training import list_checkpoints, verify_checkpoint

V = TOKENIZER.vocab_size


def trainer_of(out_dir: Path, **config: object) -> Trainer:
    train, _ = tiny_split()
    torch.manual_seed(0)
    settings = quick_config(**{"save_interval": 2, "keep_last": 2, **config})
    return Trainer(BigramLM(V), train, settings, device="cpu", out_dir=out_dir)


@contextmanager
def no_renames(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every rename fail with a full disk."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        yield


def test_failed_saves_are_warned_about_and_the_third_in_a_row_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path)
    with (
        no_renames(monkeypatch),
        pytest.warns(RuntimeWarning, match="Training goes on") as caught,
        pytest.raises(CheckpointWriteError, match="cannot save the checkpoint of step 6") as error,
    ):
        trainer.fit()
    assert trainer.step == 6
    assert error.value.errno == errno.ENOSPC
    assert "Older checkpoints are intact" in str(error.value)
    assert len(caught) == 2
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert trainer.fit().steps == 12  # the disk has room again


def test_a_save_that_succeeds_starts_the_count_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = trainer.steps()
        for good in (False, False, True, False, False, True):
            if good:
                next(steps), next(steps)
            else:
                with no_renames(monkeypatch):
                    next(steps), next(steps)
    assert len(caught) == 4
    assert [info.step for info in list_checkpoints(tmp_path)] == [6, 12]


def test_a_failure_to_save_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, save_interval=100)
    with no_renames(monkeypatch), pytest.raises(CheckpointWriteError, match="step 12"):
        trainer.fit()


def test_a_failure_to_save_after_a_request_to_stop_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, save_interval=100)
    trainer.interrupt()
    with no_renames(monkeypatch), pytest.raises(CheckpointWriteError, match="step 1 "):
        trainer.fit()


def test_a_full_disk_does_not_touch_the_training_or_older_checkpoints(tmp_path: Path) -> None:
    """Under RLIMIT_FSIZE every file is cut off at its first bytes: log, saves and all."""
    numbers = [Numbers(), Numbers()]
    whole = trainer_of(tmp_path / "whole")
    whole.callbacks = (numbers[0],)
    whole.fit()
    trainer = trainer_of(tmp_path / "full")
    trainer.callbacks = (numbers[1],)
    steps = trainer.steps()
    next(steps), next(steps)
    (kept,) = list_checkpoints(tmp_path / "full")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            next(steps), next(steps), next(steps)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    messages = [str(warning.message) for warning in caught]
    assert sum("cannot write metrics.jsonl: [Errno 27] File too large" in m for m in messages) == 3
    assert sum("cannot save the checkpoint of step 4" in m for m in messages) == 1
    verify_checkpoint(kept.path)
    assert [p.name for p in (tmp_path / "full" / "checkpoints").iterdir()] == [kept.path.name]
    list(steps)
    assert numbers[0].steps == numbers[1].steps
    assert same_tensors(tensors_of(trainer), tensors_of(whole))
    logged = [r["step"] for r in read_metrics(tmp_path / "full" / "metrics.jsonl")]
    assert logged == [1, 2, 6, 7, 8, 9, 10, 11, 12]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, keep_last=1)
    first = trainer.save()
    trainer._state.step = 1  # as after a step
    import shutil

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.warns(RuntimeWarning, match="cannot delete an old checkpoint"):
            second = trainer.save()
    assert verify_checkpoint(second).step == 1
    assert not first.exists()


def test_two_trainers_of_one_process_are_kept_apart_too(tmp_path: Path) -> None:
    train, _ = tiny_split()
    first = trainer_of(tmp_path)
    first.save()
    second = Trainer.resume(tmp_path, train, device="cpu")
    steps = first.steps()
    next(steps)
    with pytest.raises(RunLockedError):
        second.fit()
    list(steps)
    with pytest.raises(RunLockedError, match="has trained"):  # and what it has done is not undone
        second.fit()
    assert Trainer.resume(tmp_path, train, device="cpu").step == 12


def test_a_save_that_stands_though_it_failed_is_not_taken_for_another_trainer_s(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, save_interval=100, max_steps=1_000)
    trainer.save()
    with failing(-1) as calls:
        trainer.save()
    stood = 0
    for at in range(len(calls.names)):
        steps = trainer.steps()
        next(steps)
        before = len(list((tmp_path / "checkpoints").iterdir()))
        with warnings.catch_warnings(), failing(at):
            warnings.simplefilter("ignore")
            try:
                trainer.save()
            except CheckpointWriteError:
                stood += len(list((tmp_path / "checkpoints").iterdir())) > before
        del steps
    assert stood
    assert next(trainer.steps()).step == len(calls.names) + 1


def test_a_trainer_does_not_go_back_behind_what_another_has_done_since(tmp_path: Path) -> None:
    train, _ = tiny_split()
    first = trainer_of(tmp_path)
    steps = first.steps()
    next(steps), next(steps)
    first.finish()
    list(steps)
    late = Trainer.resume(tmp_path, train, device="cpu", max_steps=12)
    assert Trainer.resume(tmp_path, train, device="cpu").fit().steps == 12
    log = (tmp_path / "metrics.jsonl").read_bytes()
    for trainer in (late, first):  # also one that was there before
        with pytest.raises(RunLockedError, match=r"trainer has trained in .* \(there is step-0*12-"):
            trainer.fit()
    assert (tmp_path / "metrics.jsonl").read_bytes() == log
    assert Trainer.resume(tmp_path, train, device="cpu").step == 12


@pytest.mark.parametrize("what", ["the run", "run.json"])
def test_a_run_that_was_deleted_is_not_said_to_be_intact(tmp_path: Path, what: str) -> None:
    train, _ = tiny_split()
    trainer_of(tmp_path / "run").fit()
    trainer = Trainer.resume(tmp_path / "run", train, device="cpu", max_steps=16)
    if what == "the run":
        shutil.rmtree(tmp_path / "run")
    else:
        (tmp_path / "run" / "run.json").unlink()
    for write in (trainer.save, trainer.fit):
        with pytest.raises(CheckpointWriteError) as error:
            write()
        assert "intact" not in str(error.value)


def test_a_run_that_is_deleted_while_it_trains_is_not_said_to_be_intact(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", save_interval=None)
    next(trainer.steps())
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointWriteError) as error:
        trainer.save()
    assert "intact" not in str(error.value)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import fcntl

    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    assert trainer_of(tmp_path).fit().steps == 12


def test_a_step_that_was_not_finite_is_in_the_log(tmp_path: Path) -> None:
    train, _ = tiny_split()
    model = BigramLM(TOKENIZER.vocab_size)
    trainer = Trainer(model, train, quick_config(), device="cpu", out_dir=tmp_path)
    steps = trainer.steps()
    next(steps)
    next(steps)
    torch.nn.init.constant_(model.token_embedding_table.weight, torch.nan)
    with pytest.raises(NonFiniteError):
        next(steps)
    *_, last = read_metrics(tmp_path / "metrics.jsonl")
    assert (last["kind"], last["step"], last["loss"]) == ("step", 3, None)
    assert last["nonfinite"] == {"loss": "nan", "grad_norm": "nan"}
