"""Texts larger than memory: what each command takes of it, and a preparation that is killed again and again.

pytest --timeout 0 tests/reliability/test_large_texts.py -k memory --trials 2000    # megabytes of text
pytest --timeout 0 tests/reliability/test_large_texts.py -k killed --trials 100     # kills
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
from harness.campaign import Campaign
from harness.command import start
from harness.large_texts import peak_of, write_prose
from harness.warm import WarmPython

from charlm.data.prepared import INDEX_FILE, PREPARING_FILE, PreparedCorpus

pytestmark = pytest.mark.slow

MOST_ABOVE = 512  # MB above a process that has only imported torch
STEPS = ("--preset", "cpu-10s", "--device", "cpu", "--eval-interval", "100")


@pytest.mark.timeout(0)
def test_no_command_takes_memory_for_the_length_of_a_text(tmp_path: Path, campaign: Campaign) -> None:
    text, data, run = tmp_path / "text.txt", str(tmp_path / "data"), str(tmp_path / "run")
    megabytes = campaign.trials(2)
    size = write_prose(text, megabytes)
    campaign.counted("MB of text", round(size / 1e6))
    before = peak_of(None)
    steps = 200 if megabytes > 100 else 4
    small = () if megabytes > 100 else ("--no-baseline", "--n-layer", "1", "--eval-chars", "10000")
    commands = {
        "prepare": ("prepare", str(text), "-o", data),
        "train": ("train", data, "-o", run, *STEPS, *small, "--max-steps", str(steps)),
        "resume": ("train", "-o", run, "--resume", "--max-steps", str(steps + 10)),
        "evaluate": ("eval", run, data),
        "generate": ("generate", run, "-n", "200"),
        "inspect": ("inspect", data),
    }
    if small:  # the others read what these have written, in the same way
        commands = {name: commands[name] for name in ("prepare", "train")}
    for name, words in commands.items():
        began = time.monotonic()
        above = peak_of(words) - before
        campaign.counted(f"seconds to {name}", round(time.monotonic() - began))
        campaign.counted(f"MB that {name} took above torch alone", round(above))
        text.unlink(missing_ok=True)  # from here on, the corpus suffices
        assert above <= MOST_ABOVE, f"{name} took {above:.0f} MB above torch alone"
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*/state.json"))
    assert '"train": "prepared:' in saved[-1].read_text(encoding="utf-8")


@pytest.mark.timeout(0)
def test_a_killed_preparation_goes_on_to_the_same_end(
    tmp_path: Path, warm_python: WarmPython, campaign: Campaign
) -> None:
    draw = random.Random(campaign.seed)
    text, data, whole = tmp_path / "text.txt", tmp_path / "data", tmp_path / "whole"
    trials = campaign.trials(2)
    write_prose(text, 20 if trials < 10 else 400, campaign.seed)
    began = time.monotonic()
    start("prepare", str(text), "-o", str(whole), python=warm_python).communicate()
    seconds = time.monotonic() - began
    wanted = {path.name: path.read_bytes() for path in whole.iterdir()}
    kills = 0
    while kills < trials:
        process = start("prepare", str(text), "-o", str(data), python=warm_python)
        time.sleep(draw.uniform(0.1, 0.9) * seconds)
        process.kill()
        process.communicate()
        names = {path.name for path in data.iterdir()} if data.exists() else set()
        if INDEX_FILE not in names:  # what is half done already takes less time: it may be too late
            kills += 1
            campaign.counted("kills before the end")
            if PREPARING_FILE in names:
                campaign.counted("of them in the second pass")
        for name in names - {PREPARING_FILE}:
            if not name.startswith(".tmp-"):
                assert (data / name).read_bytes() == wanted[name], f"kill {kills}: {name} is half"
        if INDEX_FILE not in names and draw.random() < 0.5:
            continue  # the next one goes on, and is killed, too
        if INDEX_FILE not in names:
            _, said = start("prepare", str(text), "-o", str(data), python=warm_python).communicate()
            assert (data / INDEX_FILE).exists(), said
        PreparedCorpus(data).verify()
        (data / "checked.json").unlink()
        (data / PREPARING_FILE).unlink(missing_ok=True)
        assert {path.name: path.read_bytes() for path in data.iterdir()} == wanted
        campaign.counted("preparations brought to their end")
        shutil.rmtree(data)
