"""StopMatcher against `str.find` on the whole text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_generation import stopped_text

from charlm.errors import InputError
from charlm.generation import StopMatcher

letters = st.text("ab\n", max_size=30)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@settings(deadline=None)
@given(letters, stops, st.lists(st.integers(0, 30), max_size=8))
def test_in_any_pieces_the_text_ends_where_the_whole_would(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(stop)
    expected, met = stopped_text(text, stop)
    shown = ""
    for piece in pieces_of(text, cuts):
        shown += matcher.feed(piece)
        assert expected.startswith(shown)  # no part of a stop string was ever shown
    assert matcher.stopped is met
    assert shown + matcher.finish() == expected
    assert matcher.finish() == ""


@settings(deadline=None)
@given(letters, stops)
def test_nothing_is_held_back_that_cannot_become_a_stop_string(text: str, stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    shown = ""
    for n, character in enumerate(text, start=1):
        shown += matcher.feed(character)
        if matcher.stopped:
            break
        held = text[len(shown) : n]
        assert not held or any(s.startswith(held) for s in stop)


@settings(deadline=None)
@given(letters, st.text("ab\n", min_size=1, max_size=4))
def test_a_single_stop_string_ends_the_text_at_find(text: str, stop: str) -> None:
    matcher = StopMatcher([stop])
    shown = "".join(map(matcher.feed, text)) + matcher.finish()
    at = text.find(stop)
    assert shown == (text if at < 0 else text[:at])


@settings(deadline=None)
@given(letters, stops, st.lists(st.integers(0, 30), max_size=8))
def test_a_kept_stop_string_ends_the_text_and_nothing_is_held_back(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(stop, keep=True)
    ends = [end for end in range(len(text) + 1) if any(text.endswith(s, 0, end) for s in stop)]
    expected = text[: ends[0]] if ends else text
    shown = given = ""
    for piece in pieces_of(text, cuts):
        shown += matcher.feed(piece)
        given += piece
        assert shown == expected[: len(given)]
    assert matcher.stopped is bool(ends)
    assert matcher.finish() == ""


def test_of_two_stop_strings_the_one_complete_first_counts() -> None:
    matcher = StopMatcher(["abc", "b"])
    assert matcher.feed("xabc") == "xa"
    longest = StopMatcher(["b", "ab"])
    assert longest.feed("xab") == "x"


def test_after_a_stop_nothing_more_is_passed() -> None:
    matcher = StopMatcher(["."])
    assert matcher.feed("one. two") == "one"
    assert matcher.feed("three") == ""
    assert matcher.finish() == ""
    assert matcher.stopped


def test_without_stop_strings_everything_passes_at_once() -> None:
    matcher = StopMatcher([])
    assert [matcher.feed(piece) for piece in ("a", "", "bc")] == ["a", "", "bc"]
    assert not matcher.stopped


def test_keep_must_be_true_or_false() -> None:
    with pytest.raises(InputError, match="keep_stop must be True or False, got 1"):
        StopMatcher(["a"], keep=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", ["END", [""], ["a", ""], ["a", 5], [None], [b"a"], 5, None])
def test_stop_must_be_a_sequence_of_non_empty_strings(stop: Any) -> None:
    with pytest.raises(InputError, match="stop must be a sequence of non-empty strings, got "):
        StopMatcher(stop)
