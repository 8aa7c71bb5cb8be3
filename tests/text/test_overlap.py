"""What two texts have in common: exact for every text, and never much slower for one than for another."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracles.plain_inspection import plain_overlap

from charlm.text import overlap
from charlm.text.overlap import find_overlap

few_ids = st.lists(st.integers(0, 2), min_size=0, max_size=40)


def ids_of(values: Any, dtype: Any = np.uint8) -> NDArray[Any]:
    return np.array(values, dtype=dtype)


@given(few_ids, few_ids, st.integers(1, 9))
@example([0] * 20, [0] * 9, 4)
@example([0, 1] * 10, [1, 0] * 10, 3)
@example([0, 1, 0, 2, 0, 1, 0], [0, 1, 0, 1, 0, 2], 2)
def test_it_is_what_comparing_every_substring_finds(text: list[int], other: list[int], width: int) -> None:
    found = find_overlap(ids_of(text), ids_of(other), width)
    assert (found.shared, found.longest.tolist()) == plain_overlap(text, other, width)


@given(few_ids, few_ids, few_ids, st.integers(1, 9), st.sampled_from([1, 2, 7]))
def test_a_part_of_the_other_text_is_found_wherever_it_stands(
    before: list[int], part: list[int], behind: list[int], width: int, stretch: int
) -> None:
    text = [5, *part, 5]
    with pytest.MonkeyPatch.context() as patch:  # the end of what is hashed at once may fall anywhere
        patch.setattr(overlap, "_STRETCH", stretch)
        patch.setattr(overlap, "_COMPARED", stretch)
        found = find_overlap(ids_of(text), ids_of(before + part + behind), width)
    assert (found.shared, found.longest.tolist()) == plain_overlap(text, before + part + behind, width)
    assert found.shared >= (len(part) if len(part) >= width else 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_ids_of_every_size_are_told_apart(dtype: Any) -> None:
    top = min(np.iinfo(dtype).max, 1_114_111)
    text = ids_of([top, top - 1, top, 3, 4, 5], dtype)
    found = find_overlap(text, ids_of([top, top - 1, top, top, 3, 4], dtype), 2)
    assert (found.shared, found.longest.tolist()) == (5, [top, top - 1, top])
    assert found.longest.dtype.itemsize >= np.dtype(dtype).itemsize


def test_hashes_that_collide_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    class Weak(overlap._Hashing):
        """Tells no window from another with the first seed, and only short ones with the second."""

        def __init__(self, n_ids: int, seed: int) -> None:
            super().__init__(n_ids, seed)
            self._seed = seed
            seeds.append(seed)

        def __call__(self, ids: NDArray[Any], width: int) -> NDArray[np.uint64]:
            hashes = super().__call__(ids, width)
            blind = self._seed == 0 or (self._seed == 1 and width > 3)
            return hashes * np.uint64(0 if blind else 1)

    monkeypatch.setattr(overlap, "_Hashing", Weak)
    text, other = [0, 1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 9, 9, 9, 0, 1, 2, 9]
    found = find_overlap(ids_of(text), ids_of(other), 3)
    assert (found.shared, found.longest.tolist()) == plain_overlap(text, other, 3) == (7, [3, 4, 5, 6])
    assert seeds == [0, 1, 2]


def test_a_collision_beside_a_longer_real_find_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class LastOnly(overlap._Hashing):
        """Hashes the last id of the shortest windows alone, with the first seed."""

        def __init__(self, n_ids: int, seed: int) -> None:
            super().__init__(n_ids, seed)
            self._seed = seed

        def __call__(self, ids: NDArray[Any], width: int) -> NDArray[np.uint64]:
            blind = self._seed == 0 and width == 2
            return self._numbers[ids[width - 1 :]] if blind else super().__call__(ids, width)

    monkeypatch.setattr(overlap, "_Hashing", LastOnly)
    found = find_overlap(ids_of([0, 1, 2, 3, 8, 5]), ids_of([7, 0, 1, 2, 3, 9, 5]), 2)
    assert (found.shared, found.longest.tolist()) == (4, [0, 1, 2, 3])


def test_texts_made_to_be_slow_are_not() -> None:
    """All windows alike, short periods, one template over and over: 400,000 ids each, in seconds."""
    draw = np.random.default_rng(0)
    template = draw.integers(0, 60, 80)
    same = np.zeros(400_000, np.uint8)
    period = np.tile(draw.integers(0, 60, 97), 4_124)[:400_000].astype(np.uint8)
    log = np.concatenate([[*template, *draw.integers(0, 10, 8)] for _ in range(4_545)]).astype(np.uint8)
    halves = np.tile(draw.integers(0, 60, 200_000), 2).astype(np.uint8)
    for text in (same, period, log, halves):
        began = time.process_time()
        middle = len(text) // 2
        found = find_overlap(text[middle:], text[:middle], 50)
        assert time.process_time() - began < 20
        assert found.shared > 0.9 * (len(text) - middle)
    assert len(found.longest) == 200_000


def test_the_longest_run_is_the_first_of_several() -> None:
    parts = [list(range(i, i + 4)) for i in (10, 20, 30)]
    text = list(itertools.chain(parts[0], [1], parts[1], [1], parts[2]))
    other = list(itertools.chain(parts[2], [2], parts[1], [2], parts[0]))
    assert find_overlap(ids_of(text), ids_of(other), 2).longest.tolist() == parts[0]
