"""`FastState`: what `PlainState` does, for a small GPT on a CPU, by one native call for each id.

PyTorch needs a few microseconds for each of a hundred operations per character; the arithmetic of a small
model needs less than that in all. `kernel.c` does a whole pass, and the choice of the next id, at once.
It applies to weights in float32 and bfloat16 (which are widened on the way) wherever a C compiler is at hand;
`fast_state` returns None elsewhere. Knows a model only as the `DecoderWeights` that it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from charlm.generation.choosing import Chooser
from charlm.generation.native import Pass
from charlm.generation.options import Overflow, SamplingOptions
from charlm.generation.packing import PANEL, DecoderWeights, Source, find_source
from charlm.generation.sampling import nothing_to_draw
from charlm.generation.state import PredictionState, context_start

__all__ = ["FastState", "fast_state"]

_AT_ONCE = 1024  # ids in one pass
_WORTH_A_THREAD = 200_000  # multiplications


def fast_state(
    model: nn.Module,
    weights: Callable[[], DecoderWeights],
    settings: object,
    rows: int,
    overflow: Overflow,
) -> FastState | None:
    """Return a state of a model that it applies to, or None.

    Args:
        model: whose parameters all belong to `weights`; they are watched for changes.
        weights: called when they have to be packed.
        settings: what else `weights` depends on.
        rows: B.
        overflow: what happens past the model's window.
    """
    source = find_source(model, weights, settings)
    return None if source is None else FastState(source, rows, overflow)


class FastState(PredictionState):
    """See the head of this file. `LanguageModel.new_state` makes it where it applies.

    Args:
        source: the weights.
        rows: B.
        overflow: what happens past the model's window.
    """

    def __init__(self, source: Source, rows: int, overflow: Overflow) -> None:
        model = source.packed.model
        super().__init__(
            rows,
            overflow,
            vocab_size=model.V,
            block_size=source.packed.block_size,
            device=torch.device("cpu"),
        )
        self._source = source
        self._V = model.V
        self._ids = np.zeros((rows, PANEL), np.int64)
        # For each row: ids observed, where its context begins, ids read, the position that `next` predicts,
        # and where in the window the next id to be read stands.
        self._counters = np.zeros((5, rows), np.int64)
        self._length, self._begin, self._read, self._known, self._place = self._counters
        self._next: NDArray[np.float32] = np.zeros((rows, model.Vp), np.float32)
        self._keys = np.zeros((model.n_layer, rows, model.H, 0, model.D, PANEL), np.float32)
        self._values = np.zeros((model.n_layer, rows, model.H, 0, model.Dp), np.float32)
        self._steady = 0  # for how many more passes each row reads one id of one context
        self._prepare()

    def _prepare(self) -> None:
        """Set up what every single step uses."""
        rows = self.rows
        self._all = np.arange(rows + 1)
        self._chosen = np.zeros(rows, np.int64)
        self._choose = Chooser(self._source.kernel, self._V)
        self._work = np.zeros(0, np.float32)
        self._pass = Pass()

    def _room(self, positions: int) -> None:
        """Make the caches hold so many positions of each row."""
        m = self._source.packed.model
        old = self._keys.shape[3]
        panels = max(-(-positions // PANEL), min(2 * old, -(-self._source.packed.block_size // PANEL)))
        keys = np.zeros((m.n_layer, self.rows, m.H, panels, m.D, PANEL), np.float32)
        values = np.zeros((m.n_layer, self.rows, m.H, panels * PANEL, m.Dp), np.float32)
        keys[:, :, :, :old] = self._keys
        values[:, :, :, : old * PANEL] = self._values
        self._keys, self._values = keys, values

    @property
    @override
    def lengths(self) -> list[int]:
        lengths: list[int] = self._length.tolist()
        return lengths

    @override
    def text(self, row: int) -> Tensor:
        return torch.from_numpy(self._ids[row, : self._length[row]].copy())

    @override
    def fork(self, rows: Sequence[int] | None = None) -> Self:
        wanted = np.array(self._picked(rows), np.int64)
        twin = object.__new__(type(self))
        PredictionState.__init__(
            twin,
            len(wanted),
            self.overflow,
            vocab_size=self._V,
            block_size=self.block_size,
            device=self.device,
        )
        twin._source, twin._V, twin._steady = self._source, self._V, 0
        # take, as the kernel needs it: what indexing gives may lie in memory in another order.
        twin._ids, twin._next = self._ids.take(wanted, axis=0), self._next.take(wanted, axis=0)
        twin._counters = self._counters.take(wanted, axis=1)
        twin._length, twin._begin, twin._read, twin._known, twin._place = twin._counters
        twin._keys, twin._values = self._keys.take(wanted, axis=1), self._values.take(wanted, axis=1)
        twin._prepare()
        return twin

    @override
    def _add(self, ids: Tensor | Sequence[Tensor]) -> None:
        for row, new in enumerate(ids):
            if len(new):
                self._append(row, new.numpy())
        self._steady = 0

    def _append(self, row: int, new: NDArray[np.int64]) -> None:
        end = self._length[row] + len(new)
        self._widen(end)
        self._ids[row, self._length[row] : end] = new
        self._length[row] = end

    def _widen(self, end: int) -> None:
        if end > self._ids.shape[1]:
            wider = np.zeros((self.rows, 2 * end), np.int64)
            wider[:, : self._ids.shape[1]] = self._ids
            self._ids = wider

    @override
    def _retract(self, count: int) -> None:
        self._steady = 0
        self._length -= count
        np.minimum(self._read, self._length - 1, out=self._read)  # the last id is read again
        self._known[:] = -1
        self._begin[self._read < self._begin] = -1

    @override
    def _logits(self, spans: Sequence[range]) -> list[Tensor]:
        self._steady = 0
        found = [np.empty((len(span), self._V), np.float32) for span in spans]
        self._source.look_for_changes()
        at = [span.start for span in spans]
        while True:
            plan: list[tuple[int, int, int, int]] = []  # row, ids from, to, first position wanted
            left = _AT_ONCE
            for row, span in enumerate(spans):
                if (
                    at[row] < span.stop
                    and self._known[row] == at[row]
                    and self._begin[row] == self._start(at[row])
                ):
                    found[row][at[row] - span.start] = self._next[row, : self._V]
                    at[row] += 1
                if at[row] == span.stop or not left:
                    continue
                start, end = self._start(at[row]), at[row] + 1
                while end < span.stop and self._start(end) == start:
                    end += 1
                if self._begin[row] != start:
                    self._begin[row] = self._read[row] = start
                first = int(self._read[row])
                last = min(end - 1, first + left)
                left -= last - first
                plan.append((row, first, last, at[row]))
            if not plan:
                return [torch.from_numpy(logits) for logits in found]
            for row, position, logits in self._passed(plan):
                found[row][position - spans[row].start] = logits[: self._V]
                at[row] = position + 1

    def _passed(
        self, plan: list[tuple[int, int, int, int]]
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Read what is planned, and yield row, position and logits (Vp,) of what is wanted."""
        packed = self._source.packed
        begin = np.cumsum([0, *(last - first for _, first, last, _ in plan)])  # (rows + 1,)
        slot = np.array([row for row, *_ in plan])
        ids = np.concatenate([self._ids[row, first:last] for row, first, last, _ in plan])  # (n,)
        place = np.concatenate([np.arange(f, t) - self._begin[row] for row, f, t, _ in plan])  # (n,)
        wanted = [(row, i) for row, first, last, at in plan for i in range(max(first, at - 1), last)]
        offset = {row: start - first for (row, first, _, _), start in zip(plan, begin, strict=False)}
        want = np.array([offset[row] + i for row, i in wanted], np.int64)
        logits = np.empty((len(want), packed.model.Vp), np.float32)
        most = int(place.max()) + 1
        if most > self._values.shape[3]:
            self._room(most)
        work = self._fill(self._pass, len(plan), len(ids), len(want))
        for name, array in (
            *(("begin", begin), ("slot", slot), ("id", ids), ("position", place), ("want", want)),
            *(("logits", logits), ("work", work)),
        ):
            setattr(self._pass, name, array.ctypes.data)
        packed.kernel.charlm_pass(packed.model, self._pass)
        for row, _, last, _ in plan:
            self._read[row], self._known[row] = last, -1
        for (row, i), z in zip(wanted, logits, strict=True):
            self._known[row] = i + 1
            self._next[row] = z
            yield row, i + 1, z

    def _fill(self, one: Pass, rows: int, n: int, wanted: int) -> NDArray[np.float32]:
        """Set the sizes of a pass, and return its work space."""
        packed = self._source.packed
        one.B, one.n, one.wanted, one.slots, one.capacity = rows, n, wanted, self.rows, self._values.shape[3]
        one.threads = min(torch.get_num_threads(), 1 + n * packed.multiplications // _WORTH_A_THREAD)
        one.keys, one.values = self._keys.ctypes.data, self._values.ctypes.data
        needed = packed.kernel.charlm_work(packed.model, n, one.threads, one.capacity)
        if needed > len(self._work):
            self._work = np.empty(needed, np.float32)
        return self._work

    @override
    def advance(self, options: SamplingOptions, addresses: Sequence[int] | None = None) -> Tensor:
        if options.filters:
            return super().advance(options, addresses)
        addresses = range(self.rows) if addresses is None else addresses
        steady, self._steady = self._steady, 0  # until all has gone well
        if steady:
            self._step()
        else:
            steady = self._settle() + 1
        self._choose.all(self._next, options, addresses, self._length.tolist(), self._chosen)
        self._ids[self._all[:-1], self._length] = self._chosen
        self._length += 1
        self._steady = steady - 1
        return torch.from_numpy(self._chosen.copy())

    @override
    def verify(self, guesses: Tensor, options: SamplingOptions, address: int = 0) -> list[int]:
        if options.filters:
            return super().verify(guesses, options, address)
        self._check([guesses])
        self._check_begun()
        first, t = self.lengths[0], len(guesses)
        self._add(guesses[None])
        logits = self._logits([range(first, first + t + 1)])[0].numpy()  # (t + 1, V)
        chosen = np.empty(t + 1, np.int64)
        positions = range(first, first + t + 1)
        found = self._choose(logits, options, [address] * (t + 1), positions, chosen)
        right = int(np.cumprod(chosen[:t] == guesses.numpy()).sum())
        # A row after the first wrong guess means nothing, whether there was something to choose or not.
        if found == 0:
            if t:
                self._retract(t)
            raise nothing_to_draw(0, float(logits[0].max()))
        count = min(right + 1, found)
        if count <= t:
            self._retract(t + 1 - count)
        self._add(torch.from_numpy(chosen[None, count - 1 : count].copy()))
        ids: list[int] = chosen[:count].tolist()
        return ids

    def _settle(self) -> int:
        """Read all there is, and return how many single steps can follow."""
        self._check_begun()
        self._logits([range(length, length + 1) for length in self.lengths])
        end = self._begin + self._source.packed.block_size  # the last position with this context
        room = self._begin + self._values.shape[3]
        steady = int((np.minimum(end, room) - self._length).min())
        self._widen(int(self._length.max()) + steady + 1)
        self._place[:] = self._length - self._begin
        work = self._fill(self._pass, self.rows, self.rows, self.rows)
        for name, array in (
            *(("begin", self._all), ("slot", self._all), ("id", self._chosen), ("position", self._place)),
            *(("want", self._all), ("logits", self._next), ("work", work)),
        ):
            setattr(self._pass, name, array.ctypes.data)
        return steady

    def _step(self) -> None:
        """Read the ids that were just chosen."""
        self._source.look_for_changes()
        packed = self._source.packed
        packed.kernel.charlm_pass(packed.model, self._pass)
        self._counters[2:] += 1  # read, known, place

    def _start(self, position: int) -> int:
        return context_start(position, self.block_size, self.overflow)
