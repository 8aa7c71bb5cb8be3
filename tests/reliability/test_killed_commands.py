"""The command `charlm train` is killed with SIGKILL at random moments, and begun again until its run ends.

After each kill the run loads, all its checkpoints verify, and the newest is no older than the last save that
was done when the signal was sent. A run that ends after all these kills equals one that nothing disturbed,
bit for bit: weights, moments, evaluations, records.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from harness.campaign import Campaign
from harness.command import start
from harness.command_runs import FLAGS, LAST_STEP, check_whole, newest_step, next_command, write_text
from harness.long_lived import LongLived
from harness.stopped_runs import assert_equal, outcome_on_disk
from harness.warm import WarmPython

import charlm

pytestmark = pytest.mark.slow

SAVE_INTERVAL = 4  # of FLAGS


@pytest.mark.timeout(0)
def test_a_killed_command_goes_on_from_its_last_save_to_the_same_end(
    tmp_path: Path, warm_python: WarmPython, campaign: Campaign
) -> None:
    draw = random.Random(campaign.seed)
    text, run, whole = write_text(tmp_path), tmp_path / "run", tmp_path / "whole"
    with LongLived(warm_python) as worker:
        worker.ask("harness.long_lived:command", args=["train", str(text), "-o", str(whole), *FLAGS])
        for trial in range(campaign.trials(4)):
            where = f"kill {trial} of seed {campaign.seed}"
            process = start(*next_command(run, text, *FLAGS), "--verbose", python=warm_python)
            saved, message = killed(process, run, draw)
            assert "error" not in message, f"{where}: {message}"
            campaign.counted("kills")
            campaign.counted(f"of them {moment(run, message)}")
            check_whole(run)
            after = newest_step(run)
            assert after >= saved, f"{where}: step {saved} was saved, {after} is the newest: {message}"
            if trial == 0:
                assert worker.answer()["code"] == 0  # the undisturbed run, trained meanwhile
                wanted = outcome_on_disk(whole, generators=False)
            if (run / "run.json").exists():
                said = worker.call("harness.long_lived:command", args=["info", str(run), "--verify"])
                assert said["code"] == 0, f"{where}: {said}"
            if after:
                assert charlm.load(run, device="cpu").tokenizer.vocab_size > 9
            if after == LAST_STEP:
                assert_equal(outcome_on_disk(run, generators=False), wanted, where)
                shutil.rmtree(run)
                campaign.counted("runs brought to their end")
        said = worker.call("harness.long_lived:command", args=next_command(run, text, *FLAGS))
        assert said["code"] == 0, said
    assert_equal(outcome_on_disk(run, generators=False), wanted, f"the last run, seed {campaign.seed}")
    campaign.counted("runs brought to their end")


@pytest.mark.timeout(0)
def test_a_run_that_is_killed_while_its_result_is_decided_gets_it_when_it_is_resumed(
    tmp_path: Path, warm_python: WarmPython, campaign: Campaign
) -> None:
    draw = random.Random(campaign.seed)
    text, run, whole = write_text(tmp_path), tmp_path / "run", tmp_path / "whole"
    flags = [word for word in FLAGS if word != "--no-baseline"]
    with LongLived(warm_python) as worker:
        worker.call("harness.long_lived:command", args=["train", str(text), "-o", str(whole), *flags])
        wanted = weights_of(whole)
        for trial in range(campaign.trials(3)):
            where = f"kill {trial} of seed {campaign.seed}"
            process = start("train", str(text), "-o", str(run), *flags, python=warm_python)
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(b"done  "):
                    break
            time.sleep(draw.uniform(0, 0.08))
            process.kill()
            process.communicate()
            campaign.counted("kills")
            campaign.counted(
                f"of them {'after' if (run / 'mixture').exists() else 'before'} the result was there"
            )
            assert charlm.load(run, device="cpu").tokenizer.vocab_size > 9
            said = worker.call("harness.long_lived:command", args=["train", "--resume", "-o", str(run)])
            assert said["code"] == 0, f"{where}: {said}"
            assert weights_of(run) == wanted, where
            shutil.rmtree(run)


def weights_of(run: Path) -> dict[str, bytes]:
    """Return the tensors of a run's result, with its kind."""
    model = charlm.load(run, device="cpu").model
    return {f"{model.kind}.{name}": t.numpy().tobytes() for name, t in model.state_dict().items()}


def killed(process: subprocess.Popen[bytes], run: Path, draw: random.Random) -> tuple[int, str]:
    """Kill a training at random; return the last step known to be saved before that, and what was said."""
    read = []
    assert process.stderr is not None
    if draw.random() < 0.8:
        for line in process.stderr:
            read.append(line)
            if line.startswith(b"steps  "):
                break
        time.sleep(draw.uniform(0, 0.25))
    else:
        time.sleep(draw.uniform(0.05, 1.5))
    before = newest_step(run)
    process.kill()
    read.append(process.communicate()[1])
    message = b"".join(read).decode()
    # A line about a step is written after the saves of all steps before it.
    logged = [int(step) for step in re.findall(r"^step +(\d+)  train loss", message, re.MULTILINE)]
    acknowledged = max(((step - 1) // SAVE_INTERVAL * SAVE_INTERVAL for step in logged), default=0)
    return max(before, acknowledged), message


def moment(run: Path, message: str) -> str:
    """Return what a kill met, as far as it can be seen."""
    checkpoints = run / "checkpoints"
    left = {path.name.split("-")[0] for path in checkpoints.iterdir()} if checkpoints.is_dir() else set()
    if not (run / "run.json").exists():
        return "before the run began"
    if ".tmp" in left:
        return "in the middle of a save"
    if ".trash" in left:
        return "in the middle of deleting a checkpoint"
    if not newest_step(run):
        return "before the first save"
    return "elsewhere in the training" if "steps  " in message else "before a resume began"
