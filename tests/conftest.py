"""Shared fixtures: the corpus of the lecture, and a small text of our own."""

from __future__ import annotations

import os
import sys

# One thread each: the models here are tiny, and threads that wait for each other would cost more than they
# do. It also holds for the processes that tests start. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def shakespeare() -> str:
    """Tiny Shakespeare, from the folder that CHARLM_DATA_DIR names."""
    folder = os.environ.get("CHARLM_DATA_DIR")
    if not folder:
        pytest.skip("CHARLM_DATA_DIR is not set: this test reads tinyshakespeare.txt from there")
    return Path(folder, "tinyshakespeare.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Name a file with a few thousand characters of generated text."""
    from charlm.testing import tiny_corpus

    path = tmp_path_factory.mktemp("corpus") / "small.txt"
    path.write_text(tiny_corpus(6_000), encoding="utf-8")
    return path
