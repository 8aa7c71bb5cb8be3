"""`Automaton`: for each state of a text, which character leads to which state, and how far the end is.

A deterministic automaton over the characters of a vocabulary, with the places of a pattern as its states'
sets (the subset construction). Characters between which the pattern makes no difference share a column, so
the tables stay small for a vocabulary of thousands. What would not fit is refused while it is still small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from charlm.errors import InputError, shown
from charlm.patterns.syntax import Places, places_of

__all__ = ["Automaton"]

_MOST_STATES = 20_000
_MOST_ENTRIES = 4_000_000  # of the table, 4 bytes each
_MOST_WORK = 2_000_000  # of looking at places, in units of about half a microsecond


class Automaton:
    r"""What may come next in a text that has to match: a `charlm.generation.Constraint`.

    Attributes:
        column: (V,) int32, in which column of `next` each id stands.
        next: (S, K) int32, the state after an id; -1: no match begins so. State 0 is the beginning.
        distance: (S,) int32, how many ids are missing at least; 0: the text matches as it is. That of the
            beginning is the length of the shortest match.

    Args:
        column: as above.
        next_states: as `next`, in which states may lead nowhere.
        accepting: (S,) bool.

    Raises:
        InputError: a column or state is out of range, or there are other than S states.

    Example:
        >>> dates = Automaton.from_regex(r"\d\d?/\d\d", "0123456789/")
        >>> state = dates.after(dates.after(None, 9), 10)  # 9/
        >>> dates.distance[0], dates.distance[state]
        (np.int32(4), np.int32(2))
    """

    def __init__(
        self, column: NDArray[np.int32], next_states: NDArray[np.int32], accepting: NDArray[np.bool_]
    ) -> None:
        S, K = next_states.shape
        if accepting.shape != (S,) or not (np.all(column >= 0) and np.all(column < K)):
            raise InputError(
                f"column must be from 0 to {K - 1} and accepting of shape ({S},), as next is ({S}, {K})"
            )
        if not (np.all(next_states >= -1) and np.all(next_states < S)):
            raise InputError(f"next_states must be from -1 to {S - 1}")
        self.distance: NDArray[np.int32] = _distances(next_states, accepting)
        leads_on = np.append(self.distance >= 0, [False])  # -1 stands for the last
        self.column: NDArray[np.int32] = np.array(column, dtype=np.int32)
        self.next: NDArray[np.int32] = np.where(leads_on[next_states], next_states, -1).astype(
            np.int32, copy=False
        )
        for table in (self.column, self.next, self.distance):  # which compiled code reads
            table.flags.writeable = False

    @classmethod
    def from_regex(cls, pattern: str, characters: Sequence[str]) -> Automaton:
        """Return that of the texts that a regular expression matches in full.

        Args:
            pattern: as Python's `re` has it, without what looks back or ahead.
            characters: (V,) those of the ids; "" is never part of a match.

        Raises:
            InputError: it is none, has what cannot be obeyed, is too large, or matches no text of these
                characters.
        """
        places = places_of(pattern, characters)
        column, members = _columns(places, len(characters))
        automaton = cls(column, *_states(places, members))
        if automaton.distance[0] < 0:
            lacking = [
                shown(name) for name, has in zip(places.names, places.sets, strict=True) if not has.any()
            ]
            raise InputError(
                f"regex must match a text of characters that may be written, got {shown(pattern)}, which "
                f"needs {' or '.join(lacking[:5])}"
            )
        return automaton

    @classmethod
    def from_choices(cls, choices: Sequence[Sequence[int]], vocab_size: int) -> Automaton:
        """Return that of some texts.

        Args:
            choices: their ids, each below V; one text or more.
            vocab_size: V.

        Raises:
            InputError: they are too long together.
        """
        used = sorted({i for one in choices for i in one})
        K = len(used) + 1
        column = np.full(vocab_size, K - 1, dtype=np.int32)  # the last column: of no choice
        column[used] = np.arange(K - 1, dtype=np.int32)
        states: list[dict[int, int]] = [{}]
        ends: list[int] = []
        for one in choices:
            state = 0
            for k in column[[*one]].tolist():
                state = states[state].setdefault(k, len(states))
                if state == len(states):
                    states.append({})
            ends.append(state)
            if len(states) * K > _MOST_ENTRIES:
                raise InputError("choices must have fewer characters together")
        table = np.full((len(states), K), -1, dtype=np.int32)
        for state, known in enumerate(states):
            table[state, list(known)] = list(known.values())
        accepting = np.zeros(len(states), dtype=np.bool_)
        accepting[ends] = True
        return cls(column, table, accepting)

    def allowed(self, state: int | None, left: int) -> tuple[NDArray[np.bool_], bool]:
        """See `charlm.generation.Constraint`."""
        to = self.next[state or 0, self.column]  # (V,)
        return (to >= 0) & (self.distance[to] < left), bool(self.distance[state or 0] == 0)

    def after(self, state: int | None, token: int) -> int:
        """See `charlm.generation.Constraint`; -1: no match begins so."""
        return int(self.next[state or 0, self.column[token]])


def _columns(places: Places, V: int) -> tuple[NDArray[np.int32], list[list[int]]]:
    """Return the column of each character (V,), and which columns each set has."""
    column = np.zeros(V, dtype=np.int64)
    for members in places.sets:  # characters stay together that no set tells apart
        _, column = np.unique(2 * column + members, return_inverse=True)
    return column.astype(np.int32), [np.unique(column[members]).tolist() for members in places.sets]


def _states(places: Places, members: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return the states' table (S, K) and which of them accept, (S,)."""
    K = 1 + max((k for columns in members for k in columns), default=0)
    N = len(places.kinds)
    at = [0] * K  # the places of each column, as bits
    for kind, here in enumerate(_places_of_kinds(places)):
        for k in members[kind]:
            at[k] |= here
    columns: dict[int, list[int]] = {}  # those that all places share
    for k, here in enumerate(at):
        columns.setdefault(here, []).append(k)
    follow = np.stack([_as_bytes(after, N) for after in places.follow]) if N else np.zeros((0, 0), np.uint8)
    begin = places.whole.first, places.whole.nullable
    numbers = {begin: 0}
    found = [begin]  # which places may come next, and whether the text may end
    rows: list[NDArray[np.int32]] = []
    known: dict[int, int] = {}  # places just passed: the state after them
    work = 0
    for following, _ in found:  # grows
        row = np.full(K, -1, dtype=np.int32)
        for here, those in columns.items():
            passed = following & here
            work += 1 + N // 64
            if not passed:
                continue
            state = known.get(passed)
            if state is None:
                which = np.flatnonzero(np.unpackbits(_as_bytes(passed, N), bitorder="little"))
                after = int.from_bytes(np.bitwise_or.reduce(follow[which], axis=0).tobytes(), "little")
                work += len(which) * (1 + N // 256) + 10
                key = after, bool(passed & places.whole.last)
                state = known[passed] = numbers.setdefault(key, len(found))
                if state == len(found):
                    found.append(key)
            row[those] = state
        rows.append(row)
        if work > _MOST_WORK or len(found) > _MOST_STATES or len(found) * K > _MOST_ENTRIES:
            raise InputError(
                "regex must be simpler: to know what may come next, too many combinations of its parts would "
                "have to be told apart"
            )
    return np.stack(rows), np.array([ends for _, ends in found], dtype=np.bool_)


def _places_of_kinds(places: Places) -> list[int]:
    """Return where each set stands, as bits."""
    here = [0] * len(places.sets)
    for place, kind in enumerate(places.kinds):
        here[kind] |= 1 << place
    return here


def _as_bytes(places: int, N: int) -> NDArray[np.uint8]:
    """Return a set of N places as bytes, the lowest first."""
    return np.frombuffer(places.to_bytes(N // 8 + 1, "little"), dtype=np.uint8)


def _distances(next_states: NDArray[np.int32], accepting: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return how many characters each state is from an accepting one, (S,); -1: none can be reached."""
    S = len(next_states)
    source, column = np.nonzero(next_states >= 0)
    to = next_states[source, column]
    source = source[np.argsort(to, kind="stable")]  # sorted by where they lead
    begins = np.searchsorted(np.sort(to), np.arange(S + 1)).tolist()
    distance = np.where(accepting, 0, -1).astype(np.int32)
    frontier, steps = np.flatnonzero(accepting), 0
    while len(frontier):
        steps += 1
        before = np.unique(np.concatenate([source[begins[s] : begins[s + 1]] for s in frontier]))
        frontier = before[distance[before] < 0]
        distance[frontier] = steps
    return distance
