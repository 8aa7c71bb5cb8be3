"""What of a text stands word for word in another: by the definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.plain_inspection import plain_overlap

from charlm.errors import InputError
from charlm.evaluation import verbatim

few = st.text("ab😀", max_size=30)


@given(few, few, st.integers(1, 6))
def test_it_is_what_comparing_every_substring_finds(text: str, source: str, least: int) -> None:
    found = verbatim(text, source, least=least)
    shared, longest = plain_overlap([*map(ord, text)], [*map(ord, source)], least)
    assert (found.n_chars, found.n_shared, found.longest) == (len(text), shared, "".join(map(chr, longest)))
    covered = {i for begin, end in found.passages for i in range(begin, end)}
    assert covered == {
        i + j for i in range(len(text) - least + 1) for j in range(least) if text[i : i + least] in source
    }
    assert found.passages == sorted(found.passages)


def test_the_share_of_nothing_is_nothing() -> None:
    assert verbatim("", "abc").share == 0
    assert verbatim("abcd", "xabcx", least=3).share == 0.75


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InputError, match="least must be"):
        verbatim("a", "b", least=0)
    with pytest.raises(InputError, match="text must be a str, got int"):
        verbatim("a", 1)  # type: ignore[arg-type]  # the point
