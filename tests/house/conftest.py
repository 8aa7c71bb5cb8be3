"""The documentation site, built once for the tests that look at it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from reference.documents import plain_environment

ROOT = Path(__file__).parents[2]


class Site(NamedTuple):
    """What `sphinx-build` left."""

    folder: Path
    returncode: int
    messages: str


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Build the site, with warnings as errors and messages about nothing else."""
    work = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", work / "doctrees", ROOT / "docs", work / "html"],
        check=False,
        cwd=work,
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    return Site(work / "html", done.returncode, done.stdout)
