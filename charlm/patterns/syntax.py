"""A regular expression as places: one for each character or class, and the places that may follow each.

Python's own parser reads the pattern, and Python's own matching decides which characters fit a place, so
both agree with `re.fullmatch`. Each character or class of the pattern is one place; one that is repeated
from 2 to 5 times is five places (Glushkov, "The abstract theory of automata", 1961). Parts that look back or
ahead cannot be expressed by places, and are refused by name.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from charlm.errors import InputError, shown

__all__ = ["Places", "places_of"]

Bools = NDArray[np.bool_]

_MOST_PLACES = 8_192
_MOST_WORK = 1_000_000  # steps, one for a pair of places or of a class and a character

_parser: Any = importlib.import_module("re._parser")  # what `re.compile` uses; typeshed has no name for it
_codes: Any = importlib.import_module("re._constants")

_REFUSED = {
    _codes.ASSERT: "look-around, (?=...) or (?<=...)",
    _codes.ASSERT_NOT: "look-around, (?!...) or (?<!...)",
    _codes.GROUPREF: "back references, \\1 or (?P=name)",
    _codes.GROUPREF_EXISTS: "conditions on a group, (?(1)...)",
    _codes.POSSESSIVE_REPEAT: "possessive repetition, *+, ++, ?+ or {m,n}+",
    _codes.ATOMIC_GROUP: "atomic groups, (?>...)",
    _codes.AT: "\\b, \\B, and ^ or $ but at the beginning and end of the pattern",
}
_CATEGORIES = {
    _codes.CATEGORY_DIGIT: r"\d",
    _codes.CATEGORY_NOT_DIGIT: r"\D",
    _codes.CATEGORY_SPACE: r"\s",
    _codes.CATEGORY_NOT_SPACE: r"\S",
    _codes.CATEGORY_WORD: r"\w",
    _codes.CATEGORY_NOT_WORD: r"\W",
}
_BEGIN = {_codes.AT_BEGINNING, _codes.AT_BEGINNING_STRING}
_END = {_codes.AT_END, _codes.AT_END_STRING}
_OF_CHARACTERS = re.IGNORECASE | re.DOTALL | re.ASCII  # flags that change the characters of a class


class Part(NamedTuple):
    """A part of a pattern. Sets of places are the bits of an int."""

    first: int
    """Places where a match of it may begin."""
    last: int
    """Places where a match of it may end."""
    nullable: bool
    """Whether the empty text matches it."""


_NOTHING = Part(0, 0, nullable=True)


class Places(NamedTuple):
    """A pattern of N places over V characters."""

    whole: Part
    """The whole pattern."""
    follow: list[int]
    """(N,) the places that may come after each, as bits."""
    kinds: list[int]
    """(N,) the number of each place's set."""
    sets: list[Bools]
    """Sets of characters, (V,) each."""
    names: list[str]
    """The notation of each set."""


def places_of(pattern: str, characters: Sequence[str]) -> Places:
    """Return the places of a regular expression.

    Args:
        pattern: as for `re.fullmatch`; flags are part of it, `(?i)...`.
        characters: (V,) the alphabet; "" fits no place.

    Raises:
        InputError: the pattern is no regular expression, is too large, or has a part that is not supported;
            the message names it.

    Example:
        >>> places = places_of("a[bc]*", "abcd")
        >>> len(places.kinds), [places.sets[kind].tolist() for kind in places.kinds][1]
        (2, [False, True, True, False])
    """
    if not isinstance(pattern, str):
        raise InputError(f"regex must be a string, got {shown(pattern)}")
    try:
        tree = _parser.parse(pattern)
        reader = _Reader(characters)
        whole = reader.row(tree, tree.state.flags, begins=True, ends=True)
    except (re.error, OverflowError) as error:
        raise InputError(
            f"regex must be a regular expression of Python's, got {shown(pattern)}: {error}"
        ) from None
    except RecursionError:
        raise InputError("regex must have fewer nested groups") from None
    return Places(
        whole, reader.follow, reader.kinds, reader.sets, [_name(source) for source, _ in reader.numbers]
    )


class _Reader:
    """Reads the parts of a pattern, and numbers its places."""

    def __init__(self, characters: Sequence[str]) -> None:
        self._characters = characters
        self.numbers: dict[tuple[str, int], int] = {}  # of the sets, by source and flags
        self._work = 0
        self.follow: list[int] = []
        self.kinds: list[int] = []
        self.sets: list[Bools] = []

    def row(self, items: Iterable[Any], flags: int, *, begins: bool = False, ends: bool = False) -> Part:
        """Read a sequence of parts; `begins` and `ends`: it is at the beginning or the end of the pattern."""
        listed = list(items)
        if begins:
            while listed and listed[0][0] is _codes.AT and listed[0][1] in _BEGIN:
                del listed[0]
        if ends:
            while listed and listed[-1][0] is _codes.AT and listed[-1][1] in _END:
                del listed[-1]
        whole = _NOTHING
        for i, (code, value) in enumerate(listed):
            at_end = ends and i == len(listed) - 1
            whole = self._then(whole, self._one(code, value, flags, begins=begins and i == 0, ends=at_end))
        return whole

    def _one(self, code: Any, value: Any, flags: int, *, begins: bool, ends: bool) -> Part:
        if code in _REFUSED:
            raise InputError(f"regex must do without {_REFUSED[code]}: it is matched character by character")
        if code is _codes.SUBPATTERN:
            _, added, removed, items = value
            return self.row(items, (flags | added) & ~removed, begins=begins, ends=ends)
        if code is _codes.BRANCH:
            parts = [self.row(items, flags, begins=begins, ends=ends) for items in value[1]]
            first = last = 0
            for part in parts:
                first, last = first | part.first, last | part.last
            return Part(first, last, any(part.nullable for part in parts))
        if code in {_codes.MAX_REPEAT, _codes.MIN_REPEAT}:  # both have the same full matches
            least, most, items = value
            return self._repeated(items, flags, least, None if most is _codes.MAXREPEAT else most)
        return self._place(_source(code, value), flags & _OF_CHARACTERS)

    def _repeated(self, items: Any, flags: int, least: int, most: int | None) -> Part:
        whole = _NOTHING
        if most is None:
            whole = self.row(items, flags)
            self._link(whole.last, whole.first)
            if least == 0:
                return whole._replace(nullable=True)
            least -= 1
        else:
            for _ in range(most - least):  # x(x(x)?)?: only the next place follows each
                whole = self._then(self.row(items, flags), whole)._replace(nullable=True)
        for _ in range(least):
            whole = self._then(self.row(items, flags), whole)
        return whole

    def _then(self, one: Part, other: Part) -> Part:
        self._link(one.last, other.first)
        return Part(
            one.first | (other.first if one.nullable else 0),
            other.last | (one.last if other.nullable else 0),
            one.nullable and other.nullable,
        )

    def _link(self, before: int, after: int) -> None:
        if after:
            for place in _bits(before):
                self.follow[place] |= after
                self._count(1)

    def _place(self, source: str, flags: int) -> Part:
        """Add a place for one character of a set."""
        kind = self.numbers.get((source, flags))
        if kind is None:
            matches = re.compile(source, flags).fullmatch
            kind = self.numbers[source, flags] = len(self.sets)
            self.sets.append(np.array([matches(c) is not None for c in self._characters], dtype=np.bool_))
            self._count(len(self._characters) // 2)
        place = len(self.follow)
        if place == _MOST_PLACES:
            raise InputError(
                f"regex must have at most {_MOST_PLACES:,} characters and classes, repetitions included"
            )
        self.follow.append(0)
        self.kinds.append(kind)
        return Part(1 << place, 1 << place, nullable=False)

    def _count(self, work: int) -> None:
        self._work += work
        if self._work > _MOST_WORK:
            raise InputError(
                "regex must be simpler: too many different characters, or too many that may follow others"
            )


def _bits(places: int) -> Iterator[int]:
    """Yield the numbers of the bits that are set, from the lowest."""
    while places:
        low = places & -places
        yield low.bit_length() - 1
        places ^= low


def _source(code: Any, value: Any) -> str:
    """Return a character or class in the syntax of `re`, with its characters as code points."""
    if code is _codes.LITERAL:
        return _number(value)
    if code is _codes.NOT_LITERAL:
        return f"[^{_number(value)}]"
    if code is _codes.ANY:
        return "."
    if code is not _codes.IN:
        raise InputError(f"regex must do without {str(code).lower()}")
    inside = ""
    for kind, part in value:
        if kind is _codes.NEGATE:
            inside += "^"
        elif kind is _codes.LITERAL:
            inside += _number(part)
        elif kind is _codes.RANGE:
            inside += f"{_number(part[0])}-{_number(part[1])}"
        else:
            inside += _CATEGORIES[part]
    return f"[{inside}]"


def _number(code_point: int) -> str:
    return f"\\U{code_point:08x}"


def _name(source: str) -> str:
    """Return the result of `_source` with the characters themselves."""
    return re.sub(r"\\U([0-9a-f]{8})", lambda number: chr(int(number[1], 16)), source)
