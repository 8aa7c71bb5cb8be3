"""Finds the ids that followed the same ids shortly before in the text, since names and themes recur.

The context of a position is looked for in the window before it: first its last id alone, then longer and
longer contexts. This module knows no probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from charlm.models.config import NGramConfig

__all__ = ["Repeats", "Window", "spans"]


class Repeats(NamedTuple):
    """The P earlier places where the contexts of R positions occurred, and the ids that followed there."""

    rows: Tensor
    """(P,) the number of the position, below R, whose context occurred."""
    ids: Tensor
    """(P,) the id that followed."""
    counts: Tensor
    """(P,) the number of places of the same row where this id followed."""
    total: Tensor
    """(R,) the number of places of each row."""
    kinds: Tensor
    """(R, 3) the number of these places whose id followed once, twice, or more often."""


class Window:
    """Texts that are prepared for a search.

    Args:
        texts: (B, S) ids; each row is searched by itself.
        vocab_size: V.
        size: the number of ids before the predicted one that are searched.
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
        """Look up the contexts that end at some places; yield once for each length that occurred before.

        Args:
            at: (R,) places in the flattened texts.
        """
        column, key = at % self.S, self.keys[at]
        reach = column.clamp(max=self.size - 1)
        end = torch.searchsorted(self.sorted, key)
        first = torch.maximum(torch.searchsorted(self.sorted, key - reach), end - NGramConfig.WINDOW_PLACES)
        rows, place = spans(first, end - first)
        then = self.sorted[place] % self.S + (at - column)[rows]  # (P,), places of the same id
        table = torch.zeros(len(at) * self.V, dtype=torch.int64, device=at.device)
        for back in range(NGramConfig.WINDOW_LENGTHS):
            if back:
                before = self.ids[(at - back).clamp(min=0)]  # (R,)
                kept = then - back >= (at - reach)[rows]
                kept &= self.ids[(then - back).clamp(min=0)] == before[rows]
                rows, then = rows[kept], then[kept]
            if len(rows) == 0:
                return
            ids = self.ids[then + 1]
            one, keys = torch.ones_like(rows), rows * self.V + ids
            counts = table.index_add_(0, keys, one)[keys]
            table[keys] = 0
            kinds = one.new_zeros(3 * len(at)).index_add_(0, 3 * rows + counts.clamp(max=3) - 1, one)
            kinds = kinds.view(-1, 3)
            yield Repeats(rows, ids, counts, kinds.sum(dim=1), kinds)


def spans(first: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and place of the places `first`, `first` + 1, … of each row, `number` (R,) of them."""
    rows = torch.repeat_interleave(number)
    began = first + number - number.cumsum(0)
    return rows, torch.arange(len(rows), device=rows.device) + began[rows]
