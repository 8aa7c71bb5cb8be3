"""What `charlm inspect` counts, from the definitions: dictionaries, loops, every substring."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

__all__ = ["plain_entropy_bits", "plain_overlap"]


def plain_entropy_bits(text: str, order: int) -> float | None:
    """Return the mean of -log2 p(c | the characters before c), p as counted in the text itself."""
    pairs = [(text[i - order : i], text[i]) for i in range(order, len(text))]
    contexts, both = Counter(context for context, _ in pairs), Counter(pairs)
    if not pairs:
        return None
    return math.fsum(-math.log2(both[c, x] / contexts[c]) for c, x in pairs) / len(pairs)


def plain_overlap(text: Sequence[int], other: Sequence[int], width: int) -> tuple[int, list[int]]:
    """Return how many ids of a text lie in a run of `width` that the other has, and the longest such run."""

    def windows(ids: Sequence[int], length: int) -> list[tuple[int, ...]]:
        return [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]

    covered: set[int] = set()
    longest: list[int] = []
    for length in range(width, len(text) + 1):
        known = set(windows(other, length))
        found = [i for i, window in enumerate(windows(text, length)) if window in known]
        if found:
            longest = list(text[found[0] : found[0] + length])
        if length == width:
            covered = {i + j for i in found for j in range(width)}
    return len(covered), longest
