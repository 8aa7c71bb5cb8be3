"""A checkpoint on disk: its layout, what verification finds, what pruning keeps."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.hostile_files import json_of, reseal
from harness.tiny_training import TOKENIZER, quick_config, tiny_split
from typing_extensions import override

import charlm
import charlm.runs.checkpoint as checkpoint_module
from charlm import BigramLM, Trainer
from charlm.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointWriteError,
    FileFormatError,
    InputError,
    RunExistsError,
    RunLockedError,
)
from charlm.files import safetensors
from charlm.files.reading import read_file
from charlm.runs.checkpoint import SaveIdentity, read_checkpoint, write_checkpoint
from charlm.runs.directory import RunDirectory
from charlm.runs.retention import prune_checkpoints
from charlm.training import Callback, list_checkpoints, verify_checkpoint

V = TOKENIZER.vocab_size
FILES = {
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "train.safetensors",
    "state.json",
    "manifest.json",
}


@pytest.fixture(scope="module")
def run_of_bigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "one"
    train, val = tiny_split()
    config = quick_config(max_steps=8, keep_last=2, sample_interval=8, sample_chars=3)
    Trainer(BigramLM(V), train, config, val_data=val, device="cpu", out_dir=path, tokenizer=TOKENIZER).fit()
    return path


@pytest.fixture
def checkpoint(run_of_bigram: Path, tmp_path: Path) -> Path:
    """A copy of the newest checkpoint that may be damaged."""
    newest = list_checkpoints(run_of_bigram)[-1].path
    return shutil.copytree(newest, tmp_path / newest.name)


def test_a_run_is_laid_out_as_promised(run_of_bigram: Path) -> None:
    assert {path.name for path in run_of_bigram.iterdir()} == {
        "run.json",
        ".lock",
        "metrics.jsonl",
        "checkpoints",
    }
    run = json_of(run_of_bigram / "run.json")
    assert set(run) == {"format", "version", "run_id", "created"}
    paths = sorted((run_of_bigram / "checkpoints").iterdir())
    assert [path.name[:18] for path in paths] == ["step-000000000004-", "step-000000000008-"]
    for path in paths:
        assert re.fullmatch(r"step-\d{12}-[0-9a-f]{8}", path.name)
        assert {file.name for file in path.iterdir()} == FILES
        manifest = json_of(path / "manifest.json")
        save_id, step = path.name[-8:], int(path.name[5:17])
        listed = manifest["files"]
        assert isinstance(listed, dict)
        for name in FILES - {"manifest.json"}:
            data = (path / name).read_bytes()
            assert listed.pop(name) == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert not listed
        identity = {"run_id": run["run_id"], "save_id": save_id, "step": step}
        assert manifest.items() >= identity.items()
        assert json_of(path / "state.json").items() >= identity.items()
        for name in ("model.safetensors", "train.safetensors"):
            header = safetensors.parse_header((path / name).read_bytes(), path=name)
            assert header.metadata == {key: str(value) for key, value in identity.items()}


def test_files_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = Trainer(BigramLM(V), tiny_split()[0], device="cpu", out_dir=tmp_path / "run").save()
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


def test_verify_returns_what_the_checkpoint_is(checkpoint: Path) -> None:
    info = verify_checkpoint(checkpoint)
    assert (info.path, info.step) == (checkpoint, 8)
    assert set(info.files) == FILES - {"manifest.json"}
    assert info.val_loss is not None


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo"])
def test_only_regular_files_are_read(checkpoint: Path, kind: str) -> None:
    file = checkpoint / "model.safetensors"
    elsewhere = checkpoint.parent / "elsewhere"
    file.rename(elsewhere)
    if kind == "symlink":
        file.symlink_to(elsewhere)
    elif kind == "directory":
        file.mkdir()
    else:
        os.mkfifo(file)
    with pytest.raises(CheckpointCorruptError, match="must be a regular file"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 9}, "belongs to another checkpoint"),
        ({"save_id": "00000000"}, "belongs to another checkpoint"),
        ({"step": "8"}, "must hold an integer in 'step'"),
        ({"files": {}}, "lists other files than a checkpoint has"),
        ({"files": {"../../x": {"size": 1, "sha256": ""}}}, "lists other files than a checkpoint has"),
        ({"files": {"state.json": {"size": 1}}}, "must hold a string in 'sha256'"),
        ({"val_loss": "1"}, "must hold a number in 'val_loss'"),
    ],
)
def test_a_manifest_that_vouches_for_nonsense_is_refused(
    checkpoint: Path, change: dict[str, object], message: str
) -> None:
    reseal(checkpoint, **change)
    with pytest.raises(CheckpointCorruptError, match=message):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"has version 2 of charlm.checkpoint; this charlm reads up to 1. Update charlm\."),
        ({"format": "other"}, "must hold 'charlm.checkpoint' in 'format', got 'other'"),
    ],
)
def test_a_checkpoint_of_a_newer_charlm_is_not_called_damaged(
    checkpoint: Path, change: dict[str, object], message: str
) -> None:
    reseal(checkpoint, **change)
    with pytest.raises(CheckpointError, match=message) as caught:
        verify_checkpoint(checkpoint)
    assert not isinstance(caught.value, CheckpointCorruptError)


def test_a_part_that_is_no_safetensors_file_is_refused_even_under_a_new_manifest(checkpoint: Path) -> None:
    (checkpoint / "train.safetensors").write_bytes(b"\x80\x04pickle")
    reseal(checkpoint)
    with pytest.raises(
        CheckpointCorruptError, match="must hold safetensors, got a pickle, which could run code"
    ):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "name", ["latest", "step-8-00000000", "step-000000000008-0000000G", "step-000000000008"]
)
def test_a_directory_of_another_name_is_no_checkpoint(checkpoint: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint: its name must be step-"):
        verify_checkpoint(checkpoint.rename(checkpoint.parent / name))


def test_what_is_not_there_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "step-000000000008-00000000"
    with pytest.raises(CheckpointCorruptError, match=r"has no manifest\.json: the save did not end"):
        verify_checkpoint(path)
    path.write_bytes(b"a file")
    with pytest.raises(CheckpointCorruptError, match=r"has no manifest\.json"):
        verify_checkpoint(path)


def prepared(run: RunDirectory, step: int, val_loss: float | None = None) -> Path:
    """Save a checkpoint of a few bytes."""
    identity = SaveIdentity(run.run_id, step)
    part = safetensors.dumps({"w": torch.zeros(2)}, identity.metadata)
    files = {"model.safetensors": part, "train.safetensors": part}
    return write_checkpoint(run, identity, files, {"x": 1}, val_loss=val_loss)


def steps(run: RunDirectory) -> list[int]:
    return [info.step for info in list_checkpoints(run.path)]


def test_a_prepared_checkpoint_is_whole(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    assert steps(run) == []
    path = prepared(run, 3, 1.5)
    checkpoint = read_checkpoint(path, run.run_id)
    assert checkpoint.state["x"] == 1
    assert checkpoint.info == verify_checkpoint(path)
    with pytest.raises(CheckpointCorruptError, match="belongs to another checkpoint"):
        read_checkpoint(path, "another run")


def test_only_whole_manifests_under_the_right_name_are_listed(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    paths = [prepared(run, step) for step in (300, 20, 1_000)]
    assert steps(run) == [20, 300, 1_000]
    for name in (
        ".tmp-1-00000000",
        ".trash-00000000",
        "step-000000000020-00000000.bak",
        "Step-000000000020-00000000",
        "best",
        "step-٠٠٠٠٠٠٠٠٠٠٢٠-00000000",
    ):
        shutil.copytree(paths[1], run.checkpoints / name)
    (run.checkpoints / "step-000000000021-00000000").mkdir()
    (run.checkpoints / "step-000000000022-00000000").write_text("a file", encoding="utf-8")
    shutil.copytree(paths[1], run.checkpoints / "step-000000000023-00000000")  # its manifest names another
    assert steps(run) == [20, 300, 1_000]
    shutil.rmtree(run.checkpoints)
    assert steps(run) == []


def test_a_checkpoint_that_is_replaced_while_they_are_listed_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keep_last=1 there is one at every instant, and a reader must never see none."""
    run = RunDirectory.create(tmp_path / "run")
    prepared(run, 1)
    replaced: list[Path] = []

    def read(path: Path, *, max_bytes: int) -> bytearray:
        if not replaced:
            replaced.append(prepared(run, 2))
            prune_checkpoints(run, replaced[0], keep_last=1, keep_best=0)
        return read_file(path, max_bytes=max_bytes)

    monkeypatch.setattr(checkpoint_module, "read_file", read)
    assert steps(run) == [2]


def test_pruning_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    losses = {1: 5.0, 2: 1.0, 3: 2.0, 4: None, 5: 3.0, 6: 4.0, 7: None}
    paths = {step: prepared(run, step, loss) for step, loss in losses.items()}
    prune_checkpoints(run, paths[7], keep_last=4, keep_best=3)
    assert steps(run) == [2, 3, 4, 5, 6, 7]
    prune_checkpoints(run, paths[7], keep_last=2, keep_best=2)
    assert steps(run) == [2, 3, 6, 7]
    prune_checkpoints(run, paths[7], keep_last=1, keep_best=1)
    assert steps(run) == [2, 7]
    prune_checkpoints(run, paths[7], keep_last=1, keep_best=0)
    assert steps(run) == [7]
    prune_checkpoints(run, paths[7], keep_last=0, keep_best=0)
    assert steps(run) == [7]
    prune_checkpoints(
        run, paths[1], keep_last=1, keep_best=0
    )  # it is gone: nothing is known, nothing deleted
    assert steps(run) == [7]


def test_pruning_leaves_a_checkpoint_that_somebody_has_put_a_file_into_or_a_link(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    paths = [prepared(run, step) for step in (1, 2, 3, 4)]
    (paths[0] / "notes.txt").write_text("mine", encoding="utf-8")
    paths[1].rename(tmp_path / "elsewhere")
    paths[1].symlink_to(tmp_path / "elsewhere")
    prune_checkpoints(run, paths[3], keep_last=1, keep_best=0)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [paths[i].name for i in (0, 1, 3)]
    assert (paths[0] / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "elsewhere" / "manifest.json").exists()


def test_a_failed_save_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    shutil.rmtree(run.checkpoints)
    with pytest.raises(CheckpointWriteError, match="cannot save the checkpoint of step 1") as caught:
        prepared(run, 1)
    assert caught.value.errno == 2


def test_run_json_is_written_once(tmp_path: Path) -> None:
    train, _ = tiny_split()
    Trainer(BigramLM(V), train, quick_config(), device="cpu", out_dir=tmp_path / "run").fit()
    before = (tmp_path / "run" / "run.json").stat()
    Trainer.resume(tmp_path / "run", train, max_steps=15, device="cpu").fit()
    after = (tmp_path / "run" / "run.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("content", ["file", "run", "hidden"])
def test_a_directory_that_is_not_empty_is_refused_at_once(tmp_path: Path, content: str) -> None:
    train = tiny_split()[0]
    if content == "run":
        Trainer(BigramLM(V), train, quick_config(max_steps=1), device="cpu", out_dir=tmp_path).fit()
    else:
        (tmp_path / ("." * (content == "hidden") + "notes")).write_text("mine", encoding="utf-8")
    advice = "Resume the run there" if content == "run" else "Choose another directory"
    with pytest.raises(RunExistsError, match=rf"is not empty. {advice}"):
        Trainer(BigramLM(V), tiny_split()[0], device="cpu", out_dir=tmp_path)


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    with pytest.raises(RunExistsError):
        Trainer(BigramLM(V), tiny_split()[0], device="cpu", out_dir=tmp_path / "run")
    with pytest.raises(CheckpointWriteError, match="cannot make a run in") as caught:
        Trainer(BigramLM(V), tiny_split()[0], device="cpu", out_dir=tmp_path / "run" / "below").save()
    assert caught.value.errno is not None


def test_who_begins_a_run_keeps_the_lock_until_the_training_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken again after the beginning, it might just then be with one who finds the run begun, and leaves."""
    taken: list[int] = []
    real = RunDirectory.lock

    def lock(self: RunDirectory) -> None:
        before = self._lock
        real(self)
        taken.extend([] if before is not None else [1])

    monkeypatch.setattr(RunDirectory, "lock", lock)
    train, _ = tiny_split()
    trainer = Trainer(BigramLM(V), train, quick_config(max_steps=2), device="cpu", out_dir=tmp_path / "run")
    steps = trainer.steps()
    next(steps)
    assert taken == [1]
    with pytest.raises(RunLockedError):
        RunDirectory.open(tmp_path / "run").lock()
    list(steps)
    again = RunDirectory.open(tmp_path / "run")
    again.lock()
    again.unlock()


def test_a_save_before_the_training_leaves_the_run_unlocked(tmp_path: Path) -> None:
    train, _ = tiny_split()
    trainer = Trainer(BigramLM(V), train, quick_config(max_steps=2), device="cpu", out_dir=tmp_path / "run")
    trainer.save()
    assert Trainer.resume(tmp_path / "run", train, device="cpu").fit().steps == 2


def test_a_run_json_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(FileFormatError, match="must be a regular file"):
        RunDirectory.open(tmp_path)


def test_what_killed_saves_left_is_removed_when_training_begins(tmp_path: Path) -> None:
    train, _ = tiny_split()
    Trainer(BigramLM(V), train, quick_config(max_steps=2), device="cpu", out_dir=tmp_path).fit()
    folder = tmp_path / "checkpoints"
    leftovers = [folder / ".tmp-4711-0123abcd", folder / ".trash-0123abcd"]
    foreign = [folder / name for name in (".tmp-4711-notes", ".trash-", "tmp-1-0123abcd", ".tmp-1-0123ABCD")]
    for directory in [*leftovers, *foreign]:
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
    (folder / ".trash-00000000").write_text("a file", encoding="utf-8")
    (tmp_path / ".tmp-4711-0123abcd").write_bytes(b"half a log")
    ngram = tmp_path / ".tmp-4711-00000000"  # half of an n-gram model
    ngram.mkdir()
    (ngram / "config.json").touch()
    Trainer.resume(tmp_path, train, device="cpu", max_steps=3).fit()
    assert not any(directory.exists() for directory in leftovers)
    assert not (tmp_path / ".tmp-4711-0123abcd").exists()
    assert not ngram.exists()
    assert (folder / ".trash-00000000").is_file()
    assert all((directory / "model.safetensors").exists() for directory in foreign)


def test_of_two_who_begin_a_run_at_once_one_is_refused_and_the_other_stays_whole(tmp_path: Path) -> None:
    """In each of 50 directories two threads begin at the same moment; locks hold between threads too."""
    barrier = threading.Barrier(2)
    ids: list[list[str]] = [[] for _ in range(50)]
    refused: list[str] = []

    def begin() -> None:
        for i in range(50):
            barrier.wait()
            try:
                run = RunDirectory.new(tmp_path / str(i))
                run.begin()
                ids[i].append(run.run_id)
            except (RunExistsError, RunLockedError) as error:
                run.unlock()
                refused.append(type(error).__name__)

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 50
    for i, begun in enumerate(ids):
        assert begun == [RunDirectory.open(tmp_path / str(i)).run_id]


@pytest.mark.parametrize("state", [{"numbers": [0.5] * 40_000}, {"nan": float("nan")}, {"object": object()}])
def test_a_state_that_could_not_be_read_back_is_refused_before_anything_is_pruned(
    tmp_path: Path, state: dict[str, object]
) -> None:
    class Hoarder(Callback):
        @override
        def state(self) -> dict[str, object]:
            return state if self.full else {}

        full = False

    train, _ = tiny_split()
    hoarder = Hoarder()
    trainer = Trainer(
        BigramLM(V), train, quick_config(max_steps=8), device="cpu", out_dir=tmp_path, callbacks=[hoarder]
    )
    steps = trainer.steps()
    for record in steps:
        if record.step == 5:
            hoarder.full = True
            break
    with pytest.raises(InputError, match=r"a callback's state\(\) cannot be saved"):
        trainer.save()
    steps.close()
    kept = list_checkpoints(tmp_path)
    assert [info.step for info in kept] == [4]
    verify_checkpoint(kept[0].path)


def test_a_link_in_the_place_of_a_checkpoint_is_not_followed(checkpoint: Path, tmp_path: Path) -> None:
    link = tmp_path / "links" / checkpoint.name
    link.parent.mkdir()
    link.symlink_to(checkpoint)
    verify_checkpoint(checkpoint)
    with pytest.raises(CheckpointCorruptError, match="must be a directory, got a symbolic link"):
        verify_checkpoint(link)


def test_a_link_in_the_place_of_the_lock_is_not_followed(run_of_bigram: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_of_bigram, tmp_path / "run")
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        RunDirectory.open(run).lock()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["checkpoints", "ngram"])
def test_a_link_in_the_place_of_a_run_s_directory_is_not_followed(tmp_path: Path, name: str) -> None:
    run = RunDirectory.create(tmp_path / "run")
    prepared(run, 1)
    (tmp_path / "elsewhere").mkdir()
    if name == "checkpoints":
        shutil.rmtree(run.checkpoints)
    (run.path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileFormatError, match=f"{name}' must be a directory, got a symbolic link"):
        RunDirectory.open(run.path)
    (tmp_path / "link").symlink_to(run.path)
    (run.path / name).unlink()
    run.checkpoints.mkdir(exist_ok=True)
    RunDirectory.open(tmp_path / "link")  # a link to the whole run is the caller's own path


def test_the_checkpoint_of_the_very_next_step_is_left_alone(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    newest, next_one = prepared(run, 4), prepared(run, 5)
    prune_checkpoints(run, newest, keep_last=1, keep_best=0)
    assert newest.is_dir()
    assert next_one.is_dir()


@pytest.mark.parametrize("name", checkpoint_module._FILES)
def test_no_file_takes_memory_because_a_manifest_vouches_for_its_size(
    run_of_bigram: Path, tmp_path: Path, name: str
) -> None:
    run = shutil.copytree(run_of_bigram, tmp_path / "run")
    *others, checkpoint = sorted((run / "checkpoints").iterdir())
    for other in others:
        shutil.rmtree(other)
    with (checkpoint / name).open("r+b") as file:
        file.truncate(1 << 40)  # and takes no room on the disk
    listed = json_of(checkpoint / "manifest.json")["files"]
    assert isinstance(listed, dict)
    reseal(checkpoint, files={**listed, name: {"size": 1 << 40, "sha256": "0" * 64}})
    reads: list[Callable[[], object]] = [
        lambda: verify_checkpoint(checkpoint),
        lambda: charlm.load(checkpoint, device="cpu"),
        lambda: charlm.load(run, device="cpu"),
        lambda: Trainer.resume(run, tiny_split()[0], device="cpu"),
    ]
    for read in reads:
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=rf"{name}' must have at most \d+ bytes, got 1099511627776"):
            read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20


def test_what_is_too_large_to_be_read_again_is_not_saved(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    identity = SaveIdentity(run.run_id, 1)
    with pytest.raises(InputError, match=r"tokenizer.json must have at most \d+ bytes to be read again, got"):
        write_checkpoint(run, identity, {"tokenizer.json": bytes(9 << 20)}, {}, val_loss=None)
    assert not list(run.checkpoints.iterdir())
