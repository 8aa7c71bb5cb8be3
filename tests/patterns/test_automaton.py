"""Automata from patterns and choices, beside Python's own matching."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import tracemalloc

import numpy as np
import pytest
from harness.patterns import CHARACTERS, drawn_pattern

from charlm.errors import InputError
from charlm.patterns.automaton import Automaton

TEXTS = ["".join(text) for n in range(5) for text in itertools.product(CHARACTERS, repeat=n)]
PATTERNS = int(os.environ.get("CHARLM_PATTERNS", "150"))  # the campaign is the same test with more of them


def matches(automaton: Automaton, text: str, characters: str = CHARACTERS) -> bool:
    state: int | None = None
    for c in text:
        state = automaton.after(state, characters.index(c))
        if state < 0:
            return False
    return automaton.allowed(state, 0)[1]


def test_it_matches_what_python_matches_in_full_and_knows_the_shortest() -> None:
    chance = random.Random(0)
    impossible = 0
    for _ in range(PATTERNS):
        pattern = drawn_pattern(4, chance)
        wanted = [text for text in TEXTS if re.fullmatch(pattern, text)]
        try:
            automaton = Automaton.from_regex(pattern, CHARACTERS)
        except InputError:
            impossible += 1
            assert not wanted, pattern
            continue
        assert [text for text in TEXTS if matches(automaton, text)] == wanted, pattern
        if wanted:
            assert automaton.distance[0] == min(map(len, wanted)), pattern
    assert impossible < PATTERNS / 4


def test_an_id_is_allowed_where_a_match_fits_into_what_is_left() -> None:
    automaton = Automaton.from_regex("a(b|cc)?c*", "abc")
    allowed, may_end = automaton.allowed(None, 1)
    assert allowed.tolist() == [True, False, False]
    assert not may_end
    state = automaton.after(None, 0)
    assert automaton.allowed(state, 0)[0].tolist() == [False, False, False]
    assert automaton.allowed(state, 1)[0].tolist() == [False, True, True]
    assert automaton.allowed(state, 1)[1]
    only_two = Automaton.from_regex("a|bca", "abc")
    assert only_two.allowed(None, 2)[0].tolist() == [True, False, False]
    assert only_two.allowed(None, 3)[0].tolist() == [True, True, False]


def test_choices_are_a_tree_of_their_ids() -> None:
    automaton = Automaton.from_choices([[0, 1], [0, 2, 2], [0]], vocab_size=5)
    texts = [list(t) for n in range(5) for t in itertools.product(range(5), repeat=n)]
    found = []
    for text in texts:
        state: int | None = None
        for i in text:
            state = None if state == -1 else automaton.after(state, i)
            if state == -1:
                break
        else:
            found += [text] if automaton.allowed(state, 0)[1] else []
    assert found == [[0], [0, 1], [0, 2, 2]]
    assert automaton.distance.tolist() == [1, 0, 0, 1, 0]


def test_a_vocabulary_of_thousands_has_small_tables() -> None:
    characters = [chr(0x4E00 + i) for i in range(4_000)]
    automaton = Automaton.from_regex("[一-丏]{1,999}。?|一", [*characters[:-1], "。"])
    assert automaton.column.shape == (4_000,)
    assert automaton.next.shape[1] <= 4


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"a(?=b)", "look-around"),
        (r"a(?<!b)", "look-around"),
        (r"(a)\1", "back references"),
        (r"(a)?(?(1)b|c)", "conditions"),
        (r"\bab", r"\\b"),
        (r"a^b", r"\^"),
        (r"a++", "possessive"),
        (r"(?>a)", "atomic"),
        (r"(a|", "regular expression"),
        (r"a{99999999999999999999}", "regular expression"),
        (r"a{99999}", "at most"),
        (r"é", "'é'"),
        (r"a(é|[à-ü]b)", r"'é' or '\[à-ü\]'"),
        (7, "must be a string"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(pattern: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Automaton.from_regex(pattern, "abc")


@pytest.mark.parametrize("pattern", ["^ab$", r"\Aab\Z", "(^ab$)", "^a(b$)", "(^ab|^ab$)"])
def test_the_ends_of_the_pattern_may_be_written(pattern: str) -> None:
    automaton = Automaton.from_regex(pattern, "ab")
    assert [t for t in ("", "a", "ab", "abb") if matches(automaton, t, "ab")] == ["ab"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [
        "(a|b)*a(a|b){20}",
        "((a{1,90}){1,90})*",
        "(a?){500}a{500}",
        "(a|b|c){4000}x{5000}",
        "(" * 2_000 + "a" + ")" * 2_000,
    ],
)
def test_what_explodes_is_refused_while_it_is_small(pattern: str) -> None:
    """64 MB. How long it takes is a figure of `benchmarks.constrained`."""
    tracemalloc.start()
    with contextlib.suppress(InputError):  # or it is small after all
        Automaton.from_regex(pattern, "abcxy1")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 * 2**20


def test_no_state_leads_where_no_match_is() -> None:
    automaton = Automaton.from_regex("a(bé|c)", "abc")
    assert automaton.after(automaton.after(None, 0), 1) == -1
    reached = automaton.next[automaton.next >= 0]
    assert np.all(automaton.distance[reached] >= 0)
