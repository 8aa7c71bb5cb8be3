"""`Automaton`: the transitions of a pattern, and the distance of each state to the end of a match.

The automaton is deterministic, over the characters of a vocabulary. Its states are sets of places of the
pattern (the subset construction). Characters that the pattern does not distinguish share a column, so the
tables stay small for a vocabulary of thousands. A pattern whose tables would be too large is refused before
they are.
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
_MOST_WORK = 2_000_000  # steps of about half a microsecond


class Automaton:
    r"""A `charlm.generation.Constraint` for texts that match a pattern.

    Attributes:
        column: (V,) int32, the column of `next` for each id.
        next: (S, K) int32, the state after an id, or -1 if no match begins so. State 0 is the beginning.
        distance: (S,) int32, the least number of ids to a match; 0: the text matches as it is. That of
            state 0 is the length of the shortest match.

    Args:
        column: as above.
        next_states: as `next`, but states may lead to no match.
        accepting: (S,) bool, whether the text up to this state matches.

    Raises:
        InputError: a column or state is out of range, or `accepting` has another length.

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
        for table in (self.column, self.next, self.distance):  # compiled code reads them
            table.flags.writeable = False

    @classmethod
    def from_regex(cls, pattern: str, characters: Sequence[str]) -> Automaton:
        """Return the automaton of the texts that match a regular expression in full.

        Args:
            pattern: in the syntax of Python's `re`, without look-around and back references.
            characters: (V,) the character of each id; "" is never part of a match.

        Raises:
            InputError: the pattern is no regular expression, has a part that is not supported, is too large,
                or matches no text of these characters.
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
        """Return the automaton of some texts.

        Args:
            choices: the ids of one text or more, each below V.
            vocab_size: V.

        Raises:
            InputError: the texts are too long together.
        """
        used = sorted({i for one in choices for i in one})
        K = len(used) + 1
        column = np.full(vocab_size, K - 1, dtype=np.int32)  # the last column: ids of no choice
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
        for state, nexts in enumerate(states):
            table[state, list(nexts)] = list(nexts.values())
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
    """Return the column of each character (V,), and the columns of each set."""
    column = np.zeros(V, dtype=np.int64)
    for members in places.sets:  # characters that no set distinguishes stay together
        _, column = np.unique(2 * column + members, return_inverse=True)
    return column.astype(np.int32), [np.unique(column[members]).tolist() for members in places.sets]


def _states(places: Places, members: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return the table of transitions (S, K), and whether each state accepts (S,)."""
    K = 1 + max((k for columns in members for k in columns), default=0)
    N = len(places.kinds)
    at = [0] * K  # the places of each column, as bits
    for kind, here in enumerate(_places_of_kinds(places)):
        for k in members[kind]:
            at[k] |= here
    columns: dict[int, list[int]] = {}  # with the same places
    for k, here in enumerate(at):
        columns.setdefault(here, []).append(k)
    follow = np.stack([_as_bytes(after, N) for after in places.follow]) if N else np.zeros((0, 0), np.uint8)
    begin = places.whole.first, places.whole.nullable
    numbers = {begin: 0}
    states = [begin]  # the places that may come next, and whether the text may end
    rows: list[NDArray[np.int32]] = []
    state_after: dict[int, int] = {}  # by the places just passed
    work = 0
    for following, _ in states:  # grows
        row = np.full(K, -1, dtype=np.int32)
        for here, ks in columns.items():
            passed = following & here
            work += 1 + N // 64
            if not passed:
                continue
            state = state_after.get(passed)
            if state is None:
                which = np.flatnonzero(np.unpackbits(_as_bytes(passed, N), bitorder="little"))
                after = int.from_bytes(np.bitwise_or.reduce(follow[which], axis=0).tobytes(), "little")
                work += len(which) * (1 + N // 256) + 10
                key = after, bool(passed & places.whole.last)
                state = state_after[passed] = numbers.setdefault(key, len(states))
                if state == len(states):
                    states.append(key)
            row[ks] = state
        rows.append(row)
        if work > _MOST_WORK or len(states) > _MOST_STATES or len(states) * K > _MOST_ENTRIES:
            raise InputError("regex must be simpler: its automaton would have too many states")
    return np.stack(rows), np.array([ends for _, ends in states], dtype=np.bool_)


def _places_of_kinds(places: Places) -> list[int]:
    """Return the places of each set, as bits."""
    here = [0] * len(places.sets)
    for place, kind in enumerate(places.kinds):
        here[kind] |= 1 << place
    return here


def _as_bytes(places: int, N: int) -> NDArray[np.uint8]:
    """Return a set of N places as bytes, the lowest first."""
    return np.frombuffer(places.to_bytes(N // 8 + 1, "little"), dtype=np.uint8)


def _distances(next_states: NDArray[np.int32], accepting: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return the distance of each state from an accepting one, (S,); -1: none can be reached."""
    S = len(next_states)
    source, column = np.nonzero(next_states >= 0)
    to = next_states[source, column]
    source = source[np.argsort(to, kind="stable")]  # sorted by the state that follows
    begins = np.searchsorted(np.sort(to), np.arange(S + 1)).tolist()
    distance = np.where(accepting, 0, -1).astype(np.int32)
    frontier, steps = np.flatnonzero(accepting), 0
    while len(frontier):
        steps += 1
        before = np.unique(np.concatenate([source[begins[s] : begins[s + 1]] for s in frontier]))
        frontier = before[distance[before] < 0]
        distance[frontier] = steps
    return distance
