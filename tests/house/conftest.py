"""The documentation site, built once for the tests that look at it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from harness.documents import plain_environment

ROOT = Path(__file__).parents[2]


class Site(NamedTuple):
    """What `sphinx-build` left."""

    folder: Path
    returncode: int
    messages: str


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Build the site, with warnings as errors, and no other messages; of several processes, one does."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    said = shared / "site.json"
    with (shared / "site.lock").open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            returncode, messages = build(shared)
            said.write_text(json.dumps([returncode, messages]), encoding="utf-8")
    return Site(shared / "site" / "html", *json.loads(said.read_text(encoding="utf-8")))


def build(shared: Path) -> tuple[int, str]:
    work = shared / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", work / "doctrees", ROOT / "docs", work / "html"],
        check=False,
        cwd=shared,
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    return done.returncode, done.stdout
