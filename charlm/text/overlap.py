"""What one text has in common with another: the characters of it that stand in long runs of the other, too.

All windows of one width are hashed, those of one text are looked up among those of the other, and what the
hash says is compared with the ids themselves. So the answer is exact, and whatever the texts are, the time
grows with their length times the logarithm of the longest run. Works on ids; knows nothing of characters.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Overlap", "find_overlap"]

_STRETCH = 2**18  # windows hashed at once
_TABLE_BITS = 27  # at most, of the table that sorts out most windows: 128 MiB
_COMPARED = 2**23  # ids compared at once

Ids = NDArray[np.unsignedinteger[Any]]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Overlap:
    """The part of a text that occurs in another one, in runs of some least length."""

    shared: int
    """How many ids lie in such a run."""
    longest: Ids
    """The longest run of the text that occurs in the other (the first of several); empty if there is none."""
    begins: Ints
    """(K,) where the stretches of the text begin that such runs cover, in order."""
    stops: Ints
    """(K,) where they stop; the ids there belong to them no more."""


def find_overlap(text: Ids, other: Ids, width: int) -> Overlap:
    """Find the runs of at least `width` ids of a text that occur in another text.

    Memory: about 40 bytes for each id of `text`, and 1 for each of `other`; a few more where much is shared.

    Args:
        text: (N,) the ids that are looked for.
        other: (M,) the ids among which they are looked for; may be far longer.
        width: the shortest run that counts, at least 1.

    Returns:
        Exact figures, whatever the ids are.

    Example:
        >>> text, other = (np.frombuffer(line, np.uint8) for line in (b"in the end", b"the beginning"))
        >>> found = find_overlap(text, other, 3)
        >>> found.shared, found.longest.tobytes()
        (4, b'the ')
    """
    if min(len(text), len(other)) < width:
        return _nothing(text)
    # A second attempt is needed after a collision of hashes, which is hardly ever seen.
    attempts = itertools.count()
    while (found := _attempt(text, other, width, next(attempts))) is None:
        pass
    return found


def _attempt(text: Ids, other: Ids, width: int, seed: int) -> Overlap | None:
    """Return the overlap, or None if two hashes were equal that should not be."""
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
    """Hashes of windows: numbers drawn for each id, put together two by two until they span the window."""

    def __init__(self, n_ids: int, attempt: int) -> None:
        draw = np.random.default_rng(attempt)
        self._numbers = draw.integers(2**64, size=n_ids, dtype=np.uint64)
        self._factors = draw.integers(2**64, size=2, dtype=np.uint64) | np.uint64(1)

    def __call__(self, ids: Ids, width: int) -> Hashes:
        """Return a number for each window (N - width + 1,): equal ones for equal windows."""
        hashes = self._numbers[ids]  # (N,)
        spanned = 1
        while spanned < width:
            step = min(spanned, width - spanned)  # the two halves may overlap
            hashes = hashes[:-step] * self._factors[0] + hashes[step:] * self._factors[1]
            hashes ^= hashes >> np.uint64(32)
            spanned += step
        return hashes


def _look_up(text: Ids, other: Ids, width: int, hashing: _Hashing) -> tuple[Ints, Bools]:
    """Look up each window of the text among those of the other, by their hashes alone.

    Returns:
        (N - width + 1,) where in the other text each window occurs, or -1; and (M - width + 1,) whether each
        window of that one occurs in the text.
    """
    hashes = hashing(text, width)
    order = np.argsort(hashes)
    wanted = hashes[order]
    bits = min(_TABLE_BITS, len(wanted).bit_length() + 4)
    mask = np.uint64((1 << bits) - 1)
    table = np.zeros(1 << bits, dtype=np.bool_)
    table[wanted & mask] = True
    places = np.full(len(wanted), -1)  # of the first of equal hashes
    others = np.zeros(max(len(other) - width + 1, 0), dtype=np.bool_)
    stretch = max(_STRETCH, width)  # a shorter one would hash each id many times
    for start in range(0, len(others), stretch):
        hashes = hashing(other[start : start + stretch + width - 1], width)
        possible = np.flatnonzero(table[hashes & mask])
        possible = possible[np.argsort(hashes[possible])]  # far quicker to bisect for in order
        at = np.searchsorted(wanted, hashes[possible])
        at[at == len(wanted)] = 0
        same = wanted[at] == hashes[possible]
        places[at[same]] = start + possible[same]
        others[start + possible[same]] = True
    first = np.maximum.accumulate(np.where(wanted != np.roll(wanted, 1), np.arange(len(wanted)), 0))
    unsorted = np.empty_like(places)
    unsorted[order] = places[first]
    return unsorted, others


def _all_equal(text: Ids, other: Ids, places: Ints, width: int) -> bool:
    """Whether each window of the text is equal to the one at its place in the other text."""
    mine = np.flatnonzero(places >= 0)
    at = places[mine]
    if not np.array_equal(text[mine + width - 1], other[at + width - 1]):
        return False
    # One that follows a window in both texts has only this last id to be compared.
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
    """Return where the stretches begin and stop that windows with these starts cover together, in order."""
    edges = np.flatnonzero(np.diff(starts, prepend=False, append=False))
    begins, stops = edges[::2], edges[1::2] + width - 1
    apart = begins[1:] > stops[:-1]
    return begins[np.append(True, apart)[: len(begins)]], stops[np.append(apart, True)[: len(begins)]]


def _longest(text: Ids, other: Ids, found: tuple[Ints, Bools], width: int, hashing: _Hashing) -> Ids | None:
    """Return the longest run that both have; None if two hashes were equal that should not be.

    Each round asks for runs of some length, and cuts the texts down to what such runs cover.
    """
    places, others = found  # of windows of `width`
    end = max(int(text.max()), int(other.max())) + 1  # stands behind each piece, another in the other text
    low, high, guess = 0, len(text) + 1, width  # both have a run of `low` ids, and none of `high`
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
        # Hashes that differ are of windows that differ, so only the last find is in doubt.
        if high - low == 1:
            return run if np.array_equal(run, twin) else None
        guess = min(2 * low, (low + high) // 2) if whole_tried else high - 1
        whole_tried = True
        places, others = _look_up(text, other, guess, hashing)


def _cut(ids: Ids, begins: Ints, stops: Ints, end: int) -> Ids:
    """Return some stretches of a text that do not touch, each followed by the id `end`."""
    longer = np.append(ids, np.array(end, np.min_scalar_type(end)))
    longer[stops] = end
    edges = np.zeros(len(longer) + 1, dtype=np.int8)
    edges[begins] += 1
    edges[stops + 1] -= 1
    return longer[np.cumsum(edges[:-1], dtype=np.int8).astype(np.bool_)]
