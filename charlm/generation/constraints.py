"""Texts that have to match something: what may come next, and where a text ends.

A `Constraint` says of a text so far which ids may follow. `Walk` follows some texts through one, for the
loop of `decode.py`: it masks logits, and tells which texts have ended. In a text that may end, the next id is
drawn from all of them, and one that may not follow ends it; so how likely an end is remains the model's say.
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
    """What a text has to match, told one id after another. A regular expression is one; any object may be.

    Where a text stands is a state, whatever the constraint takes for it; None is that of no id. States are
    asked more than once, and of several texts in turn, so they must not change.

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
        """Return which ids may follow, (V,) bool, and whether the text may end where it stands.

        Args:
            state: where it stands.
            left: at most so many ids may still follow. One may only where a text that matches fits into this,
                so with 0 none; and one must, unless the text may end.
        """

    def after(self, state: Any, token: int) -> Any:
        """Return the state after one more id, which was allowed.

        Args:
            state: where the text stands.
            token: the id.
        """


class Walk:
    """Where some texts stand in a constraint.

    Args:
        constraint: which.
        rows: B, texts that begin.
        left: the most ids that each may get.
        vocab_size: V.

    Attributes:
        constraint: as given.
        left: how many ids each may still get.
        states: (B,) of the constraint; those of ended texts have no meaning.
        none_ends: whether it is known, without a question, that all texts go on.

    Raises:
        InputError: no text fits, or the constraint answers something else than it should.
    """

    def __init__(self, constraint: Constraint, rows: int, left: int, vocab_size: int) -> None:
        self.constraint: Constraint = constraint
        self.left: int = left
        self.states: list[Any] = [None] * rows
        self._ended = [False] * rows
        self._vocab_size = vocab_size
        self.none_ends: bool = False
        self._known: list[tuple[NDArray[np.bool_], bool] | None] = [None] * rows
        if isinstance(constraint, Automaton) and constraint.distance[0] > left:
            raise InputError(
                f"max_new_tokens must be at least {constraint.distance[0]}, the length of the shortest text "
                f"that matches, got {left}"
            )
        self._ask(0)

    def fork(self, rows: Sequence[int]) -> Self:
        """Return where some rows stand, which go their own way from here."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        twin.states = [self.states[row] for row in rows]
        twin._ended = [self._ended[row] for row in rows]
        twin._known = [self._known[row] for row in rows]
        return twin

    def ended(self, row: int) -> bool:
        """Return whether a text has ended, or nothing can follow, which is its end, too."""
        return self._ended[row] or not self._ask(row)[0].any()

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits (B, V) with -inf for what may not follow, except in texts that may end."""
        free = np.ones(self._vocab_size, dtype=np.bool_)
        asked = [self._ask(row) for row in range(len(self.states))]
        rows = np.stack([free if may_end else allowed for allowed, may_end in asked])
        return logits.masked_fill(torch.from_numpy(~rows).to(logits.device), -torch.inf)

    def move(self, ids: Tensor) -> Tensor:
        """Move on by the next id of each text, (B,); return them with -1 for those that ended their texts."""
        moved = ids.tolist()
        for row, i in enumerate(moved):
            if self._ask(row)[0][i]:
                self.states[row] = self.constraint.after(self.states[row], i)
            else:
                self._ended[row], moved[row] = True, -1
        self.left -= 1
        self._known, self.none_ends = [None] * len(moved), False
        return ids.new_tensor(moved)

    def moved(self, turns: int, states: Sequence[int], *, none_ends: bool) -> None:
        """Take note of turns that were made elsewhere.

        Args:
            turns: how many.
            states: (B,) after them; -1: the last one ended the text.
            none_ends: whether all texts go on.
        """
        self.left -= turns
        self.states, self._ended = [*states], [state < 0 for state in states]
        self._known, self.none_ends = [None] * len(states), none_ends

    def _ask(self, row: int) -> tuple[NDArray[np.bool_], bool]:
        """Return what the constraint says of a text, which is asked once for each id."""
        known = self._known[row]
        if known is None:
            known = self._known[row] = self._checked(self.constraint.allowed(self.states[row], self.left))
            if not known[1] and not known[0].any():
                raise InputError(
                    f"constraint leaves no text: none of at most {self.left} more ids matches, got state "
                    f"{shown(self.states[row])}"
                )
        return known

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
