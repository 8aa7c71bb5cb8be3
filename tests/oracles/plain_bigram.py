"""The bigram model from counts in a dict, and a loss over a whole text, in plain Python."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["bigram_log_probs", "mean_loss", "unseen_pairs"]


def bigram_log_probs(ids: Sequence[int], V: int, smoothing: float) -> list[list[float]]:
    """Return log p(j | i) = log (n_ij + s) / (n_i + s V); an id that never occurs predicts uniformly."""
    pairs = Counter(pairwise(ids))
    table = []
    for i in range(V):
        total = sum(pairs[i, j] for j in range(V))
        row = []
        for j in range(V):
            numerator = pairs[i, j] + smoothing
            if total + smoothing * V == 0:
                row.append(-math.log(V))
            elif numerator == 0:
                row.append(-math.inf)
            else:
                row.append(math.log(numerator) - math.log(total + smoothing * V))
        table.append(row)
    return table


def mean_loss(table: Sequence[Sequence[float]], ids: Sequence[int]) -> float:
    """Return the mean of -log p over every pair of neighbours, in nats."""
    pairs = Counter(pairwise(ids))
    return -math.fsum(count * table[i][j] for (i, j), count in pairs.items()) / (len(ids) - 1)


def unseen_pairs(seen_in: Sequence[int], ids: Sequence[int]) -> int:
    """Return how many positions of `ids` hold a pair that `seen_in` does not."""
    known = set(pairwise(seen_in))
    return sum(pair not in known for pair in pairwise(ids))
