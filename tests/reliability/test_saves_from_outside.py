"""Saves that somebody else asks for, at random moments of a training: a second thread, and a signal handler.

Whatever `save` returned must be the state of its step in a run that nobody disturbed, bit for bit: weights,
moments, counters and settings. A save in the middle of a step is waited for or refused, and one that was
requested lies there at the end of the next step.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness.campaign import Campaign
from harness.stopped_runs import digests, kind_trainer
from torch import Tensor

from charlm import Trainer
from charlm.errors import InputError
from charlm.files import safetensors
from charlm.runs.checkpoint import read_checkpoint
from charlm.training import list_checkpoints

pytestmark = pytest.mark.slow

KINDS = {"adamw": "gpt with dropout and accumulation", "muon": "gpt in bf16 with warm-up and muon"}
QUIET: dict[str, object] = {
    "max_steps": 10_000,
    "eval_interval": 50,
    "save_interval": 10_000,
    "sample_interval": None,
    "keep_last": 1_000,
    "keep_best": 0,
    "patience": None,
    "restore_best": False,
}
# Where random numbers are drawn by others they belong to the caller; clocks differ between any two runs.
NOT_OF_THE_STEP = {"run_id", "save_id", "seconds", "rng"}


def state_of(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, without what differs between any two runs."""
    saved = read_checkpoint(path)
    state = {key: value for key, value in saved.state.items() if key not in NOT_OF_THE_STEP}
    for name in ("best", "last"):
        evaluation = state[name]
        if isinstance(evaluation, dict):
            state[name] = {key: value for key, value in evaluation.items() if key != "seconds"}
    tensors: dict[str, Tensor] = {}
    for file in ("model.safetensors", "train.safetensors"):
        tensors |= safetensors.loads(saved.files[file], path=file)[0]
    return {**state, **digests({k: t for k, t in tensors.items() if not k.startswith("rng.")})}


def undisturbed(kind: str, directory: Path, states: Sequence[dict[str, Any]]) -> int:
    """Compare states with a run that is saved between its steps alone; return how many steps they are of."""
    trainer = kind_trainer(kind, directory, (), **QUIET)
    steps = {state["step"] for state in states if state["step"] > 0}
    for record in trainer.steps():
        if record.step in steps:
            wanted = state_of(trainer.save())
            for found in (state for state in states if state["step"] == record.step):
                different = [key for key in wanted if found.get(key) != wanted[key]]
                assert found == wanted, f"step {record.step}: {different}"
        if record.step == max(steps):
            break
    return len(steps)


def until(trainer: Trainer, is_over: Callable[[], bool]) -> None:
    """Train until others are done with it, with a moment between two steps now and then."""
    for record in trainer.steps():
        if record.step % 3 == 0:
            time.sleep(0.002)
        if is_over():
            break


@pytest.mark.timeout(0)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_a_second_thread_saves_is_the_state_of_its_step(
    optimizer: str, tmp_path: Path, campaign: Campaign
) -> None:
    draw, kind = random.Random(campaign.seed), KINDS[optimizer]
    trainer, wanted = kind_trainer(kind, tmp_path / "run", (), **QUIET), campaign.trials(6)
    acknowledged: list[dict[str, Any]] = []
    failures: list[Exception] = []

    def save() -> None:
        for _ in range(wanted):
            time.sleep(draw.uniform(0, 0.01))
            try:
                acknowledged.append(state_of(trainer.save()))
            except Exception as error:  # noqa: BLE001 - told below, in the thread of the test
                failures.append(error)

    saver = threading.Thread(target=save)
    saver.start()
    until(trainer, lambda: not saver.is_alive())
    saver.join()
    assert not failures, failures[0]
    assert len(acknowledged) == wanted
    steps = undisturbed(kind, tmp_path / "undisturbed", acknowledged)
    campaign.counted("saves from a second thread, all acknowledged", wanted)
    campaign.counted("steps compared", steps)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_signal_handler_gets_the_state_of_a_step_or_is_refused_and_what_it_requests_is_fulfilled(
    optimizer: str, tmp_path: Path, campaign: Campaign
) -> None:
    draw, kind = random.Random(campaign.seed), KINDS[optimizer]
    trainer, wanted = kind_trainer(kind, tmp_path / "run", (), **QUIET), campaign.trials(6)
    acknowledged: list[dict[str, Any]] = []
    asked: list[tuple[str, int]] = []  # what came of it, and at which step
    idle = threading.Event()  # the handler of the signal before is done

    def handle(number: int, frame: object) -> None:
        step = trainer.step
        try:
            acknowledged.append(state_of(trainer.save()))
            asked.append(("saved", step))
        except InputError as error:
            trainer.request_save()
            asked.append(("requested" if "request_save()" in str(error) else str(error), step))
        idle.set()

    def send() -> None:
        for _ in range(wanted):
            idle.clear()
            time.sleep(draw.uniform(0, 0.01))
            step = trainer.step
            os.kill(os.getpid(), signal.SIGUSR1)
            idle.wait()
            while trainer.step < step + 2 and trainer.step < trainer.config.max_steps:  # it is fulfilled
                time.sleep(0.001)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        sender = threading.Thread(target=send)
        sender.start()
        until(trainer, lambda: not sender.is_alive())
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    last = trainer.step
    saved = {info.step: info.path for info in list_checkpoints(tmp_path / "run")}
    for what, step in asked:
        assert what in {"saved", "requested"}, what
        if what == "requested" and step + 1 < last:  # of the step under way, if its end was not just over
            assert saved.keys() & {step, step + 1}, f"requested in step {step + 1}: {sorted(saved)}"
    states = [*acknowledged, *(state_of(path) for path in saved.values())]
    steps = undisturbed(kind, tmp_path / "undisturbed", states)
    campaign.counted("saves from a signal handler acknowledged", len(acknowledged))
    campaign.counted("refused and requested", len(asked) - len(acknowledged))
    campaign.counted("steps compared", steps)


def interrupt_again_and_again(run: Path, trials: int, seed: int) -> dict[str, int]:
    """Raise KeyboardInterrupt at random moments of `fit`, and save in another thread after each."""
    draw, counts = random.Random(seed), {"interrupts": 0, "saves": 0, "steps cut short": 0}
    trainer = kind_trainer("bigram", run, (), **QUIET)
    next(loop := trainer.steps())  # all is loaded
    loop.close()

    def handle(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, handle)
    warnings.simplefilter("ignore")
    for _ in range(trials):
        try:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0002, 0.004))
            trainer.fit()
        except KeyboardInterrupt:
            counts["interrupts"] += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        saved: list[object] = []
        guest = threading.Thread(target=lambda into=saved: into.append(_saved(trainer)))
        guest.start()
        guest.join(30)
        if not saved:
            os._exit(3)  # it hangs, or was refused
        counts["saves" if saved[0] else "steps cut short"] += 1
    return counts


def test_an_interrupt_at_any_moment_leaves_a_trainer_that_goes_on(tmp_path: Path, campaign: Campaign) -> None:
    """In a process of its own: an interrupt there meets no tool that watches the tests."""
    campaign.count_elsewhere(interrupt_again_and_again, tmp_path / "run", short=200)


def _saved(trainer: Trainer) -> Path | None:
    """Save; None if the weights are those of no step."""
    try:
        return trainer.save()
    except InputError as error:
        if "was cut short while the weights moved" not in str(error):
            raise
        return None
