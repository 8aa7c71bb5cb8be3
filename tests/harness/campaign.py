"""Tests that are repeated: how often, from which seed, and what was counted.

Each test of `tests/reliability` has a short form, which the test suite runs, and as long a one as is asked
for: `pytest tests/reliability/test_kills.py --trials 10000 --timeout 0`. What it counted stands at the end of
pytest's report, so that a figure in docs/reliability.md can be seen again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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

    def line(self, passed: bool) -> str | None:
        """Return what the report shows of it, if it counted anything."""
        if not self.figures:
            return None
        said = ", ".join(f"{number:,} {what}" for what, number in self.figures.items())
        return f"{'ok' if passed else 'VIOLATED'}  {self.name}: {said} (seed {self.seed})"
