"""A regular expression as the places of its characters, and which place may follow which.

Python's own parser says what a pattern means, and Python's own matching which characters stand at a place,
so both are as `re.fullmatch` has them. Each character or class that is written counts as one place; one that
is repeated from 2 to 5 times as five (Glushkov, "The abstract theory of automata", 1961). What looks back or
ahead of the place where it stands is no matter of places, and is refused by name.
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
_MOST_WORK = 1_000_000  # pairs of places, or of a class and a character, looked at one by one

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
_OF_CHARACTERS = re.IGNORECASE | re.DOTALL | re.ASCII  # flags that decide which characters a class has


class Part(NamedTuple):
    """A part of a pattern. Sets of places are the bits of an int."""

    first: int
    """Where a match of it may begin."""
    last: int
    """Where one may end."""
    nullable: bool
    """Whether nothing matches it, too."""


_NOTHING = Part(0, 0, nullable=True)


class Places(NamedTuple):
    """A pattern of N places over V characters."""

    whole: Part
    """All of it."""
    follow: list[int]
    """(N,) which places may come after each, as bits."""
    kinds: list[int]
    """(N,) which of `sets` stands at each place."""
    sets: list[Bools]
    """(V,) each: which characters one of them has."""
    names: list[str]
    """How each of them is written."""


def places_of(pattern: str, characters: Sequence[str]) -> Places:
    """Read a regular expression.

    Args:
        pattern: as for `re.fullmatch`; flags are written in it, `(?i)...`.
        characters: (V,) those that there are; "" stands at no place.

    Raises:
        InputError: it is no regular expression, or too large; or has what only a search could obey, which is
            named.

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
        raise InputError("regex must not have so many groups in one another") from None
    return Places(
        whole, reader.follow, reader.kinds, reader.sets, [_name(source) for source, _ in reader.known]
    )


class _Reader:
    """Numbers the places of a pattern while it reads it."""

    def __init__(self, characters: Sequence[str]) -> None:
        self._characters = characters
        self.known: dict[tuple[str, int], int] = {}
        self._work = 0
        self.follow: list[int] = []
        self.kinds: list[int] = []
        self.sets: list[Bools] = []

    def row(self, items: Iterable[Any], flags: int, *, begins: bool = False, ends: bool = False) -> Part:
        """Read parts that come one after another, at the beginning or the end of the pattern or within it."""
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
        if code in {_codes.MAX_REPEAT, _codes.MIN_REPEAT}:  # what matches in full is the same for both
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
            for _ in range(most - least):  # x(x(x)?)?: each place has but the next one after it
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
        kind = self.known.get((source, flags))
        if kind is None:
            matches = re.compile(source, flags).fullmatch
            kind = self.known[source, flags] = len(self.sets)
            self.sets.append(np.array([matches(c) is not None for c in self._characters], dtype=np.bool_))
            self._count(len(self._characters) // 2)
        place = len(self.follow)
        if place == _MOST_PLACES:
            raise InputError(
                f"regex must have at most {_MOST_PLACES:,} characters and classes, counted as often as they "
                "are repeated"
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
    """Return a character or class as it is written, with numbers for its characters."""
    if code is _codes.LITERAL:
        return _number(value)
    if code is _codes.NOT_LITERAL:
        return f"[^{_number(value)}]"
    if code is _codes.ANY:
        return "."
    if code is not _codes.IN:
        raise InputError(f"regex must do without {str(code).lower()}")
    inside = ""
    for kind, what in value:
        if kind is _codes.NEGATE:
            inside += "^"
        elif kind is _codes.LITERAL:
            inside += _number(what)
        elif kind is _codes.RANGE:
            inside += f"{_number(what[0])}-{_number(what[1])}"
        else:
            inside += _CATEGORIES[what]
    return f"[{inside}]"


def _number(code_point: int) -> str:
    return f"\\U{code_point:08x}"


def _name(source: str) -> str:
    """Return what `_source` made as one would write it."""
    return re.sub(r"\\U([0-9a-f]{8})", lambda number: chr(int(number[1], 16)), source)
