"""Finds the long runs of ids that two texts have in common.

All windows of one width are hashed, the hashes of one text are looked up among those of the other, and equal
hashes are confirmed by comparing the ids. So the answer is exact. The time grows with the length of the texts
times the logarithm of the longest run. This module works on ids and knows no characters.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Overlap", "find_overlap"]

_STRETCH = 2**18  # windows hashed at once
_TABLE_BITS = 27  # at most: the table that excludes most windows takes 128 MiB
_COMPARED = 2**23  # ids compared at once

Ids = NDArray[np.unsignedinteger[Any]]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Overlap:
    """The part of a text that occurs in another text, in runs of at least some length."""

    shared: int
    """The number of ids that lie in such a run."""
    longest: Ids
    """The longest run of the text that occurs in the other, the first of several; empty if there is none."""
    begins: Ints
    """(K,) where the stretches of the text that such runs cover begin, in order."""
    stops: Ints
    """(K,) where they stop, exclusively."""


def find_overlap(text: Ids, other: Ids, width: int) -> Overlap:
    """Find the runs of at least `width` ids of a text that occur in another text.

    Memory: about 40 bytes per id of `text` and 1 per id of `other`; a few more if much is shared.

    Args:
        text: (N,) the ids to look for.
        other: (M,) the ids to search through; may be far longer.
        width: the shortest run that counts, at least 1.

    Example:
        >>> text, other = (np.frombuffer(line, np.uint8) for line in (b"in the end", b"the beginning"))
        >>> overlap = find_overlap(text, other, 3)
        >>> overlap.shared, overlap.longest.tobytes()
        (4, b'the ')
    """
    if min(len(text), len(other)) < width:
        return _nothing(text)
    # A second attempt follows a collision of hashes, which is very rare.
    attempts = (_attempt(text, other, width, seed) for seed in itertools.count())
    return next(overlap for overlap in attempts if overlap is not None)


def _attempt(text: Ids, other: Ids, width: int, seed: int) -> Overlap | None:
    """Return the overlap, or None if windows with equal hashes differ."""
    hashing = _Hashing(max(int(text.max()), int(other.max())) + 3, seed)
    places, others = _look_up(text, other, width, hashing)
    if not _all_equal(text, other, places, width):
        return None
    begins, stops = _covered(places >= 0, width)
    if not len(begins):
        return _nothing(text)
    longest = _longest(text, other, (places, others), width, hashing)
    if longest is None:
        return None
    return Overlap(int((stops - begins).sum()), longest, begins, stops)


def _nothing(text: Ids) -> Overlap:
    return Overlap(0, text[:0], np.zeros(0, np.int64), np.zeros(0, np.int64))


class _Hashing:
    """Hashes of windows: each id has a random number, and numbers are combined until they span the window."""

    def __init__(self, n_ids: int, attempt: int) -> None:
        draw = np.random.default_rng(attempt)
        self._numbers = draw.integers(2**64, size=n_ids, dtype=np.uint64)
        self._factors = draw.integers(2**64, size=2, dtype=np.uint64) | np.uint64(1)

    def __call__(self, ids: Ids, width: int) -> Hashes:
        """Return the hash of each window, (N - width + 1,)."""
        hashes = self._numbers[ids]  # (N,)
        spanned = 1
        while spanned < width:
            step = min(spanned, width - spanned)  # the two halves may overlap
            hashes = hashes[:-step] * self._factors[0] + hashes[step:] * self._factors[1]
            hashes ^= hashes >> np.uint64(32)
            spanned += step
        return hashes


def _look_up(text: Ids, other: Ids, width: int, hashing: _Hashing) -> tuple[Ints, Bools]:
    """Look up each window of the text among the windows of the other, by hash alone.

    Returns:
        (N - width + 1,) the place of each window in the other text, or -1; and (M - width + 1,) whether each
        window of the other text occurs in this one.
    """
    hashes = hashing(text, width)
    order = np.argsort(hashes)
    ordered = hashes[order]
    bits = min(_TABLE_BITS, len(ordered).bit_length() + 4)
    mask = np.uint64((1 << bits) - 1)
    table = np.zeros(1 << bits, dtype=np.bool_)
    table[ordered & mask] = True
    places = np.full(len(ordered), -1)  # of the first of equal hashes
    others = np.zeros(max(len(other) - width + 1, 0), dtype=np.bool_)
    stretch = max(_STRETCH, width)  # a shorter one would hash each id many times
    for start in range(0, len(others), stretch):
        hashes = hashing(other[start : start + stretch + width - 1], width)
        possible = np.flatnonzero(table[hashes & mask])
        possible = possible[np.argsort(hashes[possible])]  # searchsorted is far quicker on sorted hashes
        at = np.searchsorted(ordered, hashes[possible])
        at[at == len(ordered)] = 0
        same = ordered[at] == hashes[possible]
        places[at[same]] = start + possible[same]
        others[start + possible[same]] = True
    first = np.maximum.accumulate(np.where(ordered != np.roll(ordered, 1), np.arange(len(ordered)), 0))
    unsorted = np.empty_like(places)
    unsorted[order] = places[first]
    return unsorted, others


def _all_equal(text: Ids, other: Ids, places: Ints, width: int) -> bool:
    """Return whether each window of the text is equal to the window at its place in the other text."""
    mine = np.flatnonzero(places >= 0)
    at = places[mine]
    if not np.array_equal(text[mine + width - 1], other[at + width - 1]):
        return False
    # A window that follows another one in both texts needs no more than this comparison of its last id.
    begins = np.ones(len(mine), dtype=np.bool_)
    begins[1:] = (np.diff(mine) != 1) | (np.diff(at) != 1)
    mine, at = mine[begins], at[begins]
    windows, others = (np.lib.stride_tricks.sliding_window_view(ids, width) for ids in (text, other))
    rows = max(1, _COMPARED // width)
    return all(
        np.array_equal(windows[mine[i : i + rows]], others[at[i : i + rows]])
        for i in range(0, len(mine), rows)
    )


def _covered(starts: Bools, width: int) -> tuple[Ints, Ints]:
    """Return begins and stops of the stretches that the windows with these starts cover, in order."""
    edges = np.flatnonzero(np.diff(starts, prepend=False, append=False))
    begins, stops = edges[::2], edges[1::2] + width - 1
    apart = begins[1:] > stops[:-1]
    return begins[np.append(True, apart)[: len(begins)]], stops[np.append(apart, True)[: len(begins)]]


def _longest(text: Ids, other: Ids, found: tuple[Ints, Bools], width: int, hashing: _Hashing) -> Ids | None:
    """Return the longest common run, or None if windows with equal hashes differ.

    Each round looks for runs of some length, and keeps only the parts of the texts that such runs cover.
    """
    places, others = found  # of windows of `width`
    end = max(int(text.max()), int(other.max())) + 1  # follows each piece; end + 1 in the other text
    low, high, guess = 0, len(text) + 1, width  # a run of `low` ids is common, none of `high`
    run, twin = text[:0], other[:0]
    whole_tried = False
    while True:
        if (places >= 0).any():
            low, first = guess, int(np.argmax(places >= 0))
            run, twin = text[first : first + low], other[places[first] : places[first] + low]
            begins, stops = _covered(places >= 0, low)
            high = min(high, int((stops - begins).max()) + 1)
            text = _cut(text, begins, stops, end)
            other = _cut(other, *_covered(others, low), end + 1)
        else:
            high = guess
        # Different hashes prove different windows, so only the last run is in doubt.
        if high - low == 1:
            return run if np.array_equal(run, twin) else None
        guess = min(2 * low, (low + high) // 2) if whole_tried else high - 1
        whole_tried = True
        places, others = _look_up(text, other, guess, hashing)


def _cut(ids: Ids, begins: Ints, stops: Ints, end: int) -> Ids:
    """Return stretches of a text, which do not touch, each followed by the id `end`."""
    longer = np.append(ids, np.array(end, np.min_scalar_type(end)))
    longer[stops] = end
    edges = np.zeros(len(longer) + 1, dtype=np.int8)
    edges[begins] += 1
    edges[stops + 1] -= 1
    return longer[np.cumsum(edges[:-1], dtype=np.int8).astype(np.bool_)]
