"""`PlainState`: asks any model, in PyTorch, on every device: the readable path.

The lecture's model is asked for the whole context each time; here the keys and values of what it has read are
kept. It knows a model only as something that maps ids to logits (`Predictor`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from charlm.generation.cache import KVCache
from charlm.generation.options import Overflow
from charlm.generation.state import PredictionState, context_start
from charlm.modes import evaluation_mode

__all__ = ["PlainState", "Predictor"]


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


class PlainState(PredictionState):
    """Asks the model, in PyTorch: works for every model on every device.

    Rows of one length share their passes.

    Args:
        model: what is asked. It is in evaluation mode during each pass, and put back after it.
        rows: B.
        overflow: what happens past the model's window.
        use_cache: keep keys and values of what was read. Changes speed, never the result.

    Raises:
        InputError: there is not at least one row, or no such overflow.

    Example:
        >>> from charlm import BigramLM
        >>> state = PlainState(BigramLM(65), rows=2)
        >>> state.observe([torch.tensor([24, 43]), torch.tensor([58])])
        >>> state.lengths, state.predict().shape
        ([2, 1], torch.Size([2, 65]))
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
