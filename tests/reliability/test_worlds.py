"""Training in several processes: the same bits at any number of them, and one end for all whatever happens.

Worlds of real processes, as torchrun starts them, are compared with one process. A process of a world is
killed at random moments: torchrun starts all again, and the run ends as one that nothing disturbed. A signal
saves once; when a process is gone, the others stop by themselves with one message. The longer form of the
first two: `--trials N` kills N times, in worlds of 2 and 4.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from harness.campaign import Campaign
from harness.command import ROOT, environment
from harness.command_runs import LAST_STEP, check_whole, newest_step, write_text
from harness.shares import KINDS, digest
from harness.stopped_runs import assert_equal, outcome_on_disk

from charlm.cli.__main__ import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

FLAGS = (
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "1"),
    *("--max-steps", str(LAST_STEP), "--eval-interval", "6", "--save-interval", "4", "--log-interval", "1"),
    *("--sample-interval", "10", "--device", "cpu", "--precision", "fp32", "--keep-last", "2"),
    *("--dropout", "0.1", "--no-baseline", "--val-fraction", "0.5", "--accumulate", "8"),
)


def torchrun(size: int, *words: str, restarts: int = 0) -> list[str]:
    """Return the command that starts a world."""
    begin = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    return [*begin, f"--max-restarts={restarts}", "--monitor-interval=0.1", *words]


@contextmanager
def started(size: int, *words: str, restarts: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Start a world, and see to it that none of its processes is left at the end."""
    process = subprocess.Popen(
        torchrun(size, *words, restarts=restarts),
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        left = workers(process.pid)
        process.kill()
        process.communicate()
        for pid in left:
            os.kill(pid, signal.SIGKILL)


def workers(parent: int) -> list[int]:
    """Return the processes of a world, the first one's first."""
    found: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile
                continue
            ranks = [int(v.partition(b"=")[2]) for v in variables if v.startswith(b"RANK=")]
            if int(status[1]) == parent and status[0] != "Z" and ranks:
                found[ranks[0]] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def is_alive(pid: int) -> bool:
    """Return whether a process still runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def said(process: subprocess.Popen[bytes]) -> tuple[int, list[str]]:
    """Return how a world ended, and what charlm said, without what torchrun says."""
    message = process.communicate(timeout=300)[1].decode()
    return process.returncode, [line for line in message.splitlines() if line.startswith("charlm: ")]


@pytest.mark.parametrize("size", [2, 4])
def test_a_world_of_processes_comes_to_the_bits_of_one(tmp_path: Path, size: int, campaign: Campaign) -> None:
    if size > 2 and campaign.asked is None:
        pytest.skip("only in the longer form: --trials")
    program = ROOT / "tests" / "harness" / "shares.py"
    with started(size, str(program), str(tmp_path / "found.json")) as process:
        wanted = {kind: digest(kind) for kind in KINDS}
        code, _ = said(process)
    assert code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("differing") is None
    assert 0 < found.pop("drift") < 1e-4
    assert found.pop(
        "told"
    ) == "PeerError: process 1 of 2 has failed, so all stop. MemoryError: no room".replace(
        "of 2", f"of {size}"
    )
    assert found.pop("gone").startswith("PeerError: another process of this training is gone")
    assert found == wanted
    campaign.counted("kinds of training compared", len(wanted))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, in one process."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    assert main(["train", str(write_text(folder)), "-o", str(folder / "run"), *FLAGS, "-q"]) == 0
    assert torch.get_num_threads() == threads
    return folder / "run"


def test_a_world_that_loses_processes_is_started_again_and_ends_the_same(
    tmp_path: Path, whole: Path, campaign: Campaign
) -> None:
    draw = random.Random(campaign.seed)
    text, wanted = write_text(tmp_path), outcome_on_disk(whole, generators=False)
    kills = campaign.trials(1)
    while kills:
        run, size = tmp_path / f"run {kills}", 2 if campaign.asked is None else draw.choice([2, 4])
        in_this = min(kills, draw.randint(1, 3))
        words = ("-m", "charlm", "train", str(text), "-o", str(run), *FLAGS, "--resume", "auto")
        with started(size, *words, restarts=in_this) as process:
            for _ in range(in_this):
                killed = kill_one(process, run, draw)
                campaign.counted(f"kills of {'the first process' if killed == 0 else 'another process'}")
            code, lines = said(process)
            assert code == 0, f"seed {campaign.seed}"
            gone = [line for line in lines if "another process of this training is gone" in line]
            assert len(gone) <= in_this  # one of those that are left says it, unless torchrun stops it first
            assert workers(process.pid) == []
        kills -= in_this
        check_whole(run)
        assert_equal(outcome_on_disk(run, generators=False), wanted, f"{run.name} of seed {campaign.seed}")
        campaign.counted("runs brought to their end")


def kill_one(process: subprocess.Popen[bytes], run: Path, draw: random.Random) -> int:
    """Kill a random process of a world at a random moment, and wait until all of it has begun again."""
    while len(found := workers(process.pid)) < 2:
        time.sleep(0.02)
        assert process.poll() is None
    if draw.random() < 0.8:  # in its steps or saves; else anywhere, also before it has met the others
        before = newest_step(run)
        while newest_step(run) == before and len(workers(process.pid)) == len(found) and before < LAST_STEP:
            time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.3))
    rank = draw.randrange(len(found))
    try:
        os.kill(found[rank], signal.SIGKILL)
    except ProcessLookupError:  # it had just ended
        return rank
    while process.poll() is None and set(workers(process.pid)) & set(found):
        time.sleep(0.02)
    return rank


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_torchrun_saves_once_and_the_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, whole: Path, number: signal.Signals
) -> None:
    text, run = write_text(tmp_path), tmp_path / "run"
    with started(2, "-m", "charlm", "train", str(text), "-o", str(run), *FLAGS) as process:
        while newest_step(run) < 4:
            time.sleep(0.01)
            assert process.poll() is None
        left = workers(process.pid)
        process.send_signal(number)  # after SIGKILL the processes see by themselves that torchrun is gone
        _, lines = said(process)  # has everything when the last process has ended
        assert not any(is_alive(pid) for pid in left)
    stopped = [line for line in lines if "stopped after step" in line]
    assert len(stopped) == 1
    assert lines == stopped
    assert newest_step(run) < LAST_STEP
    assert main(["train", "--resume", "-o", str(run), "-q"]) == 0
    assert_equal(outcome_on_disk(run, generators=False), outcome_on_disk(whole, generators=False), "resumed")


def test_when_a_process_is_gone_the_others_stop_with_one_message(tmp_path: Path, campaign: Campaign) -> None:
    if campaign.asked is None:
        pytest.skip("only in the longer form (--trials): the first test has a process that goes, too")
    draw = random.Random(campaign.seed)
    text = write_text(tmp_path)
    for trial in range(campaign.asked):
        run = tmp_path / f"run {trial}"
        with started(
            2, "-m", "charlm", "train", str(text), "-o", str(run), *FLAGS, "--max-steps", "9999"
        ) as process:
            while newest_step(run) < 4:
                time.sleep(0.01)
                assert process.poll() is None
            rank = draw.randrange(2) if trial else 1
            began = time.monotonic()
            os.kill(workers(process.pid)[rank], signal.SIGKILL)
            code, lines = said(process)
            assert code == 1
            assert time.monotonic() - began < 30
            assert workers(process.pid) == []
        assert len(lines) == 1
        assert "another process of this training is gone" in lines[0]
        check_whole(run)
        campaign.counted("processes killed")
