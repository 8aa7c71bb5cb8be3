"""Tests that are repeated: how often, from which seed, and what was counted.

Each test of `tests/reliability` has a short form, which the test suite runs, and as long a one as is asked
for: `pytest tests/reliability/test_kills.py --trials 10000 --timeout 0`. What it counted stands at the end of
pytest's report, so that a figure in docs/reliability.md can be seen again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from harness.command import ROOT, environment

__all__ = ["Campaign"]


@dataclass
class Campaign:
    """One test's number of trials, its seed, and its figures.

    Attributes:
        name: the test.
        seed: every random choice of the test comes from it.
        asked: the number of trials given by `--trials`, or None.
    """

    name: str
    seed: int
    asked: int | None
    figures: dict[str, int] = field(default_factory=dict)

    def trials(self, short: int) -> int:
        """Return how many trials to make: `short` of them unless another number was asked for."""
        return short if self.asked is None else self.asked

    def counted(self, what: str, number: int = 1) -> None:
        """Add to one of the figures; a test that ends well has seen no violation in them."""
        self.figures[what] = self.figures.get(what, 0) + number

    def count_elsewhere(
        self, function: Callable[[Path, int, int], dict[str, int]], folder: Path, short: int
    ) -> None:
        """Count what a function of a test's module does in a process of its own.

        Args:
            function: is called with the folder, the number of trials and the seed; returns figures.
            folder: where it works.
            short: as for `trials`.
        """
        file, name = Path(function.__code__.co_filename), function.__name__
        code = (
            f"import json, sys; from pathlib import Path; from {file.stem} import {name}; "
            f"print(json.dumps({name}(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(self.trials(short)), str(self.seed)],
            env=environment(PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "tests", file.parent)))),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2_000:]
        for what, number in json.loads(done.stdout).items():
            self.counted(what, number)

    def line(self, passed: bool) -> str | None:
        """Return what the report shows of it, if it counted anything."""
        if not self.figures:
            return None
        said = ", ".join(f"{number:,} {what}" for what, number in self.figures.items())
        return f"{'ok' if passed else 'VIOLATED'}  {self.name}: {said} (seed {self.seed})"
