"""Interpolated Kneser-Ney smoothing with given discounts, from its formula, with dictionaries and loops.

So, too, what a window of the last ids says, which is mixed in after the counts of each length.
"""

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

    def probability(
        self,
        context: Sequence[int],
        i: int,
        discounts: Sequence[Sequence[float]],
        shares: Sequence[Sequence[float]] = (),
        window: int = 0,
    ) -> float:
        """Return p(i | context), of which the counts use the last order - 1 ids, and the window so many."""
        p = 1 / self.V
        for length in range(min(len(context), max(self.order - 1, len(shares))) + 1):
            behind = tuple(context[len(context) - length :])
            counts = [self.counts[*behind, j] for j in range(self.V)] if length < self.order else []
            if sum(counts) > 0:
                taken = [0.0, *discounts[length]]
                shared = math.fsum(taken[min(count, 3)] for count in counts)
                p = (counts[i] - taken[min(counts[i], 3)] + shared * p) / sum(counts)
            followed = _followed(context[-window:], length) if 0 < length <= len(shares) else {}
            if followed:
                kept = [1.0, *(1 - share for share in shares[length - 1])]
                parts = {j: count * kept[min(count, 3)] for j, count in followed.items()}
                total = sum(followed.values())
                p = parts.get(i, 0.0) / total + (1 - sum(parts.values()) / total) * p
        return p


def _followed(recent: Sequence[int], length: int) -> Counter[int]:
    """Return what followed the last `length` ids where they had stood before."""
    wanted = list(recent[len(recent) - length :])
    places = [j for j in range(len(recent) - 1) if recent[j] == recent[-1]][-256:]
    same = [j for j in places if j + 1 >= length and list(recent[j + 1 - length : j + 1]) == wanted]
    return Counter(recent[j + 1] for j in same)
