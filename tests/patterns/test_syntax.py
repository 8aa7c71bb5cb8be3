"""Places of a regular expression."""

from __future__ import annotations

import re
import string

import pytest

from charlm.patterns.syntax import places_of


@pytest.mark.parametrize(
    "one",
    [".", r"\d", r"\W", "[^a-f]", "[a-fX]", r"[^\s\d]", "(?i:k)", "(?s:.)", r"(?a:\w)", "é", "(?i:[a-c])"],
)
def test_a_class_has_the_characters_that_python_matches(one: str) -> None:
    characters = string.printable + "éÉßſKk²٣"
    places = places_of(one, characters)
    assert [c for c, has in zip(characters, places.sets[0], strict=True) if has] == [
        c for c in characters if re.fullmatch(one, c)
    ]


def test_what_is_repeated_has_a_place_each_time() -> None:
    assert len(places_of("a{2,5}", "a").kinds) == 5
    assert len(places_of("(ab)*c+", "abc").kinds) == 3
    assert len(places_of("", "abc").kinds) == 0


def test_what_follows_is_as_it_is_written() -> None:
    places = places_of("ab*c|d", "abcd")
    assert places.follow == [0b0110, 0b0110, 0, 0]
    assert (places.whole.first, places.whole.last, places.whole.nullable) == (0b1001, 0b1100, False)


def test_an_empty_character_stands_nowhere() -> None:
    (has,) = places_of("[^a]", ["a", "", "b"]).sets
    assert has.tolist() == [False, False, True]
