"""TensorBoard, by its own reader, and W&B, by a module with the calls of its client."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from harness.fake_wandb import FakeWandB
from harness.tiny_training import same_tensors, tensors_of, tiny_split
from tensorboard.backend.event_processing.plugin_event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]
from tensorboard.util.tensor_util import make_ndarray  # type: ignore[import-untyped]
from training.test_loggers import Told, in_log, trainer_with

from charlm import Trainer
from charlm.errors import CheckpointMismatchError
from charlm.runs.directory import RunDirectory
from charlm.training import TensorBoard, WandB

TEXTS = {"sample/text_summary": "sample", "settings/text_summary": "settings"}


def in_events(folder: Path) -> dict[str, list[tuple[int, float | str]]]:
    """Return what TensorBoard's own reader finds, the one of its server, by tag."""
    found: dict[str, list[tuple[int, float | str]]] = {}
    reader = EventAccumulator(str(folder), size_guidance={}, tensor_size_guidance={"scalars": 0, "text": 0})
    for tag in reader.Reload().Tags()["tensors"]:
        events = [(event.step, make_ndarray(event.tensor_proto)) for event in reader.Tensors(tag)]
        found[TEXTS.get(tag, tag)] = [
            (step, _without_indent(value.item()) if tag in TEXTS else value.item()) for step, value in events
        ]
    return found


def _without_indent(text: bytes) -> str:
    return text.decode().replace("\n    ", "\n").removeprefix("    ")


def by_tag(told: Told) -> dict[str, list[tuple[int, float | str]]]:
    """Return what a log holds in the same form; an event file has float32."""
    found: dict[str, list[tuple[int, float | str]]] = {}
    for step, values in told:
        for tag, value in values.items():
            found.setdefault(tag, []).append(
                (step, value if isinstance(value, str) else float(np.float32(value)))
            )
    return found


@pytest.fixture(autouse=True)
def _files_are_numbered_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files of one second by their names, and the tenth of a process before its ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.mark.parametrize("left_at", [None, 2, 4, 7])
def test_an_event_file_holds_what_the_log_holds_also_after_a_resume(
    tmp_path: Path, left_at: int | None
) -> None:
    run = tmp_path / "run"
    trainer = trainer_with(TensorBoard(), out_dir=run)
    for record in trainer.steps():
        if record.step == left_at:
            break
    if left_at == 2:  # nothing was saved: the run begins anew, and so do the events
        trainer_with(TensorBoard(), out_dir=run).fit()
    elif left_at is not None:
        train, val = tiny_split()
        Trainer.resume(run, train, val_data=val, callbacks=[TensorBoard()], device="cpu").fit()
    found = in_events(run / "tensorboard")
    (settings,) = found.pop("settings")
    assert found == by_tag(in_log(run))
    assert settings[0] == 0
    assert '"learning_rate": 0.05' in str(settings[1])


def test_a_logger_that_comes_with_a_resume_is_told_of_the_steps_before_it(tmp_path: Path) -> None:
    trainer_with(out_dir=tmp_path / "run").fit()
    train, val = tiny_split()
    board = TensorBoard(tmp_path / "elsewhere")
    Trainer.resume(tmp_path / "run", train, val_data=val, callbacks=[board], device="cpu", max_steps=14).fit()
    found = in_events(tmp_path / "elsewhere")
    found.pop("settings")
    assert found == by_tag(in_log(tmp_path / "run"))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_without_a_place_or_the_library_there_is_a_warning_that_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.warns(RuntimeWarning, match=r"TensorBoard has stopped: it needs a place: .* out_dir"):
        trainer_with(TensorBoard()).fit()
    plain = trainer_with()
    plain.fit()
    for name, make in (("tensorboard", TensorBoard), ("wandb", WandB)):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
        trainer = trainer_with(make(), out_dir=tmp_path / name)
        with pytest.warns(RuntimeWarning, match=f"it needs {name}: pip install {name}") as caught:
            trainer.fit()
        assert len(caught) == 1
        assert same_tensors(tensors_of(trainer), tensors_of(plain))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    module = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def history(told: Told) -> dict[int, dict[str, float | str]]:
    by_step: dict[int, dict[str, float | str]] = {}
    for step, values in told:
        by_step.setdefault(step, {}).update(values)
    return by_step


def shown(wandb: FakeWandB, name: str) -> dict[int, dict[str, object]]:
    """Return what a run has there, with samples as text."""
    return {
        step: {
            tag: value.html.removeprefix("<pre>").removesuffix("</pre>") if tag == "sample" else value
            for tag, value in values.items()
        }
        for step, values in wandb.runs[name].history.items()
    }


@pytest.mark.parametrize("left_at", [None, 4, 7])
def test_a_resumed_run_goes_on_in_wandb_as_the_same_one(
    tmp_path: Path, wandb: FakeWandB, left_at: int | None
) -> None:
    run = tmp_path / "run"
    for record in trainer_with(WandB(), out_dir=run).steps():
        if record.step == left_at:
            break
    if left_at is not None:
        train, val = tiny_split()
        Trainer.resume(run, train, val_data=val, callbacks=[WandB()], device="cpu").fit()
    (name,) = wandb.runs
    assert name == RunDirectory.open(run).run_id
    own = wandb.runs[name]
    expected = history(in_log(run))
    if left_at == 7:  # the steps after the checkpoint are there from before, but for their speed
        for one in (expected, own.history):
            one[6].pop("chars_per_second")
    assert shown(wandb, name) == expected
    assert own.dropped == []
    assert own.finished == 1 + (left_at is not None)
    first = own.options[0]
    assert (first["project"], first["name"], first["dir"]) == ("charlm", "run", str(run))
    assert first["config"]["training"]["learning_rate"] == 0.05


def test_an_id_that_was_given_is_kept_by_the_checkpoints(tmp_path: Path, wandb: FakeWandB) -> None:
    run, (train, val) = tmp_path / "run", tiny_split()
    trainer_with(WandB(id="mine", project="bigrams"), out_dir=run).fit()
    with pytest.raises(CheckpointMismatchError, match="saved with 1 callbacks, got 0"):
        Trainer.resume(run, train, val_data=val, device="cpu")
    Trainer.resume(run, train, val_data=val, callbacks=[WandB()], device="cpu", max_steps=14).fit()
    assert [*wandb.runs] == ["mine"]
    assert max(wandb.runs["mine"].history) == 14


def test_without_an_account_nobody_is_asked_for_one(wandb: FakeWandB, tmp_path: Path) -> None:
    wandb.has_account = False
    with pytest.warns(RuntimeWarning, match="it knows no account here: wandb login, or WANDB_MODE=offline"):
        trainer_with(WandB(), out_dir=tmp_path / "run").fit()
    trainer_with(WandB(mode="offline"), out_dir=tmp_path / "offline").fit()
    assert len(wandb.runs) == 1


def test_what_a_model_writes_is_no_markup(wandb: FakeWandB) -> None:
    logger = WandB()
    logger.open(None, {}, 0)
    logger.write(1, {"sample": "<script>1 & 2"})
    (run,) = wandb.runs.values()
    assert run.history[1]["sample"].html == "<pre>&lt;script&gt;1 &amp; 2</pre>"
    assert pickle.loads(pickle.dumps(logger)).state() == {}
