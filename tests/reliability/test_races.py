"""Several processes and one run: one trains, the others are refused at once, and readers see it whole.

Processes that live through all races begin to train in one directory at one moment: exactly one of them wins.
One process saves and prunes as fast as it can while others read the run in every way there is: each read gets
a whole checkpoint, none of them an error or a warning, and the newest step never goes back.
"""

from __future__ import annotations

import random
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
    for trial in range(campaign.trials(9)):
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
            assert said["refused"] is None or said["seconds"] < 1, where
            if said["refused"] is not None:
                campaign.counted(f"{said['refused']}")
        campaign.counted("races")
        assert RunDirectory.open(run).run_id
        began = time.monotonic()
        with pytest.raises(RunLockedError):
            next(Trainer.resume(run, tiny_split()[0], device="cpu", max_steps=9).steps())
        assert time.monotonic() - began < 1
        assert winners[0].call("harness.racing:finish") == RACE_STEPS
        assert check_whole(run) >= 1, where
        assert newest_step(run) == RACE_STEPS, where


def test_a_killed_process_leaves_no_lock_behind(
    tmp_path: Path, warm_python: WarmPython, campaign: Campaign
) -> None:
    for trial in range(max(1, campaign.trials(10) // 10)):
        run = tmp_path / f"run {trial}"
        with LongLived(warm_python) as holder:
            holder.call("harness.racing:prepare", folder=str(run), how="new")
            assert holder.call("harness.racing:race", at=0.0)["refused"] is None
            trainer = Trainer.resume(run, tiny_split()[0], device="cpu")
            with pytest.raises(RunLockedError, match="another process is training in"):
                trainer.fit()
            holder.kill()
            began = time.monotonic()
            assert trainer.fit().steps == RACE_STEPS
            assert time.monotonic() - began < 1
        check_whole(run)
        campaign.counted("holders killed")


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
