"""`PredictionState`: texts so far, and a model's prediction of their next ids.

All generation and scoring uses it: `predict()` gives the logits of the next id, `observe(ids)` appends ids,
and `fork()` makes a copy that can continue differently. It holds and checks the texts and plans the passes,
in the same way for every model; an `Engine` computes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from charlm.errors import InputError, shown
from charlm.generation.constraints import Walk
from charlm.generation.engine import Engine
from charlm.generation.options import Overflow
from charlm.generation.passes import context_start, plan_passes
from charlm.plain import as_int, as_text

__all__ = ["PredictionState"]

_AT_ONCE = 1024  # ids of a row that are scored together


class PredictionState:
    """Texts of any lengths, one in each row. `LanguageModel.new_state` makes one.

    A state belongs to one thread; several states in several threads may use one model.

    Args:
        engine: computes the predictions. It has read nothing, and belongs to this state from now on.
        overflow: past the model's window, "slide" by one id each time, or "restart" from the last half.

    Attributes:
        engine: as given.
        overflow: as given.
        rows: B, the number of texts.
        vocab_size: V.
        block_size: the most ids that the model sees at once; None: no limit.
        device: of ids and logits.
        texts: (B, room), the ids of all rows, for engines; only the first `lengths` ids of a row count.
        steps_left: number of turns for which the engine is prepared; anything but such a turn sets it to 0.
        walk: the state of the texts in a constraint, during generation with one.

    Raises:
        InputError: there is no such overflow.

    Example:
        >>> from charlm import BigramLM
        >>> state = BigramLM(65).new_state()
        >>> state.observe(torch.tensor([[1, 2, 3]]))
        >>> state.predict().shape
        torch.Size([1, 65])
    """

    def __init__(self, engine: Engine, *, overflow: Overflow = "slide") -> None:
        modes: tuple[Overflow, ...] = get_args(Overflow)
        if as_text(overflow) not in modes:
            raise InputError(f"overflow must be 'slide' or 'restart', got {shown(overflow)}")
        self.engine: Engine = engine
        self.overflow: Overflow = modes[modes.index(overflow)]
        self.rows: int = engine.rows
        self.vocab_size: int = engine.vocab_size
        self.block_size: int | None = engine.block_size
        self.device: torch.device = engine.device
        self.texts: NDArray[np.int64] = np.zeros((self.rows, 64), np.int64)
        self._all = np.arange(self.rows)
        self._lengths: NDArray[np.int64] = np.zeros(self.rows, np.int64)
        self._longest = 0  # the largest of the lengths
        # The engine has read the ids from `_begin` up to `_read`. This may reach beyond the length, over ids
        # that `retract` removed or `verify` was given; these are still in `texts`.
        self._begin: NDArray[np.int64] = np.zeros(self.rows, np.int64)
        self._read: NDArray[np.int64] = np.zeros(self.rows, np.int64)
        self._next: Tensor | None = None  # (B, V), the prediction after the last id, if it was computed
        self.steps_left: int = 0
        self.walk: Walk | None = None

    @property
    def lengths(self) -> list[int]:
        """The number of ids that each row has observed, (B,): the position of its next id."""
        lengths: list[int] = self._lengths.tolist()
        return lengths

    def text(self, row: int) -> Tensor:
        """Return the ids that a row has observed, (t,) int64.

        Args:
            row: its number, from 0.
        """
        return self._tensor(self.texts[row, : self._lengths[row]])

    def observe(self, ids: Tensor | Sequence[Tensor]) -> None:
        """Append ids to the texts. Nothing is computed before the next prediction.

        Args:
            ids: (B, t) int64; or (B,), one for each row; or B tensors (t,) of any lengths.

        Raises:
            InputError: type, shape, range, device or number of rows is wrong. No id was appended.
        """
        self._append(self._checked(ids))

    def retract(self, count: int) -> None:
        """Remove the last ids of each row. The ids before them need not be read again.

        Args:
            count: the number of ids, 0 or more, less than the length of the shortest row.

        Raises:
            InputError: `count` is out of this range.
        """
        taken = as_int(count)
        if taken is None or not 0 <= taken < max(min(self.lengths), 1):
            raise InputError(f"count must be an int from 0 to below {min(self.lengths)}, got {shown(count)}")
        if taken:
            self._next, self.steps_left = None, 0
            self._lengths -= taken
            self._longest -= taken

    def fork(self, rows: Sequence[int] | None = None) -> Self:
        """Return a copy of some rows, which is independent from now on.

        Args:
            rows: numbers of rows in any order; a number may occur several times. None: all.

        Raises:
            InputError: there are no such rows.
        """
        asked = [as_int(row) for row in (range(self.rows) if rows is None else rows)]
        picked = [row for row in asked if row is not None and 0 <= row < self.rows]
        if not picked or len(picked) < len(asked):
            raise InputError(f"rows must be one or more of 0 to {self.rows - 1}, got {shown(rows)}")
        twin = type(self)(self.engine.fork(picked), overflow=self.overflow)
        twin.texts, twin._lengths = self.texts[picked], self._lengths[picked]
        twin._longest = max(twin.lengths)
        twin._begin, twin._read = self._begin[picked], np.minimum(self._read, self._lengths)[picked]
        twin._next = None if self._next is None else self._next[picked]
        return twin

    def predict(self) -> Tensor:
        """Return the logits (B, V) of each row's next id; `softmax(-1)` turns them into probabilities.

        Raises:
            InputError: a row has observed nothing yet.
        """
        self._check_begun()
        if self._next is None:
            rows = self._logits([range(length, length + 1) for length in self.lengths])
            self._next = rows[0] if len(rows) == 1 else torch.cat(rows)
        return self._next.clone()

    def score(self, ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Append ids, and return the log-probability of each.

        Args:
            ids: as for `observe`.

        Returns:
            For each row (t,) float64, natural logarithms.

        Raises:
            InputError: as for `observe` and `predict`.
        """
        rows = self._checked(ids)
        self._check_begun()
        scores: list[list[Tensor]] = [[torch.empty(0, dtype=torch.float64, device=self.device)] for _ in rows]
        for at in range(0, max(map(len, rows)), _AT_ONCE):
            pieces = [row[at : at + _AT_ONCE] for row in rows]
            spans = [range(n, n + len(piece)) for n, piece in zip(self.lengths, pieces, strict=True)]
            first = self._next
            self._append(pieces)
            logits = self._logits(spans, first)
            for score, piece, z in zip(scores, pieces, logits, strict=True):
                log_probs = z.double().log_softmax(dim=-1)  # (t, V)
                score.append(log_probs.gather(1, self._tensor(piece)[:, None])[:, 0])
        return [torch.cat(score) for score in scores]

    def verify(self, guesses: Tensor) -> Tensor:
        """Return the prediction at the place of each guessed id, and after the last one.

        All guesses are read in one pass, as in `score`. No id is appended. If the guessed ids are observed
        next, they are not read again.

        Args:
            guesses: (t,) int64, for the only row.

        Returns:
            Logits (t + 1, V): row i is the prediction if the guesses before i are right.

        Raises:
            InputError: as for `observe` and `predict`; or there are several rows.
        """
        (new,) = self._checked([guesses])
        self._check_begun()
        first = self.lengths[0]
        end = first + len(new)
        self._widen(end)
        np.minimum(self._read, self._lengths, out=self._read)  # earlier guesses no longer count
        self.texts[0, first:end] = new
        (logits,) = self._logits([range(first, end + 1)], self._next)
        self._next = logits[:1].clone()
        return logits

    def single_steps(self) -> tuple[NDArray[np.int64], int] | None:
        """Return whether an engine may do turns by itself, each with one id per row, and how many.

        It may do so if only the last id of each row is unread, and as long as the context begins at the same
        place.

        Returns:
            (B,) the place of each row's last id in its context, and the most turns; or None.
        """
        W = self.block_size
        for n, begin, read in zip(self.lengths, self._begin.tolist(), self._read.tolist(), strict=True):
            if read != n - 1 or begin != context_start(n, W, self.overflow):
                return None
        turns = sys.maxsize if W is None else int((self._begin + W + 1 - self._lengths).min())
        return self._read - self._begin, turns

    def widened(self, end: int) -> NDArray[np.int64]:
        """Return the texts with room for `end` ids in each row; an engine may write into the free part."""
        self._widen(end)
        return self.texts

    def took(self, ids: NDArray[np.int64]) -> None:
        """Append the ids (t B,) of turns that the engine did by itself; all but the last are read."""
        turns = len(ids) // self.rows
        self._longest += turns
        self._widen(self._longest)
        if turns == 1:
            self.texts[self._all, self._lengths] = ids
        else:
            places = self._lengths + np.arange(turns)[:, None]  # (t, B)
            self.texts[self._all, places] = ids.reshape(turns, self.rows)
        self._next = None
        self._lengths += turns
        self._read += turns  # after the lengths, so that an interrupt leaves no unknown id marked as read

    def _append(self, new: Sequence[NDArray[np.int64]]) -> None:
        """Add ids (t,) to each row."""
        if not any(map(len, new)):
            return
        lengths = self.lengths
        self._next, self.steps_left = None, 0
        self._longest = max(n + len(ids) for n, ids in zip(lengths, new, strict=True))
        self._widen(self._longest)
        for row, (n, ids) in enumerate(zip(lengths, new, strict=True)):
            place = self.texts[row, n : n + len(ids)]
            ahead = int(self._read[row]) - n
            if (
                ahead > 0
            ):  # ids beyond the length were read; they stay read as far as the new ids are the same
                self._read[row] = n + np.cumprod(place[:ahead] == ids[:ahead]).sum()
            place[:] = ids
            self._lengths[row] = n + len(ids)

    def _widen(self, end: int) -> None:
        """Make room for so many ids in each row."""
        if end > self.texts.shape[1]:  # doubling limits the copying
            wider = np.zeros((self.rows, 2 * end), np.int64)
            wider[:, : self.texts.shape[1]] = self.texts
            self.texts = wider

    def _logits(self, spans: Sequence[range], first: Tensor | None = None) -> list[Tensor]:
        """Return for each row the logits (t, V) of its span of positions.

        Args:
            spans: (B,) of any lengths.
            first: the logits (B, V) at the first position of each span, if they were computed before.
        """
        self.steps_left = 0
        results: list[list[Tensor]] = [[] for _ in spans]
        if first is not None:
            results = [[z[None]] if span else [] for z, span in zip(first, spans, strict=True)]
            spans = [span[1:] for span in spans]
        read = [range(a, b) for a, b in zip(self._begin.tolist(), self._read.tolist(), strict=True)]
        for passes in plan_passes(spans, read, self.block_size, self.overflow):
            for one in passes:  # in this order, so that an interrupt leaves no unread id marked as read
                self._read[one.row] = 0
                self._begin[one.row] = one.begin
                self._read[one.row] = one.start
            for one, logits in zip(passes, self.engine.logits(self.texts, passes), strict=True):
                results[one.row].append(logits)
                self._read[one.row] = one.stop
        nothing = [torch.empty(0, self.vocab_size, device=self.device)]
        return [pieces[0] if len(pieces) == 1 else torch.cat(pieces or nothing) for pieces in results]

    def _checked(self, ids: Tensor | Sequence[Tensor]) -> list[NDArray[np.int64]]:
        """Return the ids of each row, (t,), or raise InputError."""
        if isinstance(ids, Tensor):
            if ids.ndim in {1, 2} and ids.dtype == torch.int64 and ids.shape[0] == self.rows:
                array = self._array(ids)
                return list(array if ids.ndim == 2 else array[:, None])
        elif (
            isinstance(ids, Sequence)
            and len(ids) == self.rows
            and all(isinstance(row, Tensor) and row.ndim == 1 and row.dtype == torch.int64 for row in ids)
        ):
            return [self._array(row, number) for number, row in enumerate(ids)]
        raise InputError(
            f"ids must be int64 of shape (B, t) or (B,), or B tensors (t,), B = {self.rows}; got {shown(ids)}"
        )

    def _array(self, ids: Tensor, row: int | None = None) -> NDArray[np.int64]:
        """Return ids as an array, or raise InputError. Without `row`, the first dimension is rows."""
        if ids.device != self.device:
            raise InputError(f"ids must be on the model's device {self.device}, got {ids.device}")
        array: NDArray[np.int64] = ids.cpu().numpy()
        unsigned = array.view(np.uint64)  # a negative number becomes a large one
        if unsigned.max(initial=0) >= self.vocab_size:
            place = np.argwhere(unsigned >= self.vocab_size)[0]
            raise InputError(
                f"ids must be from 0 to {self.vocab_size - 1} (vocab_size {self.vocab_size}), "
                f"got {array[tuple(place)]} in row {place[0] if row is None else row}"
            )
        return array

    def _check_begun(self) -> None:
        if 0 in self.lengths:
            raise InputError("nothing is known of a row: observe at least one id before the first prediction")

    def _tensor(self, ids: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(ids.copy()).to(self.device)
