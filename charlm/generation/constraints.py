"""Constraints on generated texts: the ids that may follow, and the end of a text.

A `Constraint` tells which ids may follow a text so far. `Walk` follows some texts through a constraint, for
the loop of `decode.py`: it masks logits and tells which texts have ended. If a text may end, the next id is
drawn from all ids, and an id that may not follow ends the text. So the model decides how likely an end is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from charlm.errors import InputError, shown
from charlm.patterns.automaton import Automaton

__all__ = ["Constraint", "Walk"]


@runtime_checkable
class Constraint(Protocol):
    """A rule for texts, which is asked id by id. Regular expressions implement it; any object may.

    The constraint chooses the type of its states; None is the state of the empty text. A state is used
    several times and for several texts in turn, so it must not change.

    Example:
        >>> class EvenZeros:  # any text in which id 0 occurs an even number of times
        ...     def allowed(self, state, left):
        ...         odd = bool(state)
        ...         last = np.array([odd, not odd, not odd])  # of three ids, where no other may follow
        ...         return (last if left == 1 else np.full(3, left > 0)), not odd
        ...
        ...     def after(self, state, token):
        ...         return bool(state) != (token == 0)
        >>> from charlm import BigramLM
        >>> ids = BigramLM(3).generate(torch.tensor([[1]]), 9, seed=1, constraint=EvenZeros())
        >>> int((ids == 0).sum()) % 2
        0
    """

    def allowed(self, state: Any, left: int) -> tuple[NDArray[np.bool_], bool]:
        """Return which ids may follow, (V,) bool, and whether the text may end here.

        Args:
            state: the state of the text.
            left: the most ids that may still follow. An id may follow only if a matching text fits into this;
                so none may with 0. At least one must follow unless the text may end.
        """

    def after(self, state: Any, token: int) -> Any:
        """Return the state after one more id.

        Args:
            state: the state of the text.
            token: an allowed id.
        """


class Walk:
    """The states of some texts in a constraint.

    Args:
        constraint: the constraint.
        rows: B, the number of texts.
        left: the most ids of each text.
        vocab_size: V.

    Attributes:
        constraint: as given.
        left: the most ids that may still follow.
        states: (B,) the states; those of ended texts have no meaning.
        none_ends: whether all texts are known to continue.

    Raises:
        InputError: no text matches, or the constraint returns a wrong type or shape.
    """

    def __init__(self, constraint: Constraint, rows: int, left: int, vocab_size: int) -> None:
        self.constraint: Constraint = constraint
        self.left: int = left
        self.states: list[Any] = [None] * rows
        self._ended = [False] * rows
        self._vocab_size = vocab_size
        self.none_ends: bool = False
        self._answers: list[tuple[NDArray[np.bool_], bool] | None] = [None] * rows
        if isinstance(constraint, Automaton) and constraint.distance[0] > left:
            raise InputError(
                f"max_new_tokens must be at least {constraint.distance[0]}, the length of the shortest text "
                f"that matches, got {left}"
            )
        self._ask(0)

    def fork(self, rows: Sequence[int]) -> Self:
        """Return a copy for some rows."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        twin.states = [self.states[row] for row in rows]
        twin._ended = [self._ended[row] for row in rows]
        twin._answers = [self._answers[row] for row in rows]
        return twin

    def ended(self, row: int) -> bool:
        """Return whether a text has ended; it also has if no id may follow."""
        return self._ended[row] or not self._ask(row)[0].any()

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits (B, V) with -inf for ids that may not follow; texts that may end are not masked."""
        free = np.ones(self._vocab_size, dtype=np.bool_)
        asked = [self._ask(row) for row in range(len(self.states))]
        rows = np.stack([free if may_end else allowed for allowed, may_end in asked])
        return logits.masked_fill(torch.from_numpy(~rows).to(logits.device), -torch.inf)

    def move(self, ids: Tensor) -> Tensor:
        """Append the next id of each text, (B,); return the ids with -1 in place of those that end a text."""
        moved = ids.tolist()
        for row, i in enumerate(moved):
            if self._ask(row)[0][i]:
                self.states[row] = self.constraint.after(self.states[row], i)
            else:
                self._ended[row], moved[row] = True, -1
        self.left -= 1
        self._answers, self.none_ends = [None] * len(moved), False
        return ids.new_tensor(moved)

    def moved(self, turns: int, states: Sequence[int], *, none_ends: bool) -> None:
        """Record turns that an engine made by itself.

        Args:
            turns: the number of turns.
            states: (B,) after them; -1: the last turn ended the text.
            none_ends: whether all texts continue.
        """
        self.left -= turns
        self.states, self._ended = [*states], [state < 0 for state in states]
        self._answers, self.none_ends = [None] * len(states), none_ends

    def _ask(self, row: int) -> tuple[NDArray[np.bool_], bool]:
        """Return the answer of the constraint for a row; it is asked once for each id."""
        answer = self._answers[row]
        if answer is None:
            answer = self._answers[row] = self._checked(self.constraint.allowed(self.states[row], self.left))
            if not answer[1] and not answer[0].any():
                raise InputError(
                    f"constraint leaves no text: none of at most {self.left} more ids matches, got state "
                    f"{shown(self.states[row])}"
                )
        return answer

    def _checked(self, answer: tuple[NDArray[np.bool_], bool]) -> tuple[NDArray[np.bool_], bool]:
        allowed, may_end = answer
        if (
            not isinstance(allowed, np.ndarray)
            or allowed.dtype != np.bool_
            or len(allowed) != self._vocab_size
        ):
            raise InputError(
                f"constraint must say which ids are allowed as an array of bool, ({self._vocab_size},), got "
                f"{shown(allowed)}"
            )
        return allowed, bool(may_end)
