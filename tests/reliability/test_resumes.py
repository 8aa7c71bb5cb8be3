"""A run that is stopped and resumed comes to the same as one that is not: 0 bits differ.

It has 200 steps, in the short form 40.

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

SHORT_STEPS = 40
SHORT: dict[str, object] = {"max_steps": SHORT_STEPS, "eval_interval": 2}  # the last is no best evaluation
PROCESS_EVERY = 40  # one resume of this many in the long form is made in a process of its own


def undisturbed(kind: str, folder: Path, **changes: object) -> dict[str, Any]:
    """Return what the run comes to that is never stopped."""
    listeners = callbacks()
    seed_generators()
    trainer = kind_trainer(kind, folder, listeners, **changes)
    trainer.fit()
    return outcome(trainer, listeners[1])


def stopped_copies(
    kind: str, folder: Path, stops: list[int], seed: int, **changes: object
) -> tuple[dict[int, Path], Any]:
    """Train with a stop at each of some steps; return copies of the run's directory, and the outcome."""
    noise, numbers, stop_at = callbacks()
    seed_generators()
    trainer = kind_trainer(kind, folder / "stopped", (noise, numbers, stop_at), **changes)
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


def spread(number: int, steps: int) -> list[int]:
    """Return that many steps from the first to the last but one, evenly spread, both ends among them."""
    if number >= steps - 1:
        return list(range(1, steps))
    return sorted({1 + round(i * (steps - 2) / max(1, number - 1)) for i in range(number)})


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * ("fp16" in kind)) for kind in KINDS]
)
def test_a_run_that_is_stopped_and_resumed_is_the_same_bit_for_bit(
    tmp_path: Path, kind: str, campaign: Campaign
) -> None:
    steps, changes = (SHORT_STEPS, SHORT) if campaign.asked is None else (STEPS, {})
    stops = spread(campaign.trials(3), steps)
    whole = undisturbed(kind, tmp_path / "whole", **changes)
    assert whole["state"]["evaluations_since_best"] > 0  # or nothing of this would be tested
    assert whole["state"]["best"]["step"] < steps
    copies, continued = stopped_copies(kind, tmp_path, stops, campaign.seed, **changes)
    assert_equal(continued, whole, f"{kind}: after {len(stops)} stops in one process")
    in_processes = [] if campaign.asked is None else stops[len(stops) // 2 :: PROCESS_EVERY]
    for i, k in enumerate(stops):
        if k in in_processes:
            found = in_a_process(kind, copies[k])
            campaign.counted("resumes in a new process")
        else:
            found = resumed(kind, copies[k])
            campaign.counted("resumes in the same process")
        campaign.counted(f"of them after {'interrupt' if (i + campaign.seed) % 2 == 0 else 'save'}")
        found["steps"] = whole["steps"][:k] + found["steps"]  # the first k were compared above
        assert_equal(found, whole, f"{kind}: resumed after step {k}, seed {campaign.seed}")
        shutil.rmtree(copies[k])


@pytest.mark.slow
def test_a_new_process_resumes_a_run_to_the_same_bits(tmp_path: Path) -> None:
    kind = "gpt with dropout and accumulation"
    whole = undisturbed(kind, tmp_path / "whole", **SHORT)
    copies, _ = stopped_copies(kind, tmp_path, [10], 0, **SHORT)
    found = in_a_process(kind, copies[10])
    found["steps"] = whole["steps"][:10] + found["steps"]
    assert_equal(found, whole, kind)


def in_a_process(kind: str, folder: Path) -> dict[str, Any]:
    """Return what a run comes to that a new process resumes."""
    command = [sys.executable, stopped_runs.__file__, kind, str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    outcome_of_process: dict[str, Any] = json.loads(done.stdout)
    return outcome_of_process
