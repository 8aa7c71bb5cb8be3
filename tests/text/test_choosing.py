"""Which ids a text may be written with."""

from __future__ import annotations

import pytest

from charlm import BigramLM, ByteTokenizer, CharLM, CharTokenizer
from charlm.errors import InputError
from charlm.text.choosing import banned_ids

TOKENIZER = CharTokenizer("abcdé")


@pytest.mark.parametrize(
    ("banned", "allowed", "wanted"),
    [("", None, []), ("ax", None, [0]), ("", "ab", [2, 3, 4]), ("a", "abé", [0, 2, 3]), ("", "abcdéxyz", [])],
)
def test_ids_are_those_of_the_characters(banned: str, allowed: str | None, wanted: list[int]) -> None:
    assert banned_ids(TOKENIZER, banned, allowed) == wanted


def test_of_bytes_only_ascii_can_be_named() -> None:
    assert banned_ids(ByteTokenizer(), "ab", None) == [97, 98]
    assert len(banned_ids(ByteTokenizer(), "", "abc")) == 253
    with pytest.raises(InputError, match="banned must be of ASCII characters for a model of bytes, got 'é'"):
        banned_ids(ByteTokenizer(), "é", None)


def test_something_must_be_left() -> None:
    with pytest.raises(InputError, match="at least one character of the vocabulary must be left"):
        banned_ids(TOKENIZER, "", "xyz")
    with pytest.raises(InputError, match="allowed must be a str of characters, got"):
        CharLM(BigramLM(5), TOKENIZER).generate("a", allowed=["a"])  # type: ignore[call-overload]  # the point


def test_a_text_has_the_allowed_characters_alone_also_where_few_are_likely() -> None:
    lm = CharLM(BigramLM(5), TOKENIZER)
    for options in ({}, {"top_k": 1}, {"temperature": 0.0}):
        text = lm.generate("ab", 200, allowed="cd", banned="d", seed=1, **options)
        assert text == "ab" + "c" * 200
    assert (
        "".join(lm.stream("ab", 50, banned="abc", seed=1)) == lm.generate("ab", 50, banned="abc", seed=1)[2:]
    )
