"""`PlainNGram`: the computation of `charlm/native/ngrams.h`, bit for bit, for machines without a C compiler.

It is slow, but it can read files that were made with the compiled engine. The operations and their order are
those of the C source, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from charlm.compression.portable import log
from charlm.generation.engine import Engine
from charlm.generation.passes import Pass
from charlm.models.ngram import NGramLM

__all__ = ["PlainNGram"]

_LEAST = np.float32(np.finfo(np.float32).tiny)
_ONE = np.float32(1)


class PlainNGram(Engine):
    """An n-gram model's predictions, the same on every machine.

    Args:
        model: with float32 discounts, on a CPU.
        rows: B.
    """

    def __init__(self, model: NGramLM, rows: int) -> None:
        super().__init__(rows, vocab_size=model.vocab_size, block_size=None, device=torch.device("cpu"))
        self._model = model
        self._codes, self._counts = model.codes.numpy(), model.counts.numpy()
        self._discounts = model.discounts.detach().numpy()
        self._shares = model.window_shares.detach().numpy()

    @override
    def fork(self, rows: Sequence[int]) -> Self:
        return type(self)(self._model, len(rows))

    @override
    def logits(self, texts: NDArray[np.int64], passes: Sequence[Pass]) -> list[Tensor]:
        return [
            torch.from_numpy(
                np.stack(
                    [
                        self._predict(texts[one.row], at)
                        for at in range(one.stop + 1 - one.wanted, one.stop + 1)
                    ]
                )
            )
            for one in passes
        ]

    def _predict(self, ids: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        """Return the log-probabilities (V,) for a position of a text."""
        p = np.full(self.vocab_size, _ONE / np.float32(self.vocab_size), np.float32)
        config = self._model.config
        low = max(position - config.window, 0)
        places = np.empty(0, np.int64)
        if config.window:
            same = np.flatnonzero(ids[low : position - 1] == ids[position - 1])[::-1] + low
            places = same[: config.WINDOW_PLACES]
        node: int | None = 0
        for length in range(position + 1):
            before = ids[position - length : position]
            node = self._node(before) if node is not None and length < len(self._discounts) else None
            if node is not None:
                self._mix(p, node, length)
            if length:
                starts = places - (length - 1)
                places = places[(starts >= low) & (ids[np.maximum(starts, 0)] == before[0])]
                places = places[: len(places) if length <= len(self._shares) else 0]
                if len(places):
                    self._mix_window(p, ids[places + 1], length)
            if node is None and not len(places):
                break
        return log(np.maximum(p, _LEAST).astype(np.float64)).astype(np.float32)

    def _node(self, ids: NDArray[np.int64]) -> int | None:
        """Return the number of a context, or None if it never occurred."""
        node = 0
        for i in ids.tolist():
            code = node * self.vocab_size + i
            at = int(np.searchsorted(self._codes, code))
            if at == len(self._codes) or self._codes[at] != code:
                return None
            node = at + 1
        return node

    def _mix(self, p: NDArray[np.float32], node: int, length: int) -> None:
        """Mix the distribution of the counts after a context into p (V,)."""
        V, discounts = self.vocab_size, self._discounts[length]
        first, end = np.searchsorted(self._codes, [node * V, (node + 1) * V])
        if first == end:
            return
        counts = self._counts[first:end]
        kind = np.minimum(counts, 3) - 1
        kinds = np.bincount(kind, minlength=3).astype(np.float32)
        total = np.float32(counts.sum(dtype=np.int64))
        p *= (kinds[0] * discounts[0] + kinds[1] * discounts[1] + kinds[2] * discounts[2]) / total
        p[self._codes[first:end] - node * V] += (counts.astype(np.float32) - discounts[kind]) / total

    def _mix_window(self, p: NDArray[np.float32], ids: NDArray[np.int64], length: int) -> None:
        """Mix the distribution of the ids that followed the same characters in the window into p (V,)."""
        shares, n = self._shares[length - 1], np.float32(len(ids))
        different, counts = np.unique(ids, return_counts=True)
        kind = np.minimum(counts, 3) - 1
        kinds = np.array([counts[kind == k].sum() for k in range(3)]).astype(np.float32)
        p *= (kinds[0] * shares[0] + kinds[1] * shares[1] + kinds[2] * shares[2]) / n
        p[different] += counts.astype(np.float32) * (_ONE - shares[kind]) / n
