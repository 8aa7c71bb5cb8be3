"""Stops, saves and errors at odd moments: between two lines of the trainer, or out of a callback."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from harness.far_backend import FarBackend
from harness.tiny_training import TOKENIZER, Noise, quick_config, same_tensors, tensors_of, tiny_split
from torch import Tensor
from typing_extensions import override

from charlm import BigramLM, BlockDataset, DeviceBackend, EvalResult, Trainer
from charlm.errors import (
    CheckpointCorruptError,
    CheckpointWriteError,
    NonFiniteError,
    TrainingInterrupted,
)
from charlm.files import strict_json
from charlm.models.contents import Contents
from charlm.runs import writer as writer_module
from charlm.runs.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from charlm.runs.choosing import newest_whole_checkpoint
from charlm.training import Callback, EvalRecord, SampleRecord, Timetable, list_checkpoints
from charlm.training import resume as resume_module

V = TOKENIZER.vocab_size


def bigram() -> BigramLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return BigramLM(V)


def trainer_of(
    out: Path | None = None,
    *callbacks: Callback,
    validated: bool = True,
    device: str | DeviceBackend = "cpu",
    **changes: object,
) -> Trainer:
    train, val = tiny_split()
    return Trainer(
        bigram(),
        train,
        quick_config(**changes),
        val_data=val if validated else None,
        tokenizer=TOKENIZER,
        device=device,
        out_dir=out,
        callbacks=callbacks,
    )


@contextmanager
def poisoned(trainer: Trainer, *steps: int) -> Iterator[None]:
    """Let the gradient of some steps, counted from 1, be not a number."""
    taken = {"step": trainer.step}

    def spoil(gradient: Tensor) -> Tensor:
        taken["step"] += 1
        return gradient * math.nan if taken["step"] in steps else gradient

    handle = next(trainer.model.parameters()).register_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


class BestAt4(Trainer):
    """Finds its lowest loss after step 4, whatever it learns later."""

    @override
    def evaluate(self, data: BlockDataset | None = None, *, max_chars: int | None = None) -> EvalResult:
        return EvalResult(loss_nats=1.0 if self.step == 4 else 2.0, accuracy=0.5, n_chars=10)


class Calls(Callback):
    """Does something at one kind of moment."""

    def __init__(self, moment: str, act: Callable[[Trainer], object]) -> None:
        self._moment, self._act = moment, act

    def _at(self, moment: str, trainer: Trainer) -> None:
        if moment == self._moment:
            self._act(trainer)

    @override
    def on_train_start(self, trainer: Trainer) -> None:
        self._at("train_start", trainer)

    @override
    def on_evaluate(self, trainer: Trainer, evaluation: EvalRecord) -> None:
        self._at("evaluate", trainer)

    @override
    def on_sample(self, trainer: Trainer, sample: SampleRecord) -> None:
        self._at("sample", trainer)

    @override
    def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
        self._at("save", trainer)


def test_a_stop_that_comes_after_a_step_was_seen_to_is_for_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path / "run", eval_interval=None, save_interval=5)
    seen_to = trainer._timekeeper.after_pause

    def after_pause(now: float, *, evaluated: bool) -> None:
        if trainer.step == 7:
            trainer.interrupt()
        seen_to(now, evaluated=evaluated)

    monkeypatch.setattr(trainer._timekeeper, "after_pause", after_pause)
    with pytest.raises(TrainingInterrupted, match="after step 8; the state is saved") as caught:
        trainer.fit()
    assert Path(caught.value.checkpoint or "").name.startswith("step-000000000008-")
    assert list_checkpoints(tmp_path / "run")[-1].step == 8


def test_a_stop_during_a_save_that_fails_is_for_the_next_step_and_saved_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path / "run", eval_interval=None, save_interval=5)
    failures = [1]

    def failing(*args: object, **kwargs: object) -> Path:
        if failures:
            failures.clear()
            trainer.interrupt()
            raise CheckpointWriteError("the disk is full")
        return write_checkpoint(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they come

    monkeypatch.setattr(writer_module, "write_checkpoint", failing)
    with (
        pytest.warns(RuntimeWarning, match="Training goes on"),
        pytest.raises(TrainingInterrupted, match="after step 6; the state is saved"),
    ):
        trainer.fit()
    assert [info.step for info in list_checkpoints(tmp_path / "run")] == [6]


@pytest.mark.parametrize("stop", [Trainer.finish, Trainer.interrupt])
@pytest.mark.parametrize("moment", ["sample", "evaluate"])
def test_a_bad_step_is_told_of_where_a_run_stops_on_a_device_that_works_on_its_own(
    stop: Callable[[Trainer], None], moment: str
) -> None:
    at_6 = Calls(moment, lambda trainer: stop(trainer) if trainer.step == 6 else None)
    settings = {"log_interval": 100, "sample_interval": 3, "sample_chars": 1, "eval_interval": 6}
    trainer = trainer_of(None, at_6, validated=moment == "evaluate", device=FarBackend(), **settings)
    before = tensors_of(trainer)
    with poisoned(trainer, 1), pytest.raises(NonFiniteError, match="step 1:"):
        trainer.fit()
    assert trainer.step == 0
    assert trainer.result().reason == "interrupted"
    assert same_tensors({k: v for k, v in tensors_of(trainer).items() if k in before}, before)


def test_an_interrupt_while_the_bad_step_is_looked_at_does_not_lose_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = trainer_of(None, validated=False, device=FarBackend(), log_interval=5)
    look = trainer._stepper._accumulate_gradients
    ctrl_c = [1]

    def interrupted(step: int) -> Tensor:
        if ctrl_c and trainer._stepper.guard.ended_at() is not None:
            ctrl_c.clear()
            raise KeyboardInterrupt
        return look(step)

    monkeypatch.setattr(trainer._stepper, "_accumulate_gradients", interrupted)
    with poisoned(trainer, 3), pytest.raises(KeyboardInterrupt):
        trainer.fit()
    with poisoned(trainer), pytest.raises(NonFiniteError, match="step 3:"):
        trainer.fit()
    assert trainer.step == 2
    assert trainer.fit().steps == 12


def test_a_run_that_is_finished_before_its_first_step_ends_well_within_minutes_too() -> None:
    for minutes in (None, 0.05):
        trainer = trainer_of(None, Calls("train_start", Trainer.finish), minutes=minutes)
        result = trainer.fit()
        assert (result.steps, result.reason) == (0, "callback")
        assert result.final is not None


@pytest.mark.parametrize("error", [CheckpointWriteError("no room for my copy"), ValueError("mine")])
def test_what_on_save_raises_ends_the_run_and_counts_as_no_failed_save(
    tmp_path: Path, error: Exception
) -> None:
    def copy(trainer: Trainer) -> None:
        raise error

    trainer = trainer_of(tmp_path / "run", Calls("save", copy), eval_interval=2)
    with pytest.raises(type(error), match=str(error)):
        trainer.fit()
    assert [info.step for info in list_checkpoints(tmp_path / "run")] == [2]


def test_a_callback_that_saves_when_a_save_is_done_gets_that_one(tmp_path: Path) -> None:
    found = []
    trainer = trainer_of(tmp_path / "run", Calls("save", lambda trainer: found.append(trainer.save())))
    last = trainer.fit().checkpoint
    assert found[-1] == last
    assert len(found) == 3  # one for each evaluation, of which the last is the end
    trainer.save()
    assert len(found) == 4


def test_a_save_after_the_best_weights_came_back_writes_nothing_and_tells_nobody(tmp_path: Path) -> None:
    train, val = tiny_split()
    told: list[int] = []
    trainer = BestAt4(
        bigram(),
        train,
        quick_config(),
        val_data=val,
        tokenizer=TOKENIZER,
        device="cpu",
        out_dir=tmp_path / "run",
        callbacks=[Calls("save", lambda trainer: told.append(trainer.step))],
    )
    last = trainer.fit().checkpoint
    assert trainer.save() == last
    assert told == [4, 8, 12]


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("stopped_at", [2, 8, 12])
def test_bad_steps_in_a_row_are_counted_on_by_a_resume(tmp_path: Path, far: bool, stopped_at: int) -> None:
    train, val = tiny_split()
    bad = range(4, 40)
    trainer = trainer_of(
        tmp_path / "run",
        device=FarBackend() if far else "cpu",
        nonfinite="skip",
        max_steps=30,
        eval_interval=50,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with poisoned(trainer, *bad):
            for record in trainer.steps():
                if record.step == stopped_at:
                    trainer.save()
                    break
        device = FarBackend() if far else "cpu"
        again = Trainer.resume(tmp_path / "run", train, val_data=val, device=device)
        assert again.step == stopped_at
        with poisoned(again, *bad), pytest.raises(NonFiniteError, match=r"step 13: .* 10th in a row"):
            again.fit()


def test_a_state_without_bad_steps_is_written_as_it_always_was(tmp_path: Path) -> None:
    trainer_of(tmp_path / "run").fit()
    assert "skipped_in_a_row" not in newest_whole_checkpoint_state(tmp_path / "run")


def newest_whole_checkpoint_state(run: Path) -> Mapping[str, object]:
    path = list_checkpoints(run)[-1].path
    return strict_json.loads((path / "state.json").read_bytes(), path="state.json")


@pytest.mark.parametrize("copied", range(1, 6))
def test_ctrl_c_while_the_best_weights_come_back_loses_neither_them_nor_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: int
) -> None:
    from harness.tiny_models import tiny_config, tiny_gpt

    train, val = tiny_split()

    def made(out: Path) -> Trainer:
        model = tiny_gpt(tiny_config("lecture", vocab_size=V, block_size=8))
        config = quick_config(max_steps=12, eval_interval=4)
        return BestAt4(model, train, config, val_data=val, tokenizer=TOKENIZER, device="cpu", out_dir=out)

    undisturbed = made(tmp_path / "one")
    undisturbed.fit()
    trainer = made(tmp_path / "two")
    copy, count = Tensor.copy_, [0]

    def interrupted(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        count[0] += 1
        if count[0] == copied:
            raise KeyboardInterrupt
        return copy(self, *args, **kwargs)  # type: ignore[arg-type]  # passed on as they come

    put_into = Contents.put_into

    def putting(self: Contents, model: torch.nn.Module) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "copy_", interrupted)
            put_into(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(Contents, "put_into", putting)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
    saved = read_checkpoint(trainer.save()).files["model.safetensors"]
    last = read_checkpoint(undisturbed.save()).files["model.safetensors"]
    assert saved[-1000:] == last[-1000:]  # behind the header, which has ids of the save
    trainer.fit()
    assert same_tensors(trainer.model.state_dict(), undisturbed.model.state_dict())


def test_a_resume_that_fails_at_its_last_read_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = tiny_split()
    trainer_of(tmp_path / "run").fit()
    model = BigramLM(V)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def no_memory(*args: object) -> None:
        raise torch.OutOfMemoryError("no room for the best weights")

    monkeypatch.setattr(resume_module, "_best_weights", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        Trainer.resume(tmp_path / "run", train, val_data=val, model=model, device="cpu")
    assert same_tensors(model.state_dict(), before)


def test_generators_that_are_none_are_refused_before_a_callback_has_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = tiny_split()
    trainer_of(tmp_path / "run", Noise()).fit()
    noise = Noise()

    def damaged(run: object) -> Checkpoint:
        found = newest_whole_checkpoint(run)  # type: ignore[arg-type]  # passed on as it comes
        rng = {"numpy": [1, 0, 0.0], "python": [99, None]}
        return Checkpoint(info=found.info, files=found.files, state={**found.state, "rng": rng})

    monkeypatch.setattr(resume_module, "newest_whole_checkpoint", damaged)
    with pytest.raises(CheckpointCorruptError, match="no valid generator states"):
        Trainer.resume(tmp_path / "run", train, val_data=val, device="cpu", callbacks=[noise])
    assert noise.drawn == []


@pytest.mark.parametrize("max_steps", [12, 25])
def test_a_new_end_of_a_repetition_is_saved_at_once(tmp_path: Path, max_steps: int) -> None:
    train, val = tiny_split()
    recorded = Timetable(evaluations=(3, 7))
    trainer = Trainer(
        bigram(),
        train,
        quick_config(max_steps=12, save_interval=5),
        val_data=val,
        tokenizer=TOKENIZER,
        device="cpu",
        out_dir=tmp_path / "run",
        timetable=recorded,
    )
    for record in trainer.steps():
        if record.step == 5:
            break
    assert "timetable" in newest_whole_checkpoint_state(tmp_path / "run")
    again = Trainer.resume(tmp_path / "run", train, val_data=val, device="cpu", max_steps=max_steps)
    next(again.steps())  # and then it is killed
    state = newest_whole_checkpoint_state(tmp_path / "run")
    assert "timetable" not in state
    assert isinstance(state["config"], dict)
    assert state["config"]["max_steps"] == max_steps


@pytest.mark.parametrize("far", [False, True])
def test_warnings_point_at_the_line_that_called_the_trainer(tmp_path: Path, far: bool) -> None:
    train, val = tiny_split()
    trainer = trainer_of(tmp_path / "run", device=FarBackend() if far else "cpu", nonfinite="skip")
    with poisoned(trainer, 3), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit()
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(torch_threads + 1)
        try:
            Trainer.resume(tmp_path / "run", train, val_data=val, device="cpu")
        finally:
            torch.set_num_threads(torch_threads)
    assert {warning.filename for warning in caught} == {__file__}
    messages = " ".join(str(warning.message) for warning in caught)
    assert "step 3 was skipped" in messages
    assert "not bit for bit" in messages
