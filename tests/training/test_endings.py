"""How a run ends, what callbacks may do to it, and which weights it leaves in the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from harness.tiny_training import TOKENIZER, quick_config, same_tensors, tensors_of, tiny_split
from typing_extensions import override

from charlm import BigramLM, EvalResult, Trainer
from charlm.models.saving import load_model
from charlm.training import (
    Callback,
    EvalRecord,
    SampleRecord,
    StepRecord,
    TrainResult,
    list_checkpoints,
)

V = TOKENIZER.vocab_size


class Scripted(Trainer):
    """A trainer whose validation losses are given, in order; the last one stays."""

    losses: tuple[float, ...] = (1.0,)

    @override
    def evaluate(self, data: object = None, *, max_chars: int | None = None) -> EvalResult:
        result = super().evaluate(max_chars=max_chars)
        loss = self.losses[min(len(self.history), len(self.losses) - 1)]
        return dataclasses.replace(result, loss_nats=loss)


def scripted(losses: tuple[float, ...], out_dir: Path | None = None, **config: object) -> Scripted:
    train, val = tiny_split()
    torch.manual_seed(0)
    settings = quick_config(**{"eval_interval": 2, **config})
    trainer = Scripted(BigramLM(V), train, settings, val_data=val, device="cpu", out_dir=out_dir)
    trainer.losses = losses
    return trainer


def weights_after(trainer: Trainer) -> dict[int, dict[str, torch.Tensor]]:
    """Train to the end and return the weights after each step."""
    found = {}
    for record in trainer.steps():
        found[record.step] = {k: t.clone() for k, t in trainer.model.state_dict().items()}
    return found


def test_the_best_weights_come_back_at_the_end() -> None:
    trainer = scripted((3.0, 1.0, 2.0))
    weights = weights_after(trainer)
    result = trainer.result()
    assert (result.best_step, result.steps) == (4, 12)
    assert result.best is not None
    assert result.best.loss_nats == 1.0
    assert result.final is not None
    assert result.final.loss_nats == 2.0
    assert [e.is_best for e in result.history] == [True, True, False, False, False, False]
    assert same_tensors(trainer.model.state_dict(), weights[4])


def test_without_restore_best_the_last_weights_stay() -> None:
    trainer = scripted((1.0, 2.0), restore_best=False)
    weights = weights_after(trainer)
    assert same_tensors(trainer.model.state_dict(), weights[12])


def test_equal_losses_keep_the_earlier_best() -> None:
    trainer = scripted((1.0, 1.0))
    weights_after(trainer)
    assert trainer.result().best_step == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_never_the_best(bad: float) -> None:
    trainer = scripted((bad, 2.0, bad))
    trainer.fit()
    assert trainer.result().best_step == 4
    only_bad = scripted((bad,))
    weights = weights_after(only_bad)
    assert only_bad.result().best is None
    assert same_tensors(only_bad.model.state_dict(), weights[12])


def test_patience_counts_evaluations_without_a_new_best() -> None:
    trainer = scripted((3.0, 2.0, 2.5, 2.1, 1.0), patience=2)
    result = trainer.fit()
    assert (result.steps, result.reason, result.best_step) == (8, "patience", 4)


def test_a_new_best_starts_patience_anew() -> None:
    result = scripted((3.0, 3.5, 2.0, 2.5, 1.0, 1.5), patience=2).fit()
    assert (result.steps, result.reason) == (12, "max_steps")


def test_time_ends_a_run_with_its_evaluation_and_checkpoint(tmp_path: Path) -> None:
    trainer = scripted((1.0,), tmp_path, max_seconds=1e-9)
    result = trainer.fit()
    assert (result.steps, result.reason) == (1, "max_seconds")
    assert [e.step for e in result.history] == [1]
    assert [info.step for info in list_checkpoints(tmp_path)] == [1]


def test_the_time_of_the_run_leaves_out_what_the_caller_does() -> None:
    import time

    trainer = scripted((1.0,))
    for _ in trainer.steps():
        time.sleep(0.05)
    assert 0 < trainer.seconds < 12 * 0.05


class Diary(Callback):
    """Writes down every call."""

    def __init__(self, name: str, diary: list[str]) -> None:
        self.name, self.diary = name, diary

    @override
    def on_train_start(self, trainer: Trainer) -> None:
        self.diary.append(f"{self.name} start {trainer.step}")

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.diary.append(f"{self.name} step {record.step}")

    @override
    def on_evaluate(self, trainer: Trainer, evaluation: EvalRecord) -> None:
        self.diary.append(f"{self.name} evaluate {evaluation.step}")

    @override
    def on_sample(self, trainer: Trainer, sample: SampleRecord) -> None:
        self.diary.append(f"{self.name} sample {sample.step} {len(sample.text)}")

    @override
    def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
        assert checkpoint == trainer.checkpoint
        self.diary.append(f"{self.name} save {checkpoint.name[5:17].lstrip('0')}")

    @override
    def on_train_end(self, trainer: Trainer, result: TrainResult) -> None:
        self.diary.append(f"{self.name} end {result.steps} {result.reason}")


def test_callbacks_run_in_their_order_at_every_turning_point(tmp_path: Path) -> None:
    diary: list[str] = []
    train, val = tiny_split()
    config = quick_config(max_steps=3, eval_interval=2, save_interval=3, sample_interval=2, sample_chars=4)
    Trainer(
        BigramLM(V),
        train,
        config,
        val_data=val,
        device="cpu",
        out_dir=tmp_path,
        tokenizer=TOKENIZER,
        callbacks=[Callback(), Diary("a", diary), Diary("b", diary)],
    ).fit()
    assert diary[::2] == [entry.replace("b", "a", 1) for entry in diary[1::2]]
    assert diary[::2] == [
        "a start 0",
        "a step 1",
        "a step 2",
        "a sample 2 4",
        "a evaluate 2",
        "a save 2",  # the best so far, so that a resume finds its weights
        "a step 3",
        "a evaluate 3",
        "a save 3",
        "a end 3 max_steps",
    ]


class Stopper(Callback):
    """Stops the run at one turning point."""

    def __init__(self, where: str) -> None:
        self.where = where

    def _at(self, where: str, trainer: Trainer) -> None:
        if self.where == where and trainer.step in {0, 3, 4}:
            trainer.finish()

    @override
    def on_train_start(self, trainer: Trainer) -> None:
        self._at("start", trainer)

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self._at("step", trainer)

    @override
    def on_evaluate(self, trainer: Trainer, evaluation: EvalRecord) -> None:
        self._at("evaluate", trainer)

    @override
    def on_sample(self, trainer: Trainer, sample: SampleRecord) -> None:
        self._at("sample", trainer)

    @override
    def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
        self._at("save", trainer)


@pytest.mark.parametrize(
    ("where", "step"),
    [("start", 0), ("step", 3), ("evaluate", 4), ("sample", 3), ("save", 3), ("loop", 3)],
)
def test_stop_ends_the_run_evaluated_and_saved_wherever_it_is_called(
    tmp_path: Path, where: str, step: int
) -> None:
    train, val = tiny_split()
    config = quick_config(eval_interval=4, save_interval=3, sample_interval=3, sample_chars=2)
    diary: list[str] = []
    trainer = Trainer(
        BigramLM(V),
        train,
        config,
        val_data=val,
        device="cpu",
        out_dir=tmp_path,
        tokenizer=TOKENIZER,
        callbacks=[Stopper(where), Diary("a", diary)],
    )
    for record in trainer.steps():
        if where == "loop" and record.step == 3:
            trainer.finish()
    result = trainer.result()
    assert (result.steps, result.reason) == (step, "callback")
    assert trainer.last is not None
    assert trainer.last.step == step
    newest = list_checkpoints(tmp_path)[-1]
    assert (newest.step, newest.path) == (step, result.checkpoint)
    assert newest.val_loss == trainer.last.result.loss_nats
    assert diary[-1] == f"a end {step} callback"


def test_callbacks_may_evaluate_and_save(tmp_path: Path) -> None:
    class Busy(Callback):
        def __init__(self) -> None:
            self.results: list[EvalResult] = []

        @override
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            if record.step in {1, 4}:
                self.results.append(trainer.evaluate())
                assert trainer.save().is_dir()

    train, val = tiny_split()
    busy = Busy()
    trainer = Trainer(
        BigramLM(V),
        train,
        quick_config(keep_last=9),
        val_data=val,
        device="cpu",
        out_dir=tmp_path,
        callbacks=[busy],
    )
    result = trainer.fit()
    assert [e.step for e in result.history] == [4, 8, 12]  # evaluations of its own are not the run's
    assert busy.results[1] == result.history[0].result
    infos = list_checkpoints(tmp_path)
    assert [info.step for info in infos] == [1, 4, 8, 12]  # the later save of one step replaces the earlier
    assert infos[1].val_loss == result.history[0].result.loss_nats


def test_after_the_best_weights_came_back_the_last_step_is_not_lost(tmp_path: Path) -> None:
    trainer = scripted((1.0, 2.0), tmp_path, max_steps=4)
    weights = weights_after(trainer)
    last = trainer.checkpoint
    assert trainer.save() == last  # not the best weights under the last step's name
    assert last is not None
    assert same_tensors(load_model(last, BigramLM).state_dict(), weights[4])
    assert same_tensors(trainer.model.state_dict(), weights[2])
    trainer.fit()
    assert same_tensors(trainer.model.state_dict(), weights[2])


def test_a_stopped_run_goes_on_from_its_last_step_not_from_its_best() -> None:
    whole, stopped = scripted((1.0, 2.0)), scripted((1.0, 2.0))
    for record in stopped.steps():
        if record.step == 5:
            stopped.finish()
    at_the_best = {k: t.clone() for k, t in stopped.model.state_dict().items()}
    rest = list(stopped.steps())
    whole.fit()
    assert rest[-1].step == 12
    assert same_tensors(tensors_of(stopped), tensors_of(whole))
    assert same_tensors(stopped.model.state_dict(), at_the_best)


def test_patience_counts_the_scheduled_evaluations_only(tmp_path: Path) -> None:
    """A run that is stopped and resumed between two evaluations ends where the whole one does."""
    whole = scripted((1.0, 2.0), patience=3, eval_interval=4, max_steps=40).fit()
    assert (whole.steps, whole.reason) == (16, "patience")

    class StopAt(Callback):
        @override
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            if record.step in (6, 7):
                trainer.finish()

    train, val = tiny_split()
    config = quick_config(patience=3, eval_interval=4, max_steps=40)
    parts = Scripted(
        BigramLM(V), train, config, val_data=val, device="cpu", out_dir=tmp_path, callbacks=[StopAt()]
    )
    parts.losses = (1.0, 2.0)
    assert parts.fit().steps == 6
    for expected in (7, 16):
        again = Scripted.resume(tmp_path, train, val_data=val, device="cpu", callbacks=[StopAt()])
        again.losses = (2.0,)
        assert again.fit().steps == expected
    assert again.result().reason == "patience"


def test_a_run_that_ended_by_patience_stays_ended(tmp_path: Path) -> None:
    trainer = scripted((1.0, 2.0), tmp_path, patience=2, max_steps=40)
    assert (trainer.fit().steps, trainer.result().reason) == (6, "patience")
    assert trainer.fit().steps == 6
    train, val = tiny_split()
    again = Trainer.resume(tmp_path, train, val_data=val, device="cpu")
    assert (again.fit().steps, again.result().reason) == (6, "patience")


def test_a_run_that_loses_its_patience_at_its_last_step_has_made_all_steps(tmp_path: Path) -> None:
    trainer = scripted((1.0, 2.0, 3.0), tmp_path, eval_interval=2, max_steps=6, patience=2)
    assert (trainer.fit().reason, trainer.fit().reason) == ("max_steps", "max_steps")
