"""What ends or changes a run in one process does so in all of them, and what differs is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.threads import in_world, outcomes
from harness.tiny_models import tiny_config, tiny_gpt
from harness.tiny_training import (
    TEXT,
    TOKENIZER,
    PlainModule,
    quick_config,
    same_tensors,
    tensors_of,
    tiny_split,
)
from typing_extensions import override

from charlm import BigramLM, BlockDataset, Trainer
from charlm.backends.world import World
from charlm.errors import (
    CheckpointWriteError,
    DataError,
    InputError,
    NonFiniteError,
    PeerError,
    TrainingInterrupted,
)
from charlm.evaluation.evaluate import evaluate, evaluate_together
from charlm.training import Callback, StepRecord, list_checkpoints


def trainer_in(world: World, folder: Path | None = None, **changes: Any) -> Trainer:
    train, val = tiny_split()
    callbacks = changes.pop("callbacks", [])
    return Trainer(
        BigramLM(TOKENIZER.vocab_size),
        train,
        quick_config(**{"accumulate": 4, "batch_size": 1, **changes}),
        val_data=val,
        tokenizer=TOKENIZER,
        out_dir=folder,
        device="cpu",
        callbacks=callbacks,
    )


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, work: Callable[[Trainer], object]) -> None:
        self.step, self.work = step, work

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == self.step:
            self.work(trainer)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_in_any_process_stops_all_and_is_saved_once(tmp_path: Path, rank: int) -> None:
    def train(world: World) -> int:
        trainer = trainer_in(world, tmp_path / "run")
        for record in trainer.steps():
            if record.step == 5 and world.rank == rank:
                trainer.interrupt()
        return trainer.step

    found = outcomes(2, train)
    assert [type(one) for one in found] == [TrainingInterrupted] * 2
    assert [info.step for info in list_checkpoints(tmp_path / "run")][-1] == 6


def test_a_save_asked_for_in_another_process_is_done_by_the_first(tmp_path: Path) -> None:
    def train(world: World) -> None:
        trainer = trainer_in(world, tmp_path / "run", keep_last=9, eval_interval=None, max_steps=6)
        for record in trainer.steps():
            if record.step == 2 and world.rank == 1:
                trainer.request_save()
                with pytest.raises(InputError, match="save must be called in the process of rank 0"):
                    trainer.save()

    in_world(2, train)
    assert [info.step for info in list_checkpoints(tmp_path / "run")] == [3, 6]


def test_the_first_process_ends_the_run_of_all() -> None:
    def train(world: World) -> tuple[int, str]:
        result = trainer_in(world, callbacks=[At(3, lambda trainer: trainer.finish())]).fit()
        return result.steps, result.reason

    assert in_world(4, train) == [(3, "callback")] * 4


@pytest.mark.parametrize("rank", [0, 1])
def test_who_steps_may_finish_between_two_steps_in_one_process(rank: int) -> None:
    def train(world: World) -> int:
        trainer = trainer_in(world)
        for record in trainer.steps():
            if record.step == 4 and world.rank == rank:
                trainer.finish()
        return trainer.step

    assert in_world(2, train) == [4, 4]


@pytest.mark.parametrize(
    "ends",
    [{"max_seconds": 1e-9}, {"minutes": 0.01, "max_steps": 999_999}, {"patience": 1, "learning_rate": 0.0}],
)
def test_the_clock_of_the_first_process_and_patience_end_all_at_one_step(ends: dict[str, Any]) -> None:
    def train(world: World) -> tuple[int, str, list[float]]:
        result = trainer_in(world, **ends).fit()
        return result.steps, result.reason, [record.result.loss_nats for record in result.history]

    first, second = in_world(2, train)
    assert first == second
    assert first[1] == next(iter(ends))


def test_a_failure_in_one_process_is_told_to_all_with_its_reason(tmp_path: Path) -> None:
    def train(world: World) -> None:
        trainer = trainer_in(world, tmp_path / "run")
        run = trainer._stepper._backward

        def fail(step: int, *others: object) -> object:
            if step == 6 and world.rank == 1:
                raise MemoryError("no room")
            return run(step, *others)  # type: ignore[arg-type]

        trainer._stepper._backward = fail  # type: ignore[method-assign, assignment]
        trainer.fit()

    first, second = outcomes(2, train)
    assert isinstance(second, MemoryError)
    assert isinstance(first, PeerError)
    assert "no room" in str(first)
    assert first.rank == 1
    assert list_checkpoints(tmp_path / "run")[-1].step == 4


def test_a_failed_save_and_a_failing_callback_end_all(tmp_path: Path) -> None:
    def train(world: World) -> None:
        trainer_in(world, tmp_path / "run", callbacks=[At(5, lambda trainer: tmp_path / 0)]).fit()  # type: ignore[operator]

    first, *others = outcomes(4, train)
    assert isinstance(first, TypeError)
    assert all(isinstance(error, PeerError) and error.rank == 0 for error in others)


def test_a_last_save_that_fails_ends_all_and_older_checkpoints_stay(tmp_path: Path) -> None:
    def train(world: World) -> None:
        trainer = trainer_in(world, tmp_path / "run", keep_last=9)
        for record in trainer.steps():
            if record.step == 8 and world.is_first:
                assert trainer._writer is not None
                trainer._writer.write = full_disk  # type: ignore[method-assign, assignment]

    def full_disk(*_: object, **__: object) -> None:
        raise CheckpointWriteError("no space left")

    first, second = outcomes(2, train)
    assert isinstance(first, CheckpointWriteError)
    assert isinstance(second, PeerError)
    assert "no space left" in str(second)
    assert [info.step for info in list_checkpoints(tmp_path / "run")] == [4, 8]


def test_a_loss_that_is_not_a_number_in_one_process_ends_all_with_one_message() -> None:
    def train(world: World) -> None:
        trainer = trainer_in(world)
        run = trainer._stepper._backward

        def spoilt(step: int, model: torch.nn.Module, micro: int, count: int) -> torch.Tensor:
            loss = run(step, model, micro, count)
            return loss * float("nan") if (step, micro) == (5, 3) else loss

        trainer._stepper._backward = spoilt  # type: ignore[method-assign]
        try:
            trainer.fit()
        finally:
            ends.append(tensors_of(trainer))

    ends: list[dict[str, torch.Tensor]] = []
    first, second = outcomes(2, train)
    assert isinstance(first, NonFiniteError)
    assert isinstance(second, NonFiniteError)
    assert str(first) == str(second)
    assert first.step == 6
    assert same_tensors(*ends)


def test_other_texts_and_settings_are_refused_before_the_first_step(tmp_path: Path) -> None:
    def other_text(world: World) -> None:
        text = TEXT if world.is_first else TEXT[:-2] + "ba"
        data = BlockDataset.from_text(text, TOKENIZER, 8)
        Trainer(
            BigramLM(TOKENIZER.vocab_size), data, quick_config(accumulate=2), out_dir=tmp_path / "run"
        ).fit()

    def other_seed(world: World) -> None:
        trainer_in(world, seed=world.rank).fit()

    for error in outcomes(2, other_text):
        assert isinstance(error, DataError)
        assert "process 1 has another training text than process 0" in str(error)
    for error in outcomes(2, other_seed):
        assert isinstance(error, InputError)
        assert "process 1 has another choice of settings than process 0" in str(error)
    assert not (tmp_path / "run").exists()


def test_a_model_that_changes_its_buffers_is_refused_in_a_world_only() -> None:
    class Counts(PlainModule):
        @override
        def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            next(self.buffers()).add_(1)
            return super().forward(idx, targets)

    def train(world: World) -> int:
        model = Counts(TOKENIZER.vocab_size)
        return Trainer(model, tiny_split()[0], quick_config(accumulate=2), device="cpu").fit().steps

    assert train(World()) == 12
    for error in outcomes(2, train):
        assert isinstance(error, InputError)
        assert "the model changes its buffer 'calls' in training" in str(error)


def test_all_begin_with_the_weights_of_the_first() -> None:
    def train(world: World) -> torch.Tensor:
        trainer = trainer_in(world, max_steps=1)
        with torch.no_grad():
            next(trainer.model.parameters()).add_(world.rank)
        trainer.fit()
        return next(trainer.model.parameters()).detach()

    first, second = in_world(2, train)
    assert torch.equal(first, second)


def test_a_run_goes_on_with_any_number_of_processes_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """4, 2, 1 and 4 processes, past the first epoch and in the middle of one: every block in its place."""
    train, val = tiny_split(text=TEXT[:420])
    given = {"accumulate": 4, "batch_size": 2, "replacement": False, "optimizer": "muon", "max_steps": 24}
    visited: dict[str, dict[int, list[int]]] = {"whole": {}, "parts": {}}

    def watched(trainer: Trainer, name: str) -> Trainer:
        order = trainer._stepper._order
        assert order is not None
        starts = order.starts

        def noted(batch: int) -> torch.Tensor:
            found = starts(batch)
            assert visited[name].setdefault(batch, found.tolist()) == found.tolist()
            return found

        order.starts = noted  # type: ignore[method-assign]
        return trainer

    def begin(world: World, folder: Path, name: str, stop: int | None) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(gpt)
        trainer = Trainer(model, train, quick_config(**given), val_data=val, out_dir=folder, device="cpu")
        return steps(watched(trainer, name), stop)

    def go_on(world: World, stop: int | None) -> dict[str, torch.Tensor]:
        return steps(
            watched(Trainer.resume(tmp_path / "parts", train, val_data=val, device="cpu"), "parts"), stop
        )

    def steps(trainer: Trainer, stop: int | None) -> dict[str, torch.Tensor]:
        try:
            for record in trainer.steps():
                if record.step == stop:
                    trainer.interrupt()
        except TrainingInterrupted:
            pass
        return tensors_of(trainer)

    gpt = tiny_gpt(tiny_config(vocab_size=TOKENIZER.vocab_size, block_size=8, n_embd=8, dropout=0.1))
    wanted = begin(World(), tmp_path / "whole", "whole", None)
    in_world(4, lambda world: begin(world, tmp_path / "parts", "parts", 4))
    in_world(2, lambda world: go_on(world, 10))
    in_world(1, lambda world: go_on(world, 13))
    assert all(same_tensors(found, wanted) for found in in_world(4, lambda world: go_on(world, None)))
    assert visited["parts"] == visited["whole"]
    assert sorted(visited["whole"]) == list(range(24 * 4))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("length", [20, 400, 4_000])
@pytest.mark.parametrize("most", [None, 100])
def test_an_evaluation_that_is_shared_out_gives_the_same_figure(
    size: int, length: int, most: int | None
) -> None:
    data = BlockDataset.from_text(TEXT[:length], TOKENIZER, 8)
    model = BigramLM(TOKENIZER.vocab_size)
    alone = evaluate(model, data, batch_size=7, max_chars=most)
    together = in_world(
        size,
        lambda world: evaluate_together(world, copy.deepcopy(model), data, batch_size=7, max_chars=most),
    )
    assert together == [alone] * size
