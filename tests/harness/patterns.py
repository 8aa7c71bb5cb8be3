"""Regular expressions drawn by chance, for tests beside Python's own matching."""

from __future__ import annotations

import random

__all__ = ["CHARACTERS", "drawn_pattern"]

CHARACTERS = "abc1\n"
"""The vocabulary that the patterns are drawn for. Some of their parts match none of these."""

_ATOMS = [
    "a",
    "b",
    "c",
    "1",
    r"\d",
    r"\w",
    "[ab]",
    "[^a]",
    ".",
    "[a-c1]",
    r"\n",
    r"\s",
    "A",
    "(?i:A)",
    "é",
    r"\W",
]
_REPEATED = ["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "{0}", "{0,1}?"]


def drawn_pattern(depth: int, chance: random.Random) -> str:
    """Draw a regular expression with groups that are up to `depth` deep."""
    kind = chance.random()
    if depth == 0 or kind < 0.3:
        return chance.choice(_ATOMS)
    if kind < 0.5:
        return drawn_pattern(depth - 1, chance) + drawn_pattern(depth - 1, chance)
    if kind < 0.65:
        return f"(?:{drawn_pattern(depth - 1, chance)}|{drawn_pattern(depth - 1, chance)})"
    if kind < 0.7:
        return f"({drawn_pattern(depth - 1, chance)})"
    return f"(?:{drawn_pattern(depth - 1, chance)}){chance.choice(_REPEATED)}"
