"""The list of breaks fits the source: each could be applied, and names a test that exists."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.breaks import BREAKS, Break

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("broken", BREAKS, ids=[f"{b.file}-{i}" for i, b in enumerate(BREAKS)])
def test_a_break_can_be_applied_and_has_a_test(broken: Break) -> None:
    assert (ROOT / broken.file).read_text(encoding="utf-8").count(broken.old) == 1
    file, _, name = broken.test.partition("::")
    assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(encoding="utf-8")
    assert broken.old != broken.new
