"""Shared fixtures: the corpus of the lecture, and a small text of our own."""

from __future__ import annotations

import os
import sys
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
