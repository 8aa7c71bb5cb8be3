"""`NGramState`: predictions from the tables of an n-gram model, by one native call for each.

A draft has to guess in a small part of the time that the model takes, which PyTorch's calls do not allow.
The tables are read where they lie, so there is nothing to prepare and no change to be missed; of a text, only
the ids are kept. Applies on a CPU where `kernel.c` does; `ngram_state` returns None elsewhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from charlm.generation.choosing import Chooser
from charlm.generation.native import NGrams, library
from charlm.generation.options import Overflow, SamplingOptions
from charlm.generation.state import PredictionState

__all__ = ["NGramState", "NGramTables", "ngram_state"]


@dataclass(frozen=True, kw_only=True)
class NGramTables:
    """The tensors of an `NGramLM`, as it describes them."""

    vocab_size: int
    codes: Tensor
    counts: Tensor
    discounts: Tensor

    def readable(self) -> bool:
        """Return whether the kernel can read them."""
        return (
            (self.codes.dtype, self.counts.dtype, self.discounts.dtype)
            == (torch.int64, torch.int32, torch.float32)
            and all(t.device.type == "cpu" and t.is_contiguous() for t in self._all())
            and len(self.codes) == len(self.counts)
        )

    def _all(self) -> tuple[Tensor, ...]:
        return self.codes, self.counts, self.discounts

    def structure(self) -> NGrams:
        """Return what the kernel is given."""
        sizes = (self.vocab_size, len(self.codes), len(self.discounts))
        return NGrams(*sizes, *(t.data_ptr() for t in self._all()))


def ngram_state(tables: Callable[[], NGramTables], rows: int, overflow: Overflow) -> NGramState | None:
    """Return a state of an n-gram model that it applies to, or None.

    Args:
        tables: gives them as they are now.
        rows: B.
        overflow: accepted for all models alike; here nothing overflows.
    """
    kernel = library()
    if kernel is None or not tables().readable():
        return None
    return NGramState(kernel, tables, rows, overflow)


class NGramState(PredictionState):
    """See the head of this file. `NGramLM.new_state` makes it where it applies.

    Args:
        kernel: the compiled `kernel.c`.
        tables: gives them as they are now.
        rows: B.
        overflow: accepted for all models alike.
    """

    def __init__(
        self, kernel: ctypes.CDLL, tables: Callable[[], NGramTables], rows: int, overflow: Overflow
    ) -> None:
        V = tables().vocab_size
        super().__init__(rows, overflow, vocab_size=V, block_size=None, device=torch.device("cpu"))
        self._kernel = kernel
        self._tables = tables
        self._ids: list[NDArray[np.int64]] = [np.zeros(64, np.int64) for _ in range(rows)]
        self._lengths = [0] * rows
        self._choose = Chooser(kernel, V)

    @property
    @override
    def lengths(self) -> list[int]:
        return list(self._lengths)

    @override
    def text(self, row: int) -> Tensor:
        return torch.from_numpy(self._ids[row][: self._lengths[row]].copy())

    @override
    def fork(self, rows: Sequence[int] | None = None) -> Self:
        picked = self._picked(rows)
        twin = type(self)(self._kernel, self._tables, len(picked), self.overflow)
        twin._ids = [self._ids[row].copy() for row in picked]
        twin._lengths = [self._lengths[row] for row in picked]
        return twin

    @override
    def _add(self, ids: Tensor | Sequence[Tensor]) -> None:
        for row, new in enumerate(ids):
            end = self._lengths[row] + len(new)
            if end > len(self._ids[row]):  # doubling keeps the copying small
                self._ids[row] = np.concatenate([self._ids[row], np.zeros(end, np.int64)])
            self._ids[row][self._lengths[row] : end] = new.numpy()
            self._lengths[row] = end

    @override
    def _retract(self, count: int) -> None:
        self._lengths = [length - count for length in self._lengths]

    @override
    def _logits(self, spans: Sequence[range]) -> list[Tensor]:
        tables = self._tables()
        structure = tables.structure()
        found = []
        for ids, span in zip(self._ids, spans, strict=True):
            logits = torch.empty(len(span), tables.vocab_size)
            self._kernel.charlm_ngrams(structure, ids.ctypes.data, span.start, span.stop, logits.data_ptr())
            found.append(logits)
        return found

    @override
    def advance(self, options: SamplingOptions, addresses: Sequence[int] | None = None) -> Tensor:
        if options.filters:
            return super().advance(options, addresses)
        addresses = range(self.rows) if addresses is None else addresses
        logits = self.predict().numpy()  # (B, V)
        chosen = np.empty(self.rows, np.int64)
        self._choose.all(logits, options, addresses, self._lengths, chosen)
        new = torch.from_numpy(chosen)
        self._add(new[:, None])
        return new
