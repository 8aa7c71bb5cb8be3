"""`PredictionState`: some texts, as far as they are written, and what a model says comes next.

Everything that writes or scores a text stands on it: `predict()` gives the logits of the next id,
`observe(ids)` moves on, `fork()` makes a copy to go on from differently. Two rules hold for every model: the
cache never changes a result, and which ids the model sees is a function of the absolute position alone, so
each row gets what it would get by itself. `plain.py` asks any model, in PyTorch; `fast.py` has a quicker way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self, get_args

import torch
from torch import Tensor

from charlm.errors import InputError, NonFiniteError, shown
from charlm.generation.options import Overflow, SamplingOptions
from charlm.generation.sampling import sample
from charlm.randomness import uniforms

_AT_ONCE = 1024  # ids of a row that are scored together

__all__ = ["PredictionState", "context_start"]


def context_start(position: int, block_size: int | None, overflow: Overflow) -> int:
    """Return where the context begins from which the id at `position` is predicted.

    Up to `block_size` ids the model sees all of them. Past that, "slide" shows it exactly the last
    `block_size`, as the lecture does: every step then costs a whole window, since all positions shift.
    "restart" goes on from the last half of the window whenever the window is full, and lets it fill again:
    all but one step in half a window then cost one id.

    Args:
        position: absolute position of the id to be predicted, from 0; what came before counts.
        block_size: the model's window; None: no limit.
        overflow: "slide" or "restart".

    Example:
        >>> [position - context_start(position, 4, "slide") for position in range(1, 10)]
        [1, 2, 3, 4, 4, 4, 4, 4, 4]
        >>> [position - context_start(position, 4, "restart") for position in range(1, 10)]
        [1, 2, 3, 4, 2, 3, 4, 2, 3]
    """
    if block_size is None or position <= block_size:
        return 0
    if overflow == "slide":
        return position - block_size
    dropped = block_size + 1 - max(block_size // 2, 1)  # ids that each restart leaves behind
    return (
        -((block_size - position) // dropped) * dropped
    )  # ceil((position - block_size) / dropped) * dropped


class PredictionState(ABC):
    """Base of both kinds of state; `LanguageModel.new_state` makes one.

    The rows may be of different lengths. A state belongs to one thread; several may ask one model at once.

    Raises:
        InputError: there is not at least one row, or no such overflow.

    Example:
        >>> import torch
        >>> from charlm import BigramLM
        >>> state = BigramLM(65).new_state()
        >>> state.observe(torch.tensor([[1, 2, 3]]))
        >>> state.predict().shape
        torch.Size([1, 65])
    """

    def __init__(
        self,
        rows: int,
        overflow: Overflow,
        *,
        vocab_size: int,
        block_size: int | None,
        device: torch.device,
    ) -> None:
        if type(rows) is not int or rows < 1:
            raise InputError(f"rows must be an int, 1 or more, got {shown(rows)}")
        if not isinstance(overflow, str) or overflow not in get_args(Overflow):
            raise InputError(f"overflow must be 'slide' or 'restart', got {shown(overflow)}")
        self.rows: int = rows
        self.overflow: Overflow = overflow
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.device = device

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """How many ids each row has observed, (B,): the position of the next one."""

    @abstractmethod
    def text(self, row: int) -> Tensor:
        """Return the ids that a row has observed, (t,) int64.

        Args:
            row: its number, from 0.
        """

    @abstractmethod
    def fork(self, rows: Sequence[int] | None = None) -> Self:
        """Return a state that has observed the same and goes its own way from here.

        Args:
            rows: which rows it has, in which order; one may be taken several times. None: all.

        Raises:
            InputError: there are no such rows.
        """

    @abstractmethod
    def _add(self, ids: Tensor | Sequence[Tensor]) -> None:
        """Append (B, t) ids, or for each row its (t,)."""

    @abstractmethod
    def _retract(self, count: int) -> None:
        """Remove the last ids of each row; it has more."""

    @abstractmethod
    def _logits(self, spans: Sequence[range]) -> list[Tensor]:
        """Return for each row the logits (t, V) of its span of positions.

        Nothing before the span will be asked again. It may end with the position of the row's next id.
        """

    def observe(self, ids: Tensor | Sequence[Tensor]) -> None:
        """Move on: these ids come next. Nothing is computed before the next prediction.

        Args:
            ids: (B, t) int64, or for each row (t,) int64 of any length.

        Raises:
            InputError: they are of another type, shape, range, device or number of rows. None is taken.
        """
        self._check(ids)
        self._add(ids)

    def retract(self, count: int) -> None:
        """Take back the last ids of each row. What was read of those before them stays known.

        Args:
            count: how many, 0 or more, fewer than the shortest row has.

        Raises:
            InputError: there are not so many.
        """
        if type(count) is not int or not 0 <= count < max(min(self.lengths), 1):
            raise InputError(f"count must be an int from 0 to below {min(self.lengths)}, got {shown(count)}")
        if count:
            self._retract(count)

    def predict(self) -> Tensor:
        """Return the logits (B, V) of each row's next id; `softmax(-1)` makes them its distribution.

        Raises:
            InputError: a row has observed nothing yet.
        """
        self._check_begun()
        return torch.cat(self._logits([range(length, length + 1) for length in self.lengths]))

    def score(self, ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Move on by these ids, and return how likely each was where it came.

        Args:
            ids: as for `observe`.

        Returns:
            For each row (t,) float64, natural logarithms of probabilities.

        Raises:
            InputError: as for `observe` and `predict`.
        """
        self._check(ids)
        self._check_begun()
        rows = list(ids)
        scores: list[list[Tensor]] = [[row.new_empty(0, dtype=torch.float64)] for row in rows]
        for at in range(0, max(len(row) for row in rows), _AT_ONCE):
            pieces = [row[at : at + _AT_ONCE] for row in rows]
            first = self.lengths
            self._add(pieces)
            logits = self._logits(
                [range(start, start + len(piece)) for start, piece in zip(first, pieces, strict=True)]
            )
            for score, piece, z in zip(scores, pieces, logits, strict=True):
                log_probs = z.double().log_softmax(dim=-1)  # (t, V)
                score.append(log_probs.gather(1, piece[:, None])[:, 0])
        return [torch.cat(score) for score in scores]

    def advance(self, options: SamplingOptions, addresses: Sequence[int] | None = None) -> Tensor:
        """Choose the next id of each row from what `predict` says, observe it, and return it, (B,) int64.

        Args:
            options: how to choose; `options.seed` must be an int unless the temperature is 0.
            addresses: (B,) address of each row's random numbers, by default 0 ... B-1.

        Raises:
            NonFiniteError: a row's logits hold NaN, or a filter removed every id.
        """
        lengths = self.lengths
        addresses = range(self.rows) if addresses is None else addresses
        with torch.no_grad():
            logits = self.predict()
            if options.filters:  # they are shown texts of one length
                filtered = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
                for length in dict.fromkeys(lengths):
                    rows = [row for row in range(self.rows) if lengths[row] == length]
                    texts = torch.stack([self.text(row) for row in rows])  # (Bg, t)
                    filtered[rows] = options.filter(logits[rows], texts).to(filtered)
            else:
                filtered = options.filter(logits, logits.new_empty(0))
            greedy = options.temperature == 0
            chosen = sample(filtered, None if greedy else uniforms(options.seed or 0, addresses, lengths))
        self._add(chosen[:, None])
        return chosen

    def verify(self, guesses: Tensor, options: SamplingOptions, address: int = 0) -> list[int]:
        """Do what `advance` does for the only row, as often as a guess turns out right, and once more.

        All guesses are read in one pass, so right ones cost next to nothing. The ids are those that `advance`
        would choose, one by one.

        Args:
            guesses: (t,) int64, of the ids to come.
            options: how to choose; `options.seed` must be an int unless the temperature is 0.
            address: of the row's random numbers.

        Returns:
            From 1 to t + 1 ids, now observed.

        Raises:
            NonFiniteError: as `advance`.
            InputError: as for `observe` and `predict`; there are several rows.
        """
        self._check([guesses])
        self._check_begun()
        first = self.lengths[0]
        self._add(guesses[None])
        with torch.no_grad():
            logits = self._logits([range(first, first + len(guesses) + 1)])[0]  # (t + 1, V)
            chosen: list[int] = []
            for position, z in enumerate(logits, start=first):
                text = self.text(0)[None, :position] if options.filters else z.new_empty(0)
                number = (
                    None if options.temperature == 0 else uniforms(options.seed or 0, [address], position)
                )
                try:
                    chosen.append(int(sample(options.filter(z[None], text), number)))
                except NonFiniteError:
                    if chosen:
                        break  # the next call will meet it
                    if len(guesses):
                        self._retract(len(guesses))
                    raise
                right = position - first < len(guesses) and chosen[-1] == int(guesses[position - first])
                if not right:
                    break
        if len(chosen) <= len(guesses):
            self._retract(len(guesses) + 1 - len(chosen))
        self._add(torch.tensor([chosen[-1:]], device=self.device))
        return chosen

    def _check(self, ids: Tensor | Sequence[Tensor]) -> None:
        rows: Sequence[object] = ids if isinstance(ids, Sequence) else ()
        if isinstance(ids, Tensor) and ids.ndim == 2:
            rows = list(ids)
        if len(rows) != self.rows or not all(
            isinstance(row, Tensor) and row.dtype == torch.int64 and row.ndim == 1 for row in rows
        ):
            raise InputError(
                f"ids must be int64 of shape (B, t), or B tensors (t,), B = {self.rows}; got {shown(ids)}"
            )
        V = self.vocab_size
        for number, row in enumerate(ids):
            if row.device != self.device:
                raise InputError(f"ids must be on the model's device {self.device}, got {row.device}")
            if len(row) and not all(0 <= int(i) < V for i in torch.aminmax(row)):
                wrong = int(row[(row < 0) | (row >= V)][0])
                raise InputError(
                    f"ids must be from 0 to {V - 1} (vocab_size {V}), got {wrong} in row {number}"
                )

    def _picked(self, rows: Sequence[int] | None) -> list[int]:
        """Return the rows that a fork has."""
        picked = list(range(self.rows) if rows is None else rows)
        if not picked or not all(isinstance(row, int) and 0 <= row < self.rows for row in picked):
            raise InputError(f"rows must be one or more of 0 to {self.rows - 1}, got {shown(rows)}")
        return picked

    def _check_begun(self) -> None:
        if 0 in self.lengths:
            raise InputError("nothing is known of a row: observe at least one id before the first prediction")
