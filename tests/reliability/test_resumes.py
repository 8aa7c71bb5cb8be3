"""A run of 200 steps that is stopped and resumed comes to the same as one that is not: 0 bits differ.

Each configuration is trained once without a stop, and once by a trainer that is stopped at every k that is
tried: in turns by `interrupt()`, which saves and raises, and by `save()` and leaving the loop. At each
stop the run's directory is copied as it is, and a new trainer (now and then in a new process) resumes the
copy and goes on to the end. Compared are: loss, learning rate and gradient norm of every step; the model at
the end; the last checkpoint's tensors (weights, moments, generators) and state (counters, best and last
evaluation, evaluations without a new best, scaler, state of callbacks); the records of metrics.jsonl.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import stopped_runs
from harness.campaign import Campaign
from harness.stopped_runs import (
    KINDS,
    STEPS,
    assert_equal,
    callbacks,
    kind_trainer,
    outcome,
    resumed,
    seed_generators,
)

from charlm.errors import TrainingInterrupted

pytestmark = pytest.mark.slow

PROCESS_EVERY = 40  # one resume of this many in the long form is made in a process of its own
SHORT_IN_PROCESSES = ("gpt with dropout and accumulation", "gpt in fp16 with a scaler")


def undisturbed(kind: str, folder: Path) -> dict[str, Any]:
    """Return what the run comes to that is never stopped."""
    listeners = callbacks()
    seed_generators()
    trainer = kind_trainer(kind, folder, listeners)
    trainer.fit()
    return outcome(trainer, listeners[1])


def stopped_copies(kind: str, folder: Path, stops: list[int], seed: int) -> tuple[dict[int, Path], Any]:
    """Train with a stop at each of some steps; return copies of the run's directory, and the outcome."""
    noise, numbers, stop_at = callbacks()
    seed_generators()
    trainer = kind_trainer(kind, folder / "stopped", (noise, numbers, stop_at))
    copies = {}
    for i, k in enumerate(stops):
        if (i + seed) % 2 == 0:
            stop_at.step = k
            with pytest.raises(TrainingInterrupted, match=f"training stopped after step {k};"):
                trainer.fit()
        else:
            for record in trainer.steps():
                if record.step == k:
                    trainer.save()
                    break
        copies[k] = shutil.copytree(folder / "stopped", folder / f"from {k}")
    trainer.fit()
    return copies, outcome(trainer, numbers)


def spread(number: int) -> list[int]:
    """Return that many steps between 1 and 199, evenly spread, both ends among them."""
    if number >= STEPS - 1:
        return list(range(1, STEPS))
    return sorted({1 + round(i * (STEPS - 2) / max(1, number - 1)) for i in range(number)})


@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_and_resumed_is_the_same_bit_for_bit(
    tmp_path: Path, kind: str, campaign: Campaign
) -> None:
    stops = spread(campaign.trials(4))
    whole = undisturbed(kind, tmp_path / "whole")
    assert whole["state"]["evaluations_since_best"] > 0  # or nothing of this would be tested
    assert whole["state"]["best"]["step"] < STEPS
    copies, continued = stopped_copies(kind, tmp_path, stops, campaign.seed)
    assert_equal(continued, whole, f"{kind}: after {len(stops)} stops in one process")
    short = campaign.asked is None
    in_processes = [] if short and kind not in SHORT_IN_PROCESSES else stops[len(stops) // 2 :: PROCESS_EVERY]
    processes = {k: in_a_process(kind, copies[k]) for k in in_processes[:1]}  # while others are resumed here
    for i, k in enumerate(stops):
        if k in in_processes:
            process = processes.get(k) or in_a_process(kind, copies[k])
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err.decode()
            found = json.loads(out)
            campaign.counted("resumes in a new process")
        else:
            found = resumed(kind, copies[k])
            campaign.counted("resumes in the same process")
        campaign.counted(f"of them after {'interrupt' if (i + campaign.seed) % 2 == 0 else 'save'}")
        found["steps"] = whole["steps"][:k] + found["steps"]  # the first k were compared above
        assert_equal(found, whole, f"{kind}: resumed after step {k}, seed {campaign.seed}")
        shutil.rmtree(copies[k])


def in_a_process(kind: str, folder: Path) -> subprocess.Popen[bytes]:
    """Resume a run in a new process."""
    return subprocess.Popen(
        [sys.executable, stopped_runs.__file__, kind, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
