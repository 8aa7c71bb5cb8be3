"""The inferred types hold at run time too."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_the_typed_program_runs(tmp_path: Path) -> None:
    program = runpy.run_path(str(Path(__file__).with_name("check_types.py")))
    program["check"](tmp_path)
