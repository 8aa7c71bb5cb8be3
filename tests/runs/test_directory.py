"""A run's directory: when a new run may begin there, and what becomes of one that never saved anything."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest
from harness.tiny_training import TOKENIZER, quick_config, tiny_split

from charlm import BigramLM, Trainer
from charlm.errors import CheckpointError, RunExistsError, RunLockedError
from charlm.runs.directory import RunDirectory
from charlm.runs.log import read_metrics
from charlm.training import list_checkpoints

if TYPE_CHECKING:
    from _typeshed import TraceFunction


def trainer_in(path: Path) -> Trainer:
    config = quick_config(max_steps=4, save_interval=10, log_interval=1)
    return Trainer(BigramLM(TOKENIZER.vocab_size), tiny_split()[0], config, device="cpu", out_dir=path)


def begun(path: Path, steps: int = 2) -> None:
    """Leave a run after a few steps, without a checkpoint."""
    for record in trainer_in(path).steps():
        if record.step == steps:
            break


def test_a_run_without_a_checkpoint_is_begun_anew_and_its_log_is_kept(tmp_path: Path) -> None:
    begun(tmp_path)
    first = RunDirectory.open(tmp_path).run_id
    assert trainer_in(tmp_path).fit().steps == 4
    assert RunDirectory.open(tmp_path).run_id != first
    assert [record["step"] for record in read_metrics(tmp_path / f"abandoned-{first}.jsonl")] == [1, 2]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_again_and_again(tmp_path: Path) -> None:
    for number in range(4):
        begun(tmp_path)
        assert len(list(tmp_path.glob("abandoned-*.jsonl"))) == number
    assert trainer_in(tmp_path).fit().steps == 4


def test_a_resume_says_what_to_do_instead_and_that_works(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(CheckpointError, match=r"none was saved. Start again, in the same directory"):
        Trainer.resume(tmp_path, tiny_split()[0], device="cpu")
    assert trainer_in(tmp_path).fit().steps == 4


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/mine", "checkpoints/step-000000000009-0123abcd"])
def test_a_run_with_something_else_in_it_is_left_alone(name: str, tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(RunExistsError, match="is not empty"):
        trainer_in(tmp_path)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("content", ["{}", '{"format":"charlm.run","version":2,"run_id":"0"}', ""])
def test_a_run_of_another_version_is_left_alone(content: str, tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunExistsError, match="is not empty"):
        trainer_in(tmp_path)


def test_a_run_that_is_training_and_has_saved_nothing_yet_is_left_alone(tmp_path: Path) -> None:
    one, other = trainer_in(tmp_path), trainer_in(tmp_path)
    loop = one.steps()
    next(loop)
    with pytest.raises(RunLockedError):
        other.fit()
    assert one.fit().steps == 4
    with pytest.raises(RunExistsError):
        other.fit()
    assert [info.step for info in list_checkpoints(tmp_path)] == [4]


def test_without_locks_a_run_that_may_be_training_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDirectory, "lock", lambda self: None)  # as on Windows
    begun(tmp_path)
    with pytest.raises(RunExistsError, match="no lock tells here whether a process still trains"):
        trainer_in(tmp_path).fit()


def test_ctrl_c_at_any_line_of_beginning_a_run_leaves_no_lock_behind(tmp_path: Path) -> None:
    # Not of `_open_lock`: only a trace, and no signal, interrupts the end of a `with`.
    lines = {"_open", "begin", "create", "lock"}
    seen, stop = 0, 0

    def trace(frame: FrameType, event: str, _: object) -> TraceFunction | None:
        nonlocal seen
        if frame.f_code.co_name not in lines or "/charlm/runs/" not in frame.f_code.co_filename:
            return None
        seen += event != "call"  # before a line, and as the function returns
        if seen == stop:
            raise KeyboardInterrupt
        return trace

    outer, interrupted = sys.gettrace(), True
    while interrupted:
        path, seen, stop = tmp_path / str(stop), 0, stop + 1
        one = trainer_in(path)
        sys.settrace(trace)
        try:
            one.save()
            interrupted = False
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(outer)
        if path.is_dir():
            other = RunDirectory(path, "")
            other.lock()  # or RunLockedError
            other.unlock()
    assert stop > 25
    # Another thread would wait for what this one still had.
    elsewhere = threading.Thread(target=other.lock, daemon=True)
    elsewhere.start()
    elsewhere.join(60)
    assert not elsewhere.is_alive()
    other.unlock()


def test_who_left_a_run_that_was_begun_anew_since_cannot_go_on(tmp_path: Path) -> None:
    one = trainer_in(tmp_path)
    for _ in one.steps():
        break
    begun(tmp_path)
    with pytest.raises(RunLockedError, match="another run has begun"):
        one.fit()
    assert trainer_in(tmp_path).fit().steps == 4


def test_a_save_outside_a_loop_begins_the_run_and_leaves_nothing_locked(tmp_path: Path) -> None:
    one, other = trainer_in(tmp_path), trainer_in(tmp_path)
    one.save()
    with pytest.raises(RunExistsError):
        other.save()
    for _ in one.steps():
        break
    one.save()
    assert [info.step for info in list_checkpoints(tmp_path)] == [1]
    assert Trainer.resume(tmp_path, tiny_split()[0], device="cpu").fit().steps == 4


def test_a_save_does_not_go_into_a_run_in_which_another_trains_or_has_trained(tmp_path: Path) -> None:
    one = trainer_in(tmp_path)
    one.save()
    other = Trainer.resume(tmp_path, tiny_split()[0], device="cpu")
    loop = other.steps()
    next(loop)
    with pytest.raises(RunLockedError, match="another process or trainer is training"):
        one.save()
    other.save()
    loop.close()
    with pytest.raises(RunLockedError, match="another process or trainer has trained"):
        one.save()
    assert other.fit().steps == 4
