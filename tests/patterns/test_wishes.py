"""Patterns and choices in the ids of a tokenizer."""

from __future__ import annotations

import pytest

from charlm.errors import InputError, UnknownCharacterError
from charlm.patterns.automaton import Automaton
from charlm.patterns.wishes import automaton_of
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer

LETTERS = CharTokenizer("abcd")


def beginnings(automaton: Automaton) -> list[int]:
    return automaton.allowed(None, 100)[0].nonzero()[0].tolist()


def test_banned_ids_are_part_of_no_match() -> None:
    assert beginnings(automaton_of(LETTERS, "[abc]d?", None, banned=[1])) == [0, 2]
    assert beginnings(automaton_of(LETTERS, None, ["ad", "cb", "b"], banned=[3])) == [1, 2]
    with pytest.raises(InputError, match="needs 'b'"):
        automaton_of(LETTERS, "b", None, banned=[1])
    with pytest.raises(InputError, match="not banned"):
        automaton_of(LETTERS, None, ["ab", "b"], banned=[1])


def test_of_bytes_a_pattern_has_ascii_and_a_choice_has_all_characters() -> None:
    assert beginnings(automaton_of(ByteTokenizer(), ".", None)) == [i for i in range(128) if i != 10]
    assert beginnings(automaton_of(ByteTokenizer(), None, ["é", "a"])) == [97, 0xC3]
    with pytest.raises(InputError, match="'é'"):
        automaton_of(ByteTokenizer(), "é", None)


@pytest.mark.parametrize("choices", [[], "ab", [7], 7])
def test_choices_are_strings(choices: list[str]) -> None:
    with pytest.raises(InputError, match="one or more strings"):
        automaton_of(LETTERS, None, choices)


def test_a_choice_with_an_unknown_character_is_refused() -> None:
    with pytest.raises(UnknownCharacterError, match="'é'"):
        automaton_of(LETTERS, None, ["a", "é"])


def test_one_of_both_is_given() -> None:
    with pytest.raises(InputError, match="exactly one"):
        automaton_of(LETTERS, "a", ["a"])
