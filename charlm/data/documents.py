"""Documents: separate texts in one row of ids. No torch.

No window crosses the border between two documents, so the first id of each is never a target. Each document
has a weight, which tells how often training sees it. A document that is too short for a block is left out of
training, but evaluated like any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from charlm.errors import DataError, InputError, shown
from charlm.plain import as_float, share_of

__all__ = ["Documents"]

FEW = 20
"""Fewer documents than this are each split; of this many or more, whole documents are chosen."""
MOST_WEIGHT = 1e6
"""The largest weight; the smallest is one over it. So the blocks of an epoch can be counted in 64 bits."""


@dataclass(frozen=True, eq=False)
class Documents:
    """The end and the weight of each document of a row.

    Example:
        >>> documents = Documents.of([5, 3])
        >>> documents.ends.tolist(), documents.n_targets
        ([5, 8], 6)
    """

    ends: NDArray[np.int64]
    """(D,) the end of each document in ids, increasing."""
    weights: NDArray[np.float64]
    """(D,) how often training sees each, relative to a document of weight 1."""

    @classmethod
    def of(cls, lengths: Sequence[int], weights: Sequence[float] | None = None) -> Documents:
        """Return the documents of these lengths; empty ones are ignored.

        Raises:
            InputError: there is not one weight per document, or a weight is no number from 1e-6 to 1e6.
            DataError: all documents are empty.
        """
        try:
            given = [1.0] * len(lengths) if weights is None else [*weights]
        except TypeError:
            raise InputError(
                f"weights must be numbers, one for each document, got {shown(weights)}"
            ) from None
        if len(given) != len(lengths):
            raise InputError(f"weights must be one for each document, got {len(given)} for {len(lengths)}")
        values = [as_float(weight) or 0.0 for weight in given]
        for weight, value in zip(given, values, strict=True):
            if not MOST_WEIGHT**-1 <= value <= MOST_WEIGHT:
                raise InputError(f"weights must be numbers from 1e-6 to 1e6, got {shown(weight)}")
        kept = np.array(lengths, np.int64) > 0
        if not kept.any():
            raise DataError("there must be a document that is not empty, got none")
        ends = np.cumsum(np.array(lengths, np.int64)[kept])
        return cls(ends, np.array(values, np.float64)[kept])

    def __len__(self) -> int:
        """Return D."""
        return len(self.ends)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(D,) where each document begins."""
        return np.concatenate([[0], self.ends[:-1]])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(D,) length of each document in ids."""
        return self.ends - self.starts

    @cached_property
    def n_targets(self) -> int:
        """The number of ids that are not the first of their document."""
        return int(self.ends[-1]) - len(self)

    @cached_property
    def digest(self) -> str:
        """The sha256 of borders and weights."""
        content = self.ends.astype("<i8").tobytes() + self.weights.astype("<f8").tobytes()
        return hashlib.sha256(content).hexdigest()

    def blocks(self, block_size: int) -> NDArray[np.int64]:
        """Return the number of blocks in each document, without overlap and with their targets, (D,)."""
        return (self.lengths - 1) // block_size

    def n_starts(self, block_size: int) -> NDArray[np.int64]:
        """Return the number of places where a block can begin in each document, (D,)."""
        return np.maximum(self.lengths - block_size, 0)

    def places(self, shares: NDArray[np.float64], block_size: int) -> NDArray[np.int64]:
        """Choose where blocks begin, by weight: each place has the weight of its document.

        Args:
            shares: (B,) random numbers, uniform in [0, 1).
            block_size: T.
        """
        counts = self.n_starts(block_size)
        sums = np.cumsum(self.weights * counts)
        at = np.minimum(shares * sums[-1], np.nextafter(sums[-1], 0))  # rounding may reach the end
        number = np.searchsorted(sums, at, side="right")
        before = sums[number] - self.weights[number] * counts[number]
        inside = ((at - before) / self.weights[number]).astype(np.int64)
        chosen: NDArray[np.int64] = self.starts[number] + np.minimum(inside, counts[number] - 1)
        return chosen

    def place(self, number: int, block_size: int) -> int:
        """Return where block `number` begins, counting the places of all documents in order."""
        sums = np.cumsum(self.n_starts(block_size))
        document = int(np.searchsorted(sums, number, side="right"))
        return int(self.starts[document] + number - (sums[document - 1] if document else 0))

    def windows(self, block_size: int, most: int | None = None) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield each length of windows with their begins; together the windows cover every target once.

        Args:
            block_size: T, the length of all windows but the last of each document.
            most: the most windows, spread evenly over all; None: all.
        """
        full = self.blocks(block_size)
        first = np.repeat(self.starts, full)
        first += block_size * (np.arange(len(first)) - np.repeat(np.cumsum(full) - full, full))
        lengths = self.lengths - 1 - full * block_size  # of the last window of each document
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        rest = (self.starts + full * block_size)[order]
        begins = np.concatenate([first, rest])
        sizes = np.concatenate([np.full(len(first), block_size), lengths[order]])
        if most is not None and most < len(begins):
            chosen = np.arange(most) * len(begins) // most
            begins, sizes = begins[chosen], sizes[chosen]
        borders = np.flatnonzero(np.diff(sizes, prepend=-1))
        for low, high in zip(borders, [*borders[1:], len(sizes)], strict=True):
            yield int(sizes[low]), begins[low:high]

    def parts(self, ranges: Sequence[range]) -> Documents:
        """Return the documents of some ranges joined together; a cut document becomes several."""
        ends, weights, base = [], [], 0
        for part in (part for part in ranges if len(part)):
            inside = slice(
                int(np.searchsorted(self.ends, part.start, side="right")),
                int(np.searchsorted(self.ends, part.stop)) + 1,
            )
            ends.append(np.minimum(self.ends[inside], part.stop) - part.start + base)
            weights.append(self.weights[inside])
            base += len(part)
        if not ends:
            raise DataError("the documents are too short to be split: a part of them has none")
        return Documents(np.concatenate(ends), np.concatenate(weights))

    def split(self, fraction: float) -> tuple[list[range], list[range]]:
        """Return the ranges of the first part, for training, and those of the second.

        Fewer than `FEW` documents are each cut at `fraction`. Otherwise every nth document in the order of
        length belongs to the second part, so that both parts have long and short ones.

        Raises:
            DataError: a part would have no document.
        """
        if len(self) < FEW:
            pairs = list(zip(self.starts.tolist(), self.ends.tolist(), strict=True))
            cuts = [start + share_of(end - start, fraction) for start, end in pairs]
            first = [range(start, cut) for (start, _), cut in zip(pairs, cuts, strict=True)]
            return first, [range(cut, end) for (_, end), cut in zip(pairs, cuts, strict=True)]
        longest_first = np.argsort(-self.lengths, kind="stable")
        counts = np.floor(np.arange(len(self) + 1) * (1 - fraction) + 0.5)  # of the second part so far
        is_second = np.zeros(len(self), bool)
        is_second[longest_first] = np.diff(counts) > 0
        if is_second.all() or not is_second.any():
            raise DataError(
                f"of {len(self)} documents there must be one in each part, got all in one with the fraction "
                f"{fraction:g}. Choose one further from 0 and 1."
            )
        borders = np.flatnonzero(np.diff(is_second)) + 1
        begins = np.concatenate([[0], borders])
        stops = np.concatenate([borders, [len(self)]])
        ranges = [
            range(int(self.starts[a]), int(self.ends[b - 1])) for a, b in zip(begins, stops, strict=True)
        ]
        odd = int(is_second[0])
        return ranges[odd::2], ranges[1 - odd :: 2]
