"""Ids turned into text piece by piece, and what an empty prompt begins with."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm.text.streaming import StreamDecoder, start_ids
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer

BYTES = ByteTokenizer()


def pieces(data: bytes, cuts: list[int]) -> list[str]:
    decoder = StreamDecoder(BYTES)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    parts = [decoder.feed(list(data[a:b])) for a, b in itertools.pairwise(edges)]
    return [*parts, decoder.finish()]


@settings(deadline=None)
@given(st.text(max_size=30), st.lists(st.integers(0, 200), max_size=8))
def test_a_text_of_bytes_comes_back_in_whole_characters(text: str, cuts: list[int]) -> None:
    got = pieces(text.encode(), cuts)
    assert "".join(got) == text
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in got)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.sampled_from([*b"a\x80\xbf\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\xed\xa0\xff\xc0\xf4"]), max_size=12
    ),
    st.lists(st.integers(0, 200), max_size=8),
)
def test_bytes_that_are_no_text_decode_as_they_would_at_once(data: list[int], cuts: list[int]) -> None:
    assert "".join(pieces(bytes(data), cuts)) == BYTES.decode(data)


def test_an_unfinished_character_waits_and_ends_as_a_replacement() -> None:
    decoder = StreamDecoder(BYTES)
    assert [decoder.feed([byte]) for byte in "€".encode()[:2]] == ["", ""]
    assert decoder.waiting == 2
    assert decoder.finish() == "\ufffd"
    assert (decoder.finish(), decoder.waiting) == ("", 0)


def test_characters_need_no_waiting() -> None:
    decoder = StreamDecoder(CharTokenizer("abé"))
    assert [decoder.feed([2, 0]), decoder.feed([]), decoder.feed([1]), decoder.finish()] == [
        "éa",
        "",
        "b",
        "",
    ]
    assert decoder.waiting == 0


@pytest.mark.parametrize(
    ("tokenizer", "ids"),
    [(CharTokenizer("ab\n"), [2]), (CharTokenizer("ab"), [0]), (BYTES, [10])],
)
def test_an_empty_prompt_begins_a_line_where_there_are_lines(
    tokenizer: CharTokenizer | ByteTokenizer, ids: list[int]
) -> None:
    assert start_ids(tokenizer) == ids
