"""A training that logs to TensorBoard is killed with SIGKILL at random moments, and resumed until it ends.

What TensorBoard's own reader then finds is what metrics.jsonl holds: no step twice, none missing; whatever
was torn, buffered or ahead of the last checkpoint when the signal came.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
from harness.campaign import Campaign
from harness.command import start
from harness.command_runs import FLAGS, LAST_STEP, newest_step, next_command, write_text
from harness.warm import WarmPython
from training.test_loggers import in_log
from training.test_services import by_tag, in_events

pytestmark = pytest.mark.slow


@pytest.mark.timeout(0)
def test_an_event_file_holds_what_the_log_holds_after_kills(
    tmp_path: Path, warm_python: WarmPython, campaign: Campaign
) -> None:
    draw = random.Random(campaign.seed)
    text, run = write_text(tmp_path), tmp_path / "run"
    flags, kills = (*FLAGS, "--log-to", "tensorboard"), campaign.trials(1)
    for trial in range(kills + 1):  # the last one comes to its end
        process = start(*next_command(run, text, *flags), python=warm_python)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(b"steps  "):
                break
        if trial < kills:
            time.sleep(draw.uniform(0.2, 2.5))
            process.kill()
            campaign.counted("kills")
        message = process.communicate()[1].decode()
        assert "warning" not in message, message
        if newest_step(run) == LAST_STEP and process.returncode == 0:
            found = in_events(run / "tensorboard")
            found.pop("settings")
            assert found == by_tag(in_log(run)), f"trial {trial} of seed {campaign.seed}"
            campaign.counted("runs brought to their end")
            shutil.rmtree(run)
