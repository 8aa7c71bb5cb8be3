"""Bytes that a fuzzer finds, guided by coverage, end in the library's own errors: see fuzz.py.

Each target is fuzzed for four seconds; `--trials` is the number of seconds for each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness.campaign import Campaign
from harness.command import environment

pytestmark = pytest.mark.slow


@pytest.mark.skipif(
    find_spec("atheris") is None, reason="atheris is not installed; it has wheels for Linux on x86-64 alone"
)
@pytest.mark.parametrize("target", ["weights", "tokenizer", "config", "manifest"])
def test_any_bytes_end_in_our_errors(target: str, campaign: Campaign) -> None:
    seconds = campaign.trials(short=4)
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fuzz.py")), target, "--seconds", str(seconds)],
        env=environment(CHARLM_NATIVE="0", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = re.match(r"\w+: ([\d,]+) executions, (\d+) edges, (\d+) features", ended.stdout)
    assert figures is not None, ended.stdout
    campaign.counted("executions", int(figures[1].replace(",", "")))
    campaign.counted("edges", int(figures[2]))
    campaign.counted("features", int(figures[3]))
    assert campaign.figures["executions"] > 100 * seconds, "too slow to mean anything"
    assert campaign.figures["edges"] > 50, "the package is not instrumented"
