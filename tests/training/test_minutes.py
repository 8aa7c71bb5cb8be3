"""Runs with `minutes`, on a clock of their own: they end in time, are repeated and resumed bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.tiny_models import tiny_config, tiny_gpt
from harness.tiny_training import (
    TOKENIZER,
    Numbers,
    PlainModule,
    quick_config,
    same_tensors,
    tensors_of,
    tiny_split,
)
from torch import Tensor
from typing_extensions import override

from charlm import BigramLM, BlockDataset, Trainer, TrainerConfig
from charlm.backends.base import DeviceBackend
from charlm.errors import (
    CheckpointError,
    CheckpointMismatchError,
    FileFormatError,
    InputError,
    TrainingInterrupted,
)
from charlm.models.gpt import GPT
from charlm.training import Callback, Timetable, read_history, read_timetable

V = TOKENIZER.vocab_size
ALL = 999_999_999_999


class SlowDevice(DeviceBackend):
    """A device on which a batch takes its time, by a clock of its own that goes on in no other way."""

    now = 0.0

    def __init__(self, seconds: float = 0.5) -> None:
        super().__init__("cpu")
        self.seconds = seconds

    @override
    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        SlowDevice.now += self.seconds
        return super().to_device(*tensors)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowDevice, "now", 0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: SlowDevice.now)


def model() -> GPT:
    torch.manual_seed(3)
    return tiny_gpt(tiny_config("gpt2", vocab_size=V, n_embd=16, n_layer=1, block_size=8, dropout=0.1))


def minute(**changes: Any) -> TrainerConfig:
    return quick_config(**{"minutes": 1.0, "max_steps": ALL, "eval_interval": None, **changes})


def trainer(device: SlowDevice, out_dir: Path | None = None, **options: Any) -> Trainer:
    train, val = tiny_split()
    config = options.pop("config", minute())
    given = {"val_data": val, "tokenizer": TOKENIZER, **options}
    return Trainer(model(), train, config, out_dir=out_dir, device=device, **given)


def state_of(run: Path) -> dict[str, Any]:
    newest = max((run / "checkpoints").iterdir(), key=lambda path: path.name)
    state: dict[str, Any] = json.loads((newest / "state.json").read_bytes())
    return state


def test_a_run_takes_its_minutes(tmp_path: Path) -> None:
    subject = trainer(SlowDevice(), tmp_path / "run")
    result = subject.fit()
    assert result.reason == "minutes"
    assert 57 <= result.seconds == SlowDevice.now <= 63
    timetable = subject.timetable
    assert timetable is not None
    assert timetable.end == result.steps == subject.expected_steps
    assert [evaluation.step for evaluation in result.history] == list(timetable.evaluations)
    assert timetable.evaluations[-1] == result.steps
    assert state_of(tmp_path / "run")["timetable"] == {**timetable.to_dict(), "repeats": False}
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    logged = [(line["step"], line["end"]) for line in lines if line["kind"] == "end"]
    assert logged == list(timetable.ends)
    assert read_history(tmp_path / "run").eval_steps.tolist() == list(timetable.evaluations)


def test_what_a_program_did_before_counts(tmp_path: Path) -> None:
    subject = trainer(SlowDevice())
    subject.seconds += 30
    assert 57 <= subject.fit().seconds <= 63
    assert SlowDevice.now <= 33


def test_what_a_caller_does_between_steps_does_not_count() -> None:
    subject = trainer(SlowDevice())
    for _ in subject.steps():
        SlowDevice.now += 10
    assert 57 <= subject.seconds <= 63


def test_a_repetition_gives_the_same_bits_and_the_same_best_checkpoint(tmp_path: Path) -> None:
    first = trainer(SlowDevice(), tmp_path / "first", callbacks=[seen := Numbers()])
    result = first.fit()
    again = trainer(
        SlowDevice(1.7),
        tmp_path / "again",
        timetable=read_timetable(tmp_path / "first"),
        callbacks=[also := Numbers()],
    )
    repeated = again.fit()
    assert also.steps == seen.steps
    assert same_tensors(tensors_of(again), tensors_of(first))
    assert (repeated.steps, repeated.best_step, repeated.best) == (
        result.steps,
        result.best_step,
        result.best,
    )
    assert repeated.seconds > 120  # on a slower machine, and yet the same
    assert read_timetable(tmp_path / "again") == read_timetable(tmp_path / "first")


class StopAt(Callback):
    """Asks for a stop after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_step_end(self, trainer: Trainer, record: Any) -> None:
        if record.step == self.step:
            trainer.interrupt()


def _stops() -> list[int]:
    """Return steps in the flat part, at its end, at each correction and near the end of the run below."""
    return [1, 39, 40, 60, 76]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "slower"), list(zip(_stops(), itertools.cycle([0.3, 1.0, 2.5]), strict=False))
)
def test_a_stop_and_a_resume_in_any_phase_give_the_bits_of_their_record(
    tmp_path: Path, step: int, slower: float
) -> None:
    train, val = tiny_split()
    first = trainer(SlowDevice(), tmp_path / "run", callbacks=[StopAt(step)])
    with pytest.raises(TrainingInterrupted):
        first.fit()
    used, before = first.seconds, first.timetable
    device = SlowDevice(0.5 * slower)
    resumed = Trainer.resume(tmp_path / "run", train, val_data=val, device=device, callbacks=[Callback()])
    assert resumed.seconds == pytest.approx(used)
    result = resumed.fit()
    assert 54 <= result.seconds <= 66
    timetable = read_timetable(tmp_path / "run")
    assert before is not None
    assert timetable.ends[: len(before.ends)] == before.ends
    again = trainer(SlowDevice(), tmp_path / "again", timetable=timetable)
    assert again.fit().best == result.best
    assert same_tensors(tensors_of(again), tensors_of(resumed))


@pytest.mark.parametrize("step", [10, 70])
def test_a_killed_run_goes_on_from_its_checkpoint_with_the_time_it_had_used(
    tmp_path: Path, step: int
) -> None:
    train, val = tiny_split()
    first = trainer(SlowDevice(), tmp_path / "run", config=minute(save_interval=4))
    for record in first.steps():
        if record.step == step:
            break
    resumed = Trainer.resume(tmp_path / "run", train, val_data=val, device=SlowDevice())
    assert step - 4 < resumed.step <= step
    result = resumed.fit()
    assert 57 <= result.seconds <= 63
    again = trainer(SlowDevice(), timetable=read_timetable(tmp_path / "run"), config=minute(save_interval=4))
    assert again.fit().best == result.best
    assert same_tensors(tensors_of(again), tensors_of(resumed))


def test_a_repetition_is_resumed_as_one(tmp_path: Path) -> None:
    train, val = tiny_split()
    first = trainer(SlowDevice(), tmp_path / "first")
    first.fit()
    timetable = read_timetable(tmp_path / "first")
    again = trainer(SlowDevice(9.0), tmp_path / "again", timetable=timetable, callbacks=[StopAt(50)])
    with pytest.raises(TrainingInterrupted):
        again.fit()
    resumed = Trainer.resume(
        tmp_path / "again", train, val_data=val, device=SlowDevice(9.0), callbacks=[Callback()]
    )
    assert resumed.fit().steps == timetable.end
    assert same_tensors(tensors_of(resumed), tensors_of(first))


def test_an_ended_run_stays_ended(tmp_path: Path) -> None:
    train, val = tiny_split()
    result = trainer(SlowDevice(), tmp_path / "run").fit()
    again = Trainer.resume(tmp_path / "run", train, val_data=val, device=SlowDevice())
    assert (again.fit().steps, again.result().reason) == (result.steps, "minutes")


def test_a_run_whose_time_was_used_up_in_between_ends_where_it_is(tmp_path: Path) -> None:
    train, val = tiny_split()
    first = trainer(SlowDevice(), tmp_path / "run", callbacks=[StopAt(70)])
    with pytest.raises(TrainingInterrupted):
        first.fit()
    resumed = Trainer.resume(
        tmp_path / "run", train, val_data=val, device=SlowDevice(), callbacks=[Callback()]
    )
    resumed.seconds += 100  # reading the text again took that long
    result = resumed.fit()
    assert (result.steps, result.reason) == (70, "minutes")
    assert result.final is not None
    assert read_timetable(tmp_path / "run").end == 70


def test_max_steps_takes_the_place_of_the_minutes_at_a_resume(tmp_path: Path) -> None:
    train, val = tiny_split()
    steps = trainer(SlowDevice(), tmp_path / "run").fit().steps
    resumed = Trainer.resume(tmp_path / "run", train, val_data=val, device=SlowDevice(), max_steps=steps + 9)
    assert resumed.timetable is None
    result = resumed.fit()
    assert (result.steps, result.reason) == (steps + 9, "max_steps")
    with pytest.raises(CheckpointError, match="a number of steps, not a time"):
        read_timetable(tmp_path / "run")


def test_of_a_long_validation_text_a_part_is_scored_each_time(tmp_path: Path) -> None:
    train, _ = tiny_split()
    val = BlockDataset(torch.arange(9_000) % V, 8)

    class ByLength(SlowDevice):
        @override
        def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            SlowDevice.now += 0.002 * tensors[0].numel()
            return DeviceBackend.to_device(self, *tensors)

    subject = trainer(ByLength(), tmp_path / "run", val_data=val)
    result = subject.fit()
    timetable = subject.timetable
    assert timetable is not None
    assert timetable.eval_chars is not None
    assert 1_000 <= timetable.eval_chars <= 1_200  # a twenty-fifth of the minute is 2.4 s: 1,200 characters
    assert result.final is not None
    assert result.final.n_chars <= timetable.eval_chars
    assert result.final.n_left_out == 8_999 - result.final.n_chars
    assert result.best == subject.evaluate(max_chars=timetable.eval_chars)
    assert subject.evaluate().n_left_out == 0
    assert sum(evaluation.seconds for evaluation in result.history) <= 6.1
    assert result.seconds <= 63
    assert state_of(tmp_path / "run")["best"]["n_left_out"] == result.final.n_left_out
    history = read_history(tmp_path / "run")
    assert history.eval_part == (result.final.n_chars, 8_999)
    train, _ = tiny_split()
    resumed = Trainer.resume(tmp_path / "run", train, val_data=val, device=SlowDevice())
    assert resumed.last is not None
    assert resumed.last.result == result.final


def test_eval_chars_is_kept_to_with_and_without_minutes(tmp_path: Path) -> None:
    subject = trainer(SlowDevice(), tmp_path / "run", config=quick_config(eval_chars=40))
    result = subject.fit()
    assert subject.timetable is None
    assert result.best is not None
    assert result.best.n_chars == 40
    assert result.best == subject.evaluate(max_chars=40)
    timed = trainer(SlowDevice(), config=minute(eval_chars=40)).fit()
    assert timed.best is not None
    assert timed.best.n_chars == 40


def test_without_validation_text_a_run_is_saved_at_the_same_times(tmp_path: Path) -> None:
    saved: list[int] = []

    class Saves(Callback):
        @override
        def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
            saved.append(trainer.step)

    result = trainer(SlowDevice(), tmp_path / "run", val_data=None, callbacks=[Saves()]).fit()
    assert 57 <= result.seconds <= 63
    assert 4 <= len(saved) <= 6


def test_any_module_is_trained_within_minutes(tmp_path: Path) -> None:
    train, val = tiny_split()
    result = Trainer(
        PlainModule(V), train, minute(), val_data=val, out_dir=tmp_path / "run", device=SlowDevice()
    ).fit()
    assert (result.reason, read_timetable(tmp_path / "run").end) == ("minutes", result.steps)


def test_a_cosine_is_stopped_by_the_clock() -> None:
    config = minute(schedule="cosine", max_steps=1_000)
    result = trainer(SlowDevice(), config=config).fit()
    assert result.reason == "minutes"
    assert 57 <= result.seconds <= 63


def test_max_steps_may_come_first() -> None:
    result = trainer(SlowDevice(), config=minute(max_steps=30)).fit()
    assert (result.steps, result.reason) == (30, "max_steps")


def test_a_run_that_has_not_ended_cannot_be_repeated(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        trainer(SlowDevice(), tmp_path / "run", callbacks=[StopAt(50)]).fit()
    with pytest.raises(CheckpointError, match="has not ended yet"):
        read_timetable(tmp_path / "run")


def test_a_run_without_minutes_has_no_timetable(tmp_path: Path) -> None:
    subject = trainer(SlowDevice(), tmp_path / "run", config=quick_config())
    subject.fit()
    assert subject.timetable is None
    assert "timetable" not in state_of(tmp_path / "run")
    with pytest.raises(CheckpointError, match="a number of steps, not a time"):
        read_timetable(tmp_path / "run")


def test_a_damaged_timetable_is_refused_before_anything_changes(tmp_path: Path) -> None:
    from charlm.runs import checkpoint as module

    train, val = tiny_split()
    subject = trainer(SlowDevice(), tmp_path / "run")
    subject.fit()
    whole = module.read_checkpoint

    def with_other_state(path: Path, run_id: str | None = None) -> module.Checkpoint:
        found = whole(path, run_id) if run_id is not None else whole(path)
        bad = {**Timetable().to_dict(), "ends": [[5, 1]], "repeats": False}
        return dataclasses.replace(found, state={**found.state, "timetable": bad})

    from charlm.runs import choosing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "read_checkpoint", with_other_state)
        with pytest.raises(FileFormatError, match="holds no timetable"):
            Trainer.resume(tmp_path / "run", train, val_data=val, device=SlowDevice())


def test_the_timetable_of_another_text_fails_nowhere_but_says_the_same_steps() -> None:
    timetable = Timetable(ends=((4, 10),), evaluations=(5, 10))
    train, val = tiny_split()
    config = minute()
    result = Trainer(BigramLM(V), train, config, val_data=val, device=SlowDevice(), timetable=timetable).fit()
    assert result.steps == 10
    assert [evaluation.step for evaluation in result.history] == [5, 10]


def test_the_data_must_still_be_the_same(tmp_path: Path) -> None:
    train, val = tiny_split()
    with pytest.raises(TrainingInterrupted):
        trainer(SlowDevice(), tmp_path / "run", callbacks=[StopAt(20)]).fit()
    with pytest.raises(CheckpointMismatchError):
        Trainer.resume(tmp_path / "run", val, val_data=train, device=SlowDevice())


def test_a_timetable_belongs_to_a_run_with_minutes() -> None:
    with pytest.raises(InputError, match="the config must have them, too"):
        trainer(SlowDevice(), config=quick_config(), timetable=Timetable(ends=((5, 20),)))


def test_patience_counts_in_a_repetition_what_it_counted_in_the_run(tmp_path: Path) -> None:
    train, val = tiny_split()

    class EndAt(Callback):
        @override
        def on_step_end(self, trainer: Trainer, record: Any) -> None:
            if record.step in {25, 35}:
                trainer.finish()

    def resumed() -> Trainer:
        device = SlowDevice(0.1)
        return Trainer.resume(tmp_path / "run", train, val_data=val, device=device, callbacks=[EndAt()])

    config = minute(patience=2, learning_rate=0.0, eval_interval=10)
    assert trainer(SlowDevice(0.1), tmp_path / "run", config=config, callbacks=[EndAt()]).fit().steps == 25
    assert resumed().fit().steps == 35
    assert resumed().fit().steps == 40  # 25 is the best, 30 and 40 are no better, and 35 does not count
    timetable = read_timetable(tmp_path / "run")
    assert (timetable.evaluations, timetable.unscheduled) == ((25, 30, 35, 40), (25, 35))
    again = trainer(SlowDevice(0.1), config=config, timetable=timetable).fit()
    assert (again.steps, again.reason) == (40, "patience")


def test_on_a_device_that_works_on_its_own_the_clock_waits_for_it() -> None:
    class Working(SlowDevice):
        waited = 0

        @property
        @override
        def asynchronous(self) -> bool:
            return True

        @override
        def synchronize(self) -> None:
            self.waited += 1

    device = Working()
    steps = trainer(device, config=minute(log_interval=1_000)).fit().steps
    assert device.waited >= steps
    device = Working()
    trainer(device, config=quick_config(log_interval=1_000)).fit()
    assert device.waited == 0


@pytest.mark.parametrize("timetable", [[(4, 10)], {"ends": []}, "runs/one"])
def test_a_timetable_must_be_one(timetable: Any) -> None:
    with pytest.raises(InputError, match="timetable must be a Timetable"):
        trainer(SlowDevice(), timetable=timetable)


def test_a_run_that_lost_its_patience_is_repeated_up_to_there(tmp_path: Path) -> None:
    config = minute(patience=1, learning_rate=0.0)  # nothing is learnt: the second evaluation is no better
    result = trainer(SlowDevice(), tmp_path / "run", config=config).fit()
    assert result.reason == "patience"
    timetable = read_timetable(tmp_path / "run")
    again = trainer(SlowDevice(), config=config, timetable=timetable).fit()
    assert (again.steps, again.reason, again.best) == (result.steps, "patience", result.best)


def test_after_new_steps_losses_are_still_of_the_same_part_of_the_text(tmp_path: Path) -> None:
    train, _ = tiny_split()
    val = BlockDataset(torch.arange(9_000) % V, 8)

    class ByLength(SlowDevice):
        @override
        def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            SlowDevice.now += 0.002 * tensors[0].numel()
            return DeviceBackend.to_device(self, *tensors)

    first = trainer(ByLength(), tmp_path / "run", val_data=val, config=minute(minutes=0.5)).fit()
    resumed = Trainer.resume(
        tmp_path / "run", train, val_data=val, device=ByLength(), max_steps=first.steps + 5
    )
    result = resumed.fit()
    assert result.final is not None
    assert first.final is not None
    assert result.final.n_left_out == first.final.n_left_out > 0
    assert result.steps == first.steps + 5
