"""Interpolated Kneser-Ney smoothing with given discounts, from its formula, with dictionaries and loops."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

__all__ = ["PlainNGram"]

Gram = tuple[int, ...]


class PlainNGram:
    """Counts of a text, and the probabilities that they give."""

    def __init__(self, ids: Sequence[int], V: int, order: int) -> None:
        self.V, self.order = V, order
        self.counts: Counter[Gram] = Counter(tuple(ids[i : i + order]) for i in range(len(ids) - order + 1))
        for length in range(1, order):
            before: defaultdict[Gram, set[int]] = defaultdict(set)
            for i in range(len(ids) - length + 1):
                before[tuple(ids[i : i + length])].add(ids[i - 1] if i else -1)
            self.counts.update({gram: len(found) for gram, found in before.items()})

    def probability(self, context: Sequence[int], i: int, discounts: Sequence[Sequence[float]]) -> float:
        """Return p(i | the last order - 1 ids of the context)."""
        p = 1 / self.V
        for length in range(min(len(context) + 1, self.order)):
            behind = tuple(context[len(context) - length :])
            counts = [self.counts[*behind, j] for j in range(self.V)]
            if sum(counts) == 0:
                continue
            taken = [0.0, *discounts[length]]
            shared = math.fsum(taken[min(count, 3)] for count in counts)
            p = (counts[i] - taken[min(counts[i], 3)] + shared * p) / sum(counts)
        return p
