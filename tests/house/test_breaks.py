"""The breaks fit the package: each finds what it replaces, has a name of its own, and a test that exists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.breaks import BREAKS, Break

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.apply.__name__)
def test_the_test_of_a_break_exists(broken: Break) -> None:
    file, _, name = broken.test.partition("::")
    assert f"def {name.partition('[')[0] or 'test_'}" in (ROOT / file).read_text(encoding="utf-8")


def test_breaks_have_names_and_sentences_of_their_own() -> None:
    assert len({broken.apply.__name__ for broken in BREAKS}) == len(BREAKS) == 24
    assert len({broken.what for broken in BREAKS}) == len(BREAKS)


@pytest.mark.slow
def test_every_break_finds_what_it_replaces() -> None:
    code = "from harness.breaks import BREAKS; [broken.apply() for broken in BREAKS]"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.slow
def test_a_break_reaches_the_processes_that_a_broken_one_starts() -> None:
    look = "from charlm.cli import signals; print(signals._SAME_KEYPRESS_SECONDS)"
    code = (
        "import subprocess, sys; from harness.breaks import break_charlm; break_charlm('second_ctrl_c'); "
        f"subprocess.run([sys.executable, '-c', {look!r}], env={{'PYTHONPATH': {str(ROOT)!r}}}, check=True)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE)
    assert done.stdout == b"inf\n"
