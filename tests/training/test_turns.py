"""Who may touch a run when: saves and evaluations from other threads, hooks and handlers, and left loops."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from harness.tiny_models import tiny_config, tiny_gpt
from harness.tiny_training import TOKENIZER, quick_config, same_tensors, tensors_of, tiny_split
from typing_extensions import override

from charlm import BigramLM, EvalResult, Trainer
from charlm.errors import CheckpointWriteError, InputError, RunLockedError
from charlm.runs import writer as writer_module
from charlm.runs.checkpoint import write_checkpoint
from charlm.runs.directory import RunDirectory
from charlm.runs.log import read_metrics
from charlm.training import Callback, StepRecord, list_checkpoints
from charlm.training.turns import Turns


def bigram() -> BigramLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return BigramLM(TOKENIZER.vocab_size)


def trainer_of(out: Path | None = None, *callbacks: Callback, **changes: object) -> Trainer:
    train, val = tiny_split()
    config = quick_config(**{"save_interval": 100, "keep_last": 50, **changes})
    return Trainer(
        bigram(),
        train,
        config,
        val_data=val,
        device="cpu",
        out_dir=out,
        callbacks=callbacks,
        tokenizer=TOKENIZER,
    )


class InTheMiddle:
    """Calls something in the backward pass of one step, as a signal handler might."""

    def __init__(self, trainer: Trainer, step: int, act: Callable[[], object]) -> None:
        self._trainer, self._step, self._act = trainer, step, act
        next(trainer.model.parameters()).register_hook(self)

    def __call__(self, gradient: torch.Tensor) -> None:
        if self._trainer.step == self._step - 1:
            self._act()


def saved_steps(run: Path) -> list[int]:
    return [info.step for info in list_checkpoints(run)]


@pytest.mark.parametrize("method", ["save", "evaluate"])
def test_in_the_middle_of_a_step_its_own_thread_is_refused(method: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    InTheMiddle(trainer, 3, getattr(trainer, method))
    with pytest.raises(InputError, match=rf"{method}\(\) was called in the middle of a step"):
        trainer.fit()


def test_a_refused_save_names_what_to_call_and_that_is_fulfilled_at_the_end_of_the_step(
    tmp_path: Path,
) -> None:
    trainer, refused = trainer_of(tmp_path, restore_best=False, keep_best=0), []

    def save() -> None:
        try:
            trainer.save()
        except InputError as error:
            refused.append(str(error))
            trainer.request_save()

    InTheMiddle(trainer, 3, save)
    trainer.fit()
    assert "call request_save() there" in refused[0]
    assert saved_steps(tmp_path) == [3, 12]


def test_a_save_can_be_requested_before_the_first_step_and_between_two(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, keep_best=0)
    trainer.request_save()
    for record in trainer.steps():
        if record.step == 5:
            trainer.request_save()
    assert saved_steps(tmp_path) == [1, 6, 12]


def test_a_requested_save_that_fails_is_warned_of_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, keep_best=0)

    def full_at_2(run: RunDirectory, identity: object, *args: object, **kwargs: object) -> Path:
        if trainer.step == 2:
            raise CheckpointWriteError("the disk is full.")
        return write_checkpoint(run, identity, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(writer_module, "write_checkpoint", full_at_2)
    InTheMiddle(trainer, 2, trainer.request_save)
    with pytest.warns(RuntimeWarning, match="the disk is full"):
        trainer.fit()
    assert saved_steps(tmp_path) == [12]


@pytest.mark.parametrize("method", ["save", "request_save"])
def test_without_a_directory_nothing_can_be_saved(method: str) -> None:
    with pytest.raises(InputError, match=f"out_dir must be given to {method}"):
        getattr(trainer_of(), method)()


def test_another_thread_that_saves_or_scores_waits_for_the_end_of_the_step(tmp_path: Path) -> None:
    trainer, begun = trainer_of(tmp_path, keep_best=0), threading.Event()
    results: dict[str, object] = {}

    def ask() -> None:
        begun.wait()
        results["path"] = trainer.save()
        results["step"] = trainer.step
        results["loss"] = trainer.evaluate().loss_nats

    def in_step_5() -> None:
        begun.set()
        guest.join(0.2)  # it cannot come to its end
        results["waited"] = guest.is_alive()

    guest = threading.Thread(target=ask)
    guest.start()
    InTheMiddle(trainer, 5, in_step_5)
    losses = {}
    for record in trainer.steps():
        losses[record.step] = trainer.evaluate().loss_nats
    guest.join()
    assert results["waited"] is True
    assert saved_steps(tmp_path)[0] == 5  # before the next step begins, whoever else would like to go on
    assert results["loss"] in set(losses.values())  # of a step's end; how soon, the scheduler says


def test_between_two_steps_another_thread_saves_at_once(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, keep_best=0)
    for record in trainer.steps():
        if record.step == 4:
            guest = threading.Thread(target=trainer.save)
            guest.start()
            guest.join(30)
            assert not guest.is_alive()
            break
    assert saved_steps(tmp_path) == [4]


def test_others_that_save_and_score_change_no_step() -> None:
    alone, visited = trainer_of(), trainer_of()
    is_over = threading.Event()
    scores: list[EvalResult] = []

    def score() -> None:
        while not is_over.is_set():
            scores.append(visited.evaluate())

    guest = threading.Thread(target=score)
    guest.start()
    visited.fit()
    is_over.set()
    guest.join()
    alone.fit()
    assert scores
    assert same_tensors(tensors_of(alone), tensors_of(visited))


def test_a_callback_may_save_and_score_at_every_moment(tmp_path: Path) -> None:
    class Saves(Callback):
        @override
        def on_train_start(self, trainer: Trainer) -> None:
            self._act(trainer)

        @override
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            self._act(trainer)

        @override
        def on_evaluate(self, trainer: Trainer, evaluation: object) -> None:
            self._act(trainer)

        @override
        def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
            self._act(trainer)

        def _act(self, trainer: Trainer) -> None:
            trainer.save()
            trainer.evaluate()

    plain, busy = trainer_of(tmp_path / "plain"), trainer_of(tmp_path / "busy", Saves())
    plain.fit()
    busy.fit()
    assert saved_steps(tmp_path / "busy") == [*range(13)]
    assert same_tensors(tensors_of(plain), tensors_of(busy))


def test_what_a_callback_saves_at_a_logged_step_has_the_line_of_that_step(tmp_path: Path) -> None:
    class Crash(Callback):
        @override
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            if record.step == 4:
                trainer.save()
                raise KeyError("the process ends here")

    with pytest.raises(KeyError):
        trainer_of(tmp_path, Crash(), log_interval=2).fit()
    train, val = tiny_split()
    Trainer.resume(tmp_path, train, val_data=val, device="cpu").fit()
    steps = [
        record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "step"
    ]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_a_step_is_logged_once_though_a_callback_ends_the_run_there(tmp_path: Path) -> None:
    class End(Callback):
        @override
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            if record.step == 5:
                trainer.finish()

    trainer_of(tmp_path, End(), log_interval=2).fit()
    steps = [
        record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "step"
    ]
    assert steps == [2, 4, 5]


def is_locked(run: Path) -> bool:
    """Return whether another process would find the run locked."""
    other = RunDirectory.open(run)
    try:
        other.lock()
    except RunLockedError:
        return True
    other.unlock()
    return False


@pytest.mark.parametrize("call", ["fit", "steps", "close"])
def test_the_next_call_takes_over_from_a_loop_that_was_left(call: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    left = trainer.steps()
    for record in left:
        if record.step == 3:
            break
    assert is_locked(tmp_path)  # the loop could go on
    if call == "close":
        trainer.close()
        assert not is_locked(tmp_path)
    if call == "steps":
        assert [record.step for record in trainer.steps()] == [*range(4, 13)]
    assert next(left, None) is None or call == "fit"
    assert trainer.fit().steps == 12
    assert not is_locked(tmp_path)
    assert next(left, None) is None


def test_a_loop_that_was_left_has_ended_once_another_one_is_there(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    next(left := trainer.steps())
    next(new := trainer.steps())
    assert next(left, None) is None
    assert is_locked(tmp_path)  # by the new one
    assert next(new).step == 3
    new.close()


def test_a_loop_without_a_name_leaves_nothing_locked_and_one_with_a_name_can_be_closed(
    tmp_path: Path,
) -> None:
    trainer = trainer_of(tmp_path)
    for _ in trainer.steps():
        break
    assert not is_locked(tmp_path)
    named = trainer.steps()
    next(named)
    assert is_locked(tmp_path)
    named.close()
    assert not is_locked(tmp_path)
    trainer.close()  # nothing is left to do
    assert trainer.fit().steps == 12


def test_a_left_loop_and_its_successor_make_the_same_steps() -> None:
    whole, parts = trainer_of(), trainer_of()
    whole.fit()
    loops = []
    for _ in range(5):
        loops.append(parts.steps())
        next(loops[-1])
        next(loops[-1])
    parts.fit()
    assert same_tensors(tensors_of(whole), tensors_of(parts))


@pytest.mark.parametrize("method", ["fit", "close", "steps"])
def test_in_the_middle_of_a_step_no_other_loop_can_take_over(method: str, tmp_path: Path) -> None:
    class Again(Callback):
        @override
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            getattr(trainer, method)()

    with pytest.raises(InputError, match="running already"):
        trainer_of(tmp_path, Again()).fit()
    assert not is_locked(tmp_path)


def test_who_waits_comes_before_the_next_step() -> None:
    turns, order = Turns(), []
    guest = threading.Thread(target=turns.visit, args=("save", lambda: order.append("guest")))

    def step() -> None:
        guest.start()
        while turns._queue.acquire(blocking=False):  # until the guest has it
            turns._queue.release()

    turns.step(step)
    turns.step(lambda: order.append("step"))
    guest.join()
    assert order == ["guest", "step"]


def test_nobody_closes_the_loop_of_fit_between_two_of_its_steps() -> None:
    """A signal handler, or another thread, that comes just then."""
    trainer, refused = trainer_of(), []

    def in_fit(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code is Trainer.fit.__code__ and event == "line" and trainer.step == 5:
            with pytest.raises(InputError, match="running already"):
                trainer.close()
            refused.append(frame.f_lineno)
        return in_fit if frame.f_code is Trainer.fit.__code__ else None

    before = sys.gettrace()
    sys.settrace(in_fit)
    try:
        assert trainer.fit().steps == 12
    finally:
        sys.settrace(before)
    assert refused


def test_a_step_that_was_cut_short_is_not_saved_as_the_one_before(tmp_path: Path) -> None:
    class Interrupted(torch.optim.SGD):
        calls = 0

        @override
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt

    train, val = tiny_split()
    trainer = Trainer(
        bigram(),
        train,
        quick_config(),
        val_data=val,
        device="cpu",
        out_dir=tmp_path,
        optimizer=lambda named: Interrupted((p for _, p in named), lr=0.1),
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step == 2
    with pytest.raises(InputError, match="step 3 was cut short while the weights moved"):
        trainer.save()
    with pytest.warns(RuntimeWarning, match="step 3 was cut short"):
        assert trainer.fit().steps == 12
    assert trainer.save().exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_that_is_forked_while_another_thread_steps_does_not_wait_for_it() -> None:
    trainer, begun, over = trainer_of(), threading.Event(), threading.Event()

    def in_step_3() -> None:
        begun.set()
        over.wait(20)

    InTheMiddle(trainer, 3, in_step_3)
    stepping = threading.Thread(target=trainer.fit)
    stepping.start()
    begun.wait(20)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # it would wait for ever
        code = 1
        try:
            code = trainer._turns.visit("evaluate", lambda: 7)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    over.set()
    stepping.join()


def test_a_trainer_can_be_copied_and_pickled() -> None:
    trainer = trainer_of()
    next(loop := trainer.steps())
    for again in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))):
        assert again.fit().steps == 12
    loop.close()


class Sleeper(torch.nn.Module):
    """A table, and a normalisation that may be put to sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(TOKENIZER.vocab_size)
        self.table = torch.nn.Embedding(TOKENIZER.vocab_size, TOKENIZER.vocab_size)

    @override
    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.norm(self.table(idx).mT).mT  # (B, T, V)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("asleep", ["nothing", "norm", "all"])
def test_what_sleeps_inside_a_training_model_stays_asleep(asleep: str) -> None:
    model = Sleeper()
    if asleep == "norm":
        model.norm.eval()
    elif asleep == "all":  # as `load` returns a model: it trains awake, and sleeps afterwards
        model.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    before = model.norm.running_mean.clone()  # type: ignore[union-attr]
    trainer = Trainer(model, tiny_split()[0], quick_config(max_steps=3), device="cpu")
    seen = [model.norm.training for _ in trainer.steps()]
    assert seen == [asleep != "norm"] * 3
    assert torch.equal(model.norm.running_mean, before) == (asleep == "norm")  # type: ignore[arg-type]
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_trainings_in_two_threads_draw_what_each_draws_alone(tmp_path: Path) -> None:
    """Dropout draws from torch's global generator, which belongs to the caller and is in no order then."""

    def run(seed: int) -> Trainer:
        config = quick_config(max_steps=30, seed=seed)
        model = tiny_gpt(tiny_config("gpt2", vocab_size=TOKENIZER.vocab_size, dropout=0.4, block_size=8))
        return Trainer(model, tiny_split()[0], config, device="cpu")

    alone = [run(seed) for seed in (1, 2)]
    for trainer in alone:
        trainer.fit()
    together, over = [run(seed) for seed in (1, 2)], threading.Event()
    bigram().save(tmp_path / "model")
    before = torch.get_rng_state()

    def load() -> None:
        while not over.is_set():
            BigramLM.load(tmp_path / "model")  # building a model draws, and puts the generator back

    others = [threading.Thread(target=act) for act in (together[0].fit, load)]
    for thread in others:
        thread.start()
    together[1].fit()
    over.set()
    for thread in others:
        thread.join()
    assert all(same_tensors(tensors_of(a), tensors_of(b)) for a, b in zip(alone, together, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resume_puts_to_sleep_what_slept(tmp_path: Path) -> None:
    def made(out: Path) -> Trainer:
        model = tiny_gpt(tiny_config("gpt2", vocab_size=TOKENIZER.vocab_size, dropout=0.4, block_size=8))
        model.get_submodule("transformer.h.0").eval()
        return Trainer(model, tiny_split()[0], quick_config(), device="cpu", out_dir=out, tokenizer=TOKENIZER)

    whole, part = made(tmp_path / "whole"), made(tmp_path / "part")
    whole.fit()
    for record in part.steps():
        if record.step == 5:
            part.save()
            break
    again = Trainer.resume(tmp_path / "part", tiny_split()[0], device="cpu")
    again.fit()
    assert same_tensors(tensors_of(whole), tensors_of(again))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mode_that_an_interrupt_left_on_does_not_stop_a_training(mode: Callable[[], Any]) -> None:
    plain, other = trainer_of(), trainer_of()
    plain.fit()
    with mode():
        assert other.fit().steps == 12
    assert same_tensors(tensors_of(plain), tensors_of(other))
