"""What followed the same ids a short while before, in the very text that is read: names, themes, a style.

The last ids before a position are looked for among the ids before them, first the last one alone, then ever
more of them. A text says of its own next character what no other text can. Knows nothing of probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from charlm.models.config import NGramConfig

__all__ = ["Repeats", "Window", "spans"]


class Repeats(NamedTuple):
    """What followed where the last ids of R positions had stood before: P places in all."""

    rows: Tensor
    """(P,) which of the R positions it is about."""
    ids: Tensor
    """(P,) what followed there."""
    counts: Tensor
    """(P,) at how many places of its row this id followed."""
    total: Tensor
    """(R,) how many places each row has."""
    kinds: Tensor
    """(R, 3) at how many of them an id followed that follows once, twice, more often."""


class Window:
    """Some texts, ready to be searched.

    Args:
        texts: (B, S) ids, each row by itself.
        vocab_size: V.
        size: how many ids, the one before the predicted one included, are searched.
    """

    def __init__(self, texts: Tensor, vocab_size: int, size: int) -> None:
        B, S = texts.shape
        self.ids: Tensor = texts.flatten()  # (B S,)
        self.V: int = vocab_size
        self.S: int = S
        self.size: int = size
        rows = torch.arange(B, device=texts.device)[:, None]
        self.keys: Tensor = ((rows * vocab_size + texts) * S + torch.arange(S, device=texts.device)).flatten()
        self.sorted: Tensor = self.keys.sort().values  # by row, id, column

    def repeats(self, at: Tensor) -> Iterator[Repeats]:
        """Look the ids up that end at some places; one answer for each length that occurred before.

        Args:
            at: (R,) places in the flattened texts.
        """
        column, key = at % self.S, self.keys[at]
        reach = column.clamp(max=self.size - 1)
        end = torch.searchsorted(self.sorted, key)
        first = torch.maximum(torch.searchsorted(self.sorted, key - reach), end - NGramConfig.WINDOW_PLACES)
        rows, place = spans(first, end - first)
        then = self.sorted[place] % self.S + (at - column)[rows]  # (P,), where the same id stood
        found = torch.zeros(len(at) * self.V, dtype=torch.int64, device=at.device)
        for back in range(NGramConfig.WINDOW_LENGTHS):
            if back:
                wanted = self.ids[(at - back).clamp(min=0)]  # (R,)
                kept = then - back >= (at - reach)[rows]
                kept &= self.ids[(then - back).clamp(min=0)] == wanted[rows]
                rows, then = rows[kept], then[kept]
            if len(rows) == 0:
                return
            ids = self.ids[then + 1]
            one, keys = torch.ones_like(rows), rows * self.V + ids
            counts = found.index_add_(0, keys, one)[keys]
            found[keys] = 0
            kinds = one.new_zeros(3 * len(at)).index_add_(0, 3 * rows + counts.clamp(max=3) - 1, one)
            kinds = kinds.view(-1, 3)
            yield Repeats(rows, ids, counts, kinds.sum(dim=1), kinds)


def spans(first: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and the place of each of `number` (R,) places in a sequence from `first` (R,) on."""
    rows = torch.repeat_interleave(number)
    began = first + number - number.cumsum(0)
    return rows, torch.arange(len(rows), device=rows.device) + began[rows]
