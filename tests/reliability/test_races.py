"""Several processes and one run: one trains, the others are refused at once, and readers see it whole.

Processes that live through all races begin to train in one directory at one moment: exactly one of them wins.
One process saves and prunes as fast as it can while others read the run in every way there is: each read gets
a whole checkpoint, none of them an error or a warning, and the newest step never goes back. One process saves
one model after another in the same place while others load it: what they get is of one save.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness.campaign import Campaign
from harness.command_runs import check_whole, newest_step
from harness.long_lived import LongLived
from harness.racing import RACE_STEPS
from harness.tiny_training import tiny_split
from harness.warm import WarmPython

from charlm import Trainer
from charlm.errors import RunLockedError
from charlm.runs.directory import RunDirectory

pytestmark = pytest.mark.slow


class Workers:
    """Processes that are started when they are first needed."""

    def __init__(self, python: WarmPython) -> None:
        self.python = python
        self.stack = ExitStack()
        self._started: list[LongLived] = []

    def first(self, number: int) -> list[LongLived]:
        """Return that many of them."""
        while len(self._started) < number:
            self._started.append(self.stack.enter_context(LongLived(self.python)))
        return self._started[:number]


@pytest.fixture(scope="module")
def workers(warm_python: WarmPython) -> Iterator[Workers]:
    found = Workers(warm_python)
    with found.stack:
        yield found


@pytest.mark.timeout(0)
def test_of_trainers_that_begin_at_one_moment_exactly_one_wins(
    tmp_path: Path, workers: Workers, campaign: Campaign
) -> None:
    draw = random.Random(campaign.seed)
    three = workers.first(3)
    for trial in range(campaign.trials(4)):
        how = ("new", "built before", "resumed")[trial % 3]
        run = tmp_path / f"run {trial}"
        if how == "resumed":
            three[0].call("harness.racing:prepare", folder=str(run), how="new")
            three[0].call("harness.racing:race", at=0.0)
            three[0].call("harness.racing:leave")
        for worker in three:
            worker.call("harness.racing:prepare", folder=str(run), how=how)
        at = time.monotonic() + 0.02
        for worker in three:
            worker.ask("harness.racing:race", at=at + draw.choice([0, 0, 1e-4, 1e-3]))
        answers = [worker.answer() for worker in three]
        where = f"race {trial} of seed {campaign.seed}, {how}: {answers}"
        winners = [worker for worker, said in zip(three, answers, strict=True) if said["refused"] is None]
        assert len(winners) == 1, where
        for said in answers:
            assert said["refused"] is None or said["seconds"] < 20, where
            if said["refused"] is not None:
                campaign.counted(f"{said['refused']}")
        campaign.counted("races")
        assert RunDirectory.open(run).run_id
        began = time.monotonic()
        with pytest.raises(RunLockedError):
            next(Trainer.resume(run, tiny_split()[0], device="cpu", max_steps=9).steps())
        assert time.monotonic() - began < 20  # and does not wait
        assert winners[0].call("harness.racing:finish") == RACE_STEPS
        assert check_whole(run) >= 1, where
        assert newest_step(run) == RACE_STEPS, where


def test_a_killed_process_leaves_no_lock_behind(
    tmp_path: Path, warm_python: WarmPython, campaign: Campaign
) -> None:
    for trial in range(max(1, campaign.trials(10) // 10)):
        run = tmp_path / f"run {trial}"
        with LongLived(warm_python) as holder, ExitStack() as stack:
            holder.call("harness.racing:prepare", folder=str(run), how="new")
            assert holder.call("harness.racing:race", at=0.0)["refused"] is None
            child = holder.call("harness.racing:fork")
            trainer = Trainer.resume(run, tiny_split()[0], device="cpu")
            with pytest.raises(RunLockedError, match="another process or trainer is training in"):
                trainer.fit()
            holder.kill()
            stack.callback(os.kill, child, signal.SIGKILL)  # until then it lives
            began = time.monotonic()
            assert trainer.fit().steps == RACE_STEPS
            assert time.monotonic() - began < 20  # and does not wait
        check_whole(run)
        campaign.counted("holders killed")


def fork_child(how: str) -> list[int]:
    """Start a process that lives until it is killed, and return its id, and that of a child of its own."""
    if how == "another program":
        return [subprocess.Popen(["sleep", "1000"], close_fds=False).pid]
    if how == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=signal.pause)
        process.start()
        assert process.pid is not None
        return [process.pid]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        if how == "with a child" and (grandchild := os.fork()):
            os.write(writing, b"%d" % grandchild)
        signal.pause()
    os.close(writing)
    pids = [child, int(os.read(reading, 20))] if how == "with a child" else [child]
    os.close(reading)
    return pids


def hold_and_fork(place: Path, draw: random.Random, ready: int) -> None:
    """Be a trainer that takes the lock and forks children, while a thread takes and gives back others."""
    run = RunDirectory.open(place / "run")
    over = threading.Event()

    def take_others() -> None:
        other = RunDirectory.open(place / "other")
        while not over.is_set():
            other.lock()
            other.unlock()

    thread = threading.Thread(target=take_others)
    thread.start()
    children: list[int] = []
    kinds = ("forked", "with a child", "multiprocessing", "another program")
    before = draw.randrange(2)
    for number in range(before + draw.randrange(1, 3)):
        if number == before:
            run.lock()
        children += fork_child(draw.choice(kinds))
    over.set()
    thread.join()
    os.write(ready, json.dumps(children).encode())
    signal.pause()


def kill_parents(place: Path, trials: int, seed: int) -> dict[str, int]:
    """Kill processes that hold a lock and have children, and take the lock while these live."""
    figures = {"trainers killed": 0, "children alive": 0}
    runs = [RunDirectory.create(place / name) for name in ("run", "other")]
    for trial in range(trials):
        reading, writing = os.pipe()
        trainer = os.fork()
        if trainer == 0:
            try:
                hold_and_fork(place, random.Random(f"{seed}/{trial}"), writing)
            finally:
                os._exit(1)
        children = json.loads(os.read(reading, 10_000) or b"[]")
        os.close(reading)
        os.close(writing)
        where = f"seed {seed}, trial {trial}"
        try:
            assert children, where
            if trial % 2:  # that a child ends does not give the lock back
                os.kill(children.pop(), signal.SIGKILL)
            with pytest.raises(RunLockedError):
                runs[0].lock()
            os.kill(trainer, signal.SIGKILL)
            os.waitpid(trainer, 0)
            for run in runs:  # the other one was given back, whatever was forked meanwhile
                lock_within_a_second(run, where)
            figures["trainers killed"] += 1
            figures["children alive"] += len(children)
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
    return figures


def lock_within_a_second(run: RunDirectory, where: str) -> None:
    """Take a lock and give it back; a child that was forked this moment may have it still."""
    end = time.monotonic() + 1
    while True:
        try:
            run.lock()
        except RunLockedError as error:
            if time.monotonic() > end:
                error.add_note(where)
                raise
            time.sleep(0.001)
        else:
            run.unlock()
            return


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_children_of_a_killed_trainer_do_not_keep_its_lock(tmp_path: Path, campaign: Campaign) -> None:
    campaign.count_elsewhere(kill_parents, tmp_path, short=50)
    campaign.counted("locks that stayed", 0)


@pytest.mark.timeout(0)
def test_readers_never_see_half_a_checkpoint(tmp_path: Path, workers: Workers, campaign: Campaign) -> None:
    saves = campaign.trials(25)
    for keep_last, keep_best in ((1, 1), (1, 0), (2, 1)):
        run = tmp_path / f"last {keep_last} best {keep_best}"
        writer, *readers = workers.first(4 if campaign.asked is None else 9)
        arguments = {"saves": saves, "keep_last": keep_last, "keep_best": keep_best}
        writer.ask("harness.racing:write", folder=str(run), **arguments)
        while not newest_step(run):
            time.sleep(0.001)
        for reader in readers:
            reader.ask("harness.racing:read", folder=str(run))
        assert writer.answer() == saves
        for reader in readers:
            said = reader.answer()
            assert said["newest"] == saves
            campaign.counted("reads", said["reads"])
            campaign.counted("different checkpoints seen by one reader", said["seen"])
        campaign.counted("saves", saves)
        check_whole(run)


@pytest.mark.timeout(0)
def test_a_model_that_is_loaded_beside_saves_is_of_one_save(
    tmp_path: Path, workers: Workers, campaign: Campaign
) -> None:
    saves = campaign.trials(300)
    model = str(tmp_path / "model")
    writer, *readers = workers.first(3)
    writer.call("harness.racing:save_in_turns", folder=model, saves=1)
    Path(model + " done").unlink()
    for reader in readers:
        reader.ask("harness.racing:load_saved", folder=model)
    writer.call("harness.racing:save_in_turns", folder=model, saves=saves)
    for reader in readers:
        said = reader.answer()
        assert said["seen"] == 4
        campaign.counted("loads", said["loads"])
    campaign.counted("saves", saves)
    campaign.counted("mixtures", 0)
