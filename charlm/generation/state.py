"""`PredictionState`: some texts, as far as they are written, and what a model says comes next.

Everything that writes or scores a text stands on it: `predict()` gives the logits of the next id,
`observe(ids)` moves on, `fork()` makes a copy to go on from differently. Two rules hold for every model: the
cache never changes a result, and which ids the model sees is a function of the absolute position alone, so
each row gets what it would get by itself. `PlainState` asks any model, in PyTorch; `fast.py` has a quicker
one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Protocol, Self, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import override

from charlm.errors import InputError, NonFiniteError, shown
from charlm.generation.cache import KVCache
from charlm.generation.options import Overflow, SamplingOptions
from charlm.generation.sampling import sample
from charlm.randomness import uniforms

_AT_ONCE = 1024  # ids of a row that are scored together

__all__ = ["PlainState", "PredictionState", "Predictor", "context_start", "evaluation_mode"]


class Predictor(Protocol):
    """What generation asks of a model. Every `charlm.LanguageModel` is one."""

    @property
    def vocab_size(self) -> int:
        """V, number of different ids."""

    @property
    def block_size(self) -> int | None:
        """The most ids that it can see at once; None: no limit."""

    @property
    def device(self) -> torch.device:
        """Where ids have to lie."""

    def new_cache(self) -> KVCache | None:
        """Return an empty cache for one generation, or None if the model keeps none."""

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the model and its parts, as `nn.Module.modules` does."""

    def __call__(
        self, idx: Tensor, targets: None = None, *, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits (B, t, V) after each of the ids (B, t), which follow those in the cache."""


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
        """Return the ids that a row has observed, (t,) int64."""

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
        """
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
            wrong = row[(row < 0) | (row >= V)]
            if len(wrong):
                raise InputError(
                    f"ids must be from 0 to {V - 1} (vocab_size {V}), got {int(wrong[0])} in row {number}"
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


class PlainState(PredictionState):
    """Asks the model, in PyTorch: works for every model on every device.

    Rows of one length share their passes.

    Args:
        model: what is asked. It is in evaluation mode during each pass, and put back after it.
        rows: B.
        overflow: what happens past the model's window.
        use_cache: keep keys and values of what was read. Changes speed, never the result.
    """

    def __init__(
        self, model: Predictor, rows: int = 1, *, overflow: Overflow = "slide", use_cache: bool = True
    ) -> None:
        super().__init__(
            rows,
            overflow,
            vocab_size=model.vocab_size,
            block_size=model.block_size,
            device=model.device,
        )
        self._model = model
        self._use_cache = use_cache
        self._groups: list[_Group] = [
            _Group(list(range(rows)), torch.empty(rows, 0, dtype=torch.int64, device=model.device))
        ]

    @property
    @override
    def lengths(self) -> list[int]:
        lengths = [0] * self.rows
        for group in self._groups:
            for row in group.rows:
                lengths[row] = group.length
        return lengths

    @override
    def text(self, row: int) -> Tensor:
        group = next(group for group in self._groups if row in group.rows)
        return group.ids[group.rows.index(row), : group.length].clone()

    @override
    def fork(self, rows: Sequence[int] | None = None) -> Self:
        wanted = self._picked(rows)
        twin = type(self)(self._model, len(wanted), overflow=self.overflow, use_cache=self._use_cache)
        twin._groups = []
        for group in self._groups:
            picked = [(new, group.rows.index(old)) for new, old in enumerate(wanted) if old in group.rows]
            if picked:
                twin._groups.append(group.select([at for _, at in picked], [new for new, _ in picked]))
        return twin

    @override
    def _add(self, ids: Tensor | Sequence[Tensor]) -> None:
        if isinstance(ids, Tensor):
            for group in self._groups:
                group.add(ids if len(self._groups) == 1 else ids[group.rows])
            return
        groups = []
        for group in self._groups:
            new = [ids[row] for row in group.rows]
            for length in dict.fromkeys(map(len, new)):
                at = [i for i, row in enumerate(new) if len(row) == length]
                part = group if len(at) == len(new) else group.select(at, [group.rows[i] for i in at])
                part.add(torch.stack([new[i] for i in at]))
                groups.append(part)
        self._groups = groups

    @override
    def _retract(self, count: int) -> None:
        for group in self._groups:
            group.retract(count)

    @override
    def _logits(self, spans: Sequence[range]) -> list[Tensor]:
        found: list[Tensor | None] = [None] * self.rows
        for group in self._groups:
            span = spans[group.rows[0]]
            pieces, position = [], span.start
            while position < span.stop:
                start, end = self._start(position), position + 1
                while end < span.stop and self._start(end) == start:
                    end += 1
                pieces.append(self._run(group, start, range(position, end)))
                position = end
            if not pieces:  # other rows have longer spans
                pieces = [torch.empty(len(group.rows), 0, self.vocab_size, device=self.device)]
            logits = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]  # (Bg, t, V)
            for row, z in zip(group.rows, logits, strict=True):
                found[row] = z
        return [z for z in found if z is not None]

    def _start(self, position: int) -> int:
        return context_start(position, self.block_size, self.overflow)

    def _run(self, group: _Group, start: int, positions: range) -> Tensor:
        """Return the logits (Bg, t, V) of positions that are predicted from one context."""
        end = positions.stop - 1  # ids before it are read
        if group.start != start or group.cache is None:
            # A cache pays only if the next step sees the same context and one id more.
            lasting = self._start(positions.stop) == start
            group.cache = self._model.new_cache() if self._use_cache and lasting else None
            group.start = group.read = start
        known = group.next if group.read == positions.start else None  # asked for twice
        if known is not None and end == group.read:
            return known
        with _lasting(), torch.no_grad(), evaluation_mode(self._model):
            logits, _ = self._model(group.ids[:, group.read : end], cache=group.cache)  # (Bg, t, V)
        if known is not None:
            logits = torch.cat([known, logits], dim=1)
        if group.cache is not None:
            group.read, group.next = end, logits[:, -1:]
        return logits[:, -len(positions) :]


class _Group:
    """Rows of one length in a `PlainState`, and what the model has read of them."""

    def __init__(self, rows: list[int], ids: Tensor) -> None:
        self.rows = rows  # their numbers in the state
        self.ids = ids  # (Bg, room)
        self.length: int = ids.size(1)
        self.cache: KVCache | None = None
        self.start: int = 0  # where the context begins that is in the cache
        self.read: int = 0  # up to here
        self.next: Tensor | None = None  # (Bg, 1, V), what is predicted there

    def add(self, ids: Tensor) -> None:
        end = self.length + ids.size(1)
        if end > self.ids.size(1):  # doubling keeps the copying small
            with _lasting():
                room = self.ids.new_empty(len(self.rows), max(64, 2 * end))
            room[:, : self.length] = self.ids[:, : self.length]
            self.ids = room
        self.ids[:, self.length : end] = ids
        self.length = end

    def retract(self, count: int) -> None:
        self.length -= count
        if self.cache is not None and self.read >= self.length:
            # The last id is read again, which tells what comes next.
            self.read, self.next = self.length - 1, None
            if self.read < self.start or not self.cache.truncate(self.read - self.start):
                self.cache = None

    def select(self, at: list[int], rows: list[int]) -> _Group:
        """Return a copy of some rows, under other numbers."""
        with _lasting():
            part = _Group(rows, self.ids[at, : self.length])
            cache = None if self.cache is None else self.cache.fork(at)
            if cache is not None and self.next is not None:
                part.cache, part.start, part.read, part.next = cache, self.start, self.read, self.next[at]
        return part


def _lasting() -> torch.inference_mode:
    """Let what is made inside be written to later, when the caller has left his inference mode."""
    return torch.inference_mode(mode=False)


_evaluating: WeakKeyDictionary[object, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_evaluating_lock = Lock()


@contextmanager
def evaluation_mode(model: Predictor | nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block; each submodule then gets back the flag that it had.

    The flags belong to the model, so of several threads that use it at once the last one out restores them.
    """
    with _evaluating_lock:
        users, training = _evaluating.get(model, (0, []))
        if users == 0:
            training = [module for module in model.modules() if module.training]
            for module in training:
                module.training = False
        _evaluating[model] = users + 1, training
    try:
        yield
    finally:
        with _evaluating_lock:
            users, training = _evaluating.pop(model)
            if users > 1:
                _evaluating[model] = users - 1, training
            else:
                for module in training:
                    module.training = True
