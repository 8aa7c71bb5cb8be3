"""`FastState`: what `PlainState` does, for a small GPT on a CPU, by one native call for each id.

PyTorch needs a few microseconds for each of a hundred operations per character; the arithmetic of a small
model needs less than that in all. `kernel.c` does a whole pass, and the choice of the next id, at once.
It applies to weights in float32 and bfloat16 (which are widened on the way) wherever a C compiler is at hand;
`fast_state` returns None elsewhere. Knows a model only as the `DecoderWeights` that it gives.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from charlm.errors import InputError
from charlm.generation.native import Choice, Layer, Matrix, Model, Pass, library
from charlm.generation.options import Overflow, SamplingOptions
from charlm.generation.sampling import nothing_to_draw
from charlm.generation.state import PredictionState, context_start
from charlm.randomness import uniforms

__all__ = ["DecoderWeights", "FastState", "LayerWeights", "fast_state"]

_PANEL = 64  # as in kernel.c
_AT_ONCE = 1024  # ids in one pass
_WORTH_A_THREAD = 200_000  # multiplications
_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "relu2", "swiglu")


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One block. Matrices are (out, in) as in `nn.Linear`; a bias or a gain may be missing."""

    norm_1: tuple[Tensor | None, Tensor | None]
    """Gain and shift (C,) of the norm before attention."""
    qkv: tuple[Tensor, Tensor | None]
    """(3 C, C), queries, keys and values below each other."""
    project: tuple[Tensor, Tensor | None]
    norm_2: tuple[Tensor | None, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    """(F, C); with swiglu (2 F, C), gates first."""
    down: tuple[Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """A GPT as numbers: everything that a pass needs."""

    n_head: int
    block_size: int
    norm: str
    """layernorm or rmsnorm."""
    norm_eps: float
    qk_eps: float | None
    """None: queries and keys are not normalised."""
    activation: str
    token_embedding: Tensor
    position_embedding: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    """Cosine and sine (block_size, D / 2)."""
    layers: Sequence[LayerWeights]
    norm_out: tuple[Tensor | None, Tensor | None]
    head: tuple[Tensor, Tensor | None]


class _Packed:
    """The weights in the kernel's layout, and what they were copied from."""

    def __init__(self, kernel: ctypes.CDLL, weights: DecoderWeights, parameters: Sequence[Tensor]) -> None:
        self.kernel = kernel
        self.parameters = parameters
        self._kept: list[Tensor] = []  # what the structures point to
        self._half = weights.head[0].dtype == torch.bfloat16
        self.versions = self.current_versions()
        self.digest = self.current_digest()
        V, C = weights.token_embedding.shape
        H = weights.n_head
        D, Dp, Cp = C // H, _padded(C // H), _padded(C)
        layers = (Layer * len(weights.layers))()
        for packed, layer in zip(layers, weights.layers, strict=True):
            packed.gain1, packed.shift1 = map(self._vector, layer.norm_1)
            packed.gain2, packed.shift2 = map(self._vector, layer.norm_2)
            qkv, qkv_bias = layer.qkv
            heads = _wider(qkv.view(3, H, D, C), 2, Dp)  # (3, H, Dp, C)
            biases = None if qkv_bias is None else _wider(qkv_bias.view(3, H, D), 2, Dp)
            packed.query = self._matrix(
                heads[0].flatten(0, 1), None if biases is None else biases[0].flatten()
            )
            packed.key_value = self._matrix(
                heads[1:].flatten(0, 2), None if biases is None else biases[1:].flatten()
            )
            project, project_bias = layer.project
            packed.project = self._matrix(_wider(project.view(C, H, D), 2, Dp).flatten(1), project_bias)
            up, up_bias = layer.up
            if weights.activation == "swiglu":
                gates, up = up.chunk(2)
                gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
                packed.gate = self._matrix(gates, gate_bias)
            packed.up = self._matrix(up, up_bias)
            down, down_bias = layer.down
            packed.down = self._matrix(_wider(down, 1, _padded(down.size(1))), down_bias)
        gain, shift = map(self._vector, weights.norm_out)
        cos, sin = map(self._vector, weights.rotary or (None, None))
        self.block_size = weights.block_size
        self.multiplications = sum(p.numel() for p in parameters)  # about, for one id
        self.layers = layers
        self.model = Model(
            *(C, Cp, H, D, Dp, V, _padded(V), len(layers)),
            *(int(weights.norm == "rmsnorm"), _ACTIVATIONS.index(weights.activation)),
            *(int(weights.qk_eps is not None), int(self._half), weights.norm_eps, weights.qk_eps or 0.0),
            *(self._vector(weights.token_embedding), self._vector(weights.position_embedding)),
            *(cos, sin, gain, shift, self._matrix(*weights.head)),
            ctypes.cast(layers, ctypes.POINTER(Layer)),
        )

    def current_versions(self) -> list[int]:
        return [p._version for p in self.parameters]

    def current_digest(self) -> list[tuple[int, int]]:
        """Tell the values apart, also where a write to `.data` left the version as it was."""
        return [
            (p.data_ptr(), self.kernel.charlm_digest(p.data_ptr(), p.numel() * p.element_size()))
            for p in self.parameters
        ]

    def _vector(self, values: Tensor | None) -> int | None:
        if values is None:
            return None
        self._kept.append(values.detach().float().contiguous().clone())
        return self._kept[-1].data_ptr()

    def _matrix(self, weights: Tensor, bias: Tensor | None) -> Matrix:
        """Pack an (N, K) matrix: panels of 64 outputs, in each the K inputs one after the other."""
        N, K = weights.shape
        columns = _wider(weights.detach(), 0, _padded(N)).t()  # (K, Np)
        panels = [panel.contiguous().flatten() for panel in columns.split(_PANEL, dim=1)]
        self._kept.append(torch.cat(panels))
        pointer = self._kept[-1].data_ptr()
        return Matrix(
            pointer, self._vector(None if bias is None else _wider(bias, 0, _padded(N))), K, _padded(N)
        )


_packed: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()
_packing = Lock()


def fast_state(
    model: nn.Module, weights: Callable[[], DecoderWeights], rows: int, overflow: Overflow
) -> FastState | None:
    """Return a state of a model that it applies to, or None.

    Args:
        model: whose parameters all belong to `weights`; they are watched for changes.
        weights: called when they have to be packed.
        rows: B.
        overflow: what happens past the model's window.
    """
    kernel = library()
    parameters = list(model.parameters())
    first = parameters[0]
    if (
        kernel is None
        or first.dtype not in {torch.float32, torch.bfloat16}
        or any(p.device.type != "cpu" or p.dtype != first.dtype or not p.is_contiguous() for p in parameters)
        or any(p.is_inference() for p in parameters)
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    source = _Source(model, weights, kernel)
    source.refresh()
    return FastState(source, rows, overflow)


@dataclass
class _Source:
    """Gives the packed weights of a model, packed anew when they have changed."""

    model: nn.Module
    weights: Callable[[], DecoderWeights]
    kernel: ctypes.CDLL
    packed: _Packed = field(init=False)

    def refresh(self) -> None:
        """Look at all values."""
        with _packing:
            packed = _packed.get(self.model)
            if packed is None or packed.current_digest() != packed.digest or not self._same(packed):
                packed = _Packed(self.kernel, self.weights(), list(self.model.parameters()))
                _packed[self.model] = packed
            packed.versions = packed.current_versions()
            self.packed = packed

    def _same(self, packed: _Packed) -> bool:
        now = list(self.model.parameters())
        return len(now) == len(packed.parameters) and all(map(operator.is_, now, packed.parameters))


class FastState(PredictionState):
    """See the head of this file. `LanguageModel.new_state` makes it where it applies.

    Args:
        source: the weights.
        rows: B.
        overflow: what happens past the model's window.
    """

    def __init__(self, source: _Source, rows: int, overflow: Overflow) -> None:
        super().__init__(rows, source.packed.block_size, overflow)
        self._source = source
        model = source.packed.model
        self._V = model.V
        self._ids = np.zeros((rows, _PANEL), np.int64)
        # For each row: ids observed, where its context begins, ids read, the position that `next` predicts,
        # and where in the window the next id to be read stands.
        self._counters = np.zeros((5, rows), np.int64)
        self._length, self._begin, self._read, self._known, self._place = self._counters
        self._next: NDArray[np.float32] = np.zeros((rows, model.Vp), np.float32)
        self._keys = np.zeros((model.n_layer, rows, model.H, 0, model.D, _PANEL), np.float32)
        self._values = np.zeros((model.n_layer, rows, model.H, 0, model.Dp), np.float32)
        self._steady = 0  # for how many more passes each row reads one id of one context
        self._prepare()

    def _prepare(self) -> None:
        """Set up what every single step uses."""
        rows = self.rows
        self._all = np.arange(rows + 1)
        self._chosen = np.zeros(rows, np.int64)
        self._uniform = np.zeros(rows)
        self._options: SamplingOptions | None = None  # those that `choice` says
        self._choice = Choice()
        self._scratch = np.zeros(2 * self._V)  # of the choice
        self._work = np.zeros(0, np.float32)
        self._pass = Pass()

    def _room(self, positions: int) -> None:
        """Make the caches hold so many positions of each row."""
        m = self._source.packed.model
        old = self._keys.shape[3]
        panels = max(-(-positions // _PANEL), min(2 * old, -(-self._source.packed.block_size // _PANEL)))
        keys = np.zeros((m.n_layer, self.rows, m.H, panels, m.D, _PANEL), np.float32)
        values = np.zeros((m.n_layer, self.rows, m.H, panels * _PANEL, m.Dp), np.float32)
        keys[:, :, :, :old] = self._keys
        values[:, :, :, : old * _PANEL] = self._values
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
        wanted = np.arange(self.rows) if rows is None else np.array(rows, np.int64)
        twin = object.__new__(type(self))
        PredictionState.__init__(twin, len(wanted), self._block_size, self._overflow)
        twin._source, twin._V, twin._steady = self._source, self._V, 0
        twin._ids, twin._counters, twin._next = (
            self._ids[wanted],
            self._counters[:, wanted],
            self._next[wanted],
        )
        twin._length, twin._begin, twin._read, twin._known, twin._place = twin._counters
        twin._keys, twin._values = self._keys[:, wanted], self._values[:, wanted]
        twin._prepare()
        return twin

    @override
    def _add(self, ids: Tensor | Sequence[Tensor]) -> None:
        for row, new in enumerate(ids):
            if len(new):
                self._append(row, new.numpy())
        self._steady = 0

    def _append(self, row: int, new: NDArray[np.int64]) -> None:
        if new.min() < 0 or new.max() >= self._V:
            wrong = int(new[(new < 0) | (new >= self._V)][0])
            raise InputError(f"ids must be from 0 to {self._V - 1} (vocab_size {self._V}), got {wrong}")
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
    def _logits(self, spans: Sequence[range]) -> list[Tensor]:
        self._steady = 0
        found = [np.empty((len(span), self._V), np.float32) for span in spans]
        self._look_for_changes()
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
    def advance(self, options: SamplingOptions, addresses: Sequence[int]) -> Tensor:
        if options.filters:
            return super().advance(options, addresses)
        if self._steady:
            self._step()
        else:
            self._settle()
        if options is not self._options:
            self._options = options
            self._choice = Choice(
                options.temperature, options.top_p or 1.0, options.min_p or 0.0, options.top_k or self._V
            )
        if options.temperature:
            self._uniform[:] = uniforms(options.seed or 0, addresses, self._length.tolist())
        scratch = self._scratch.ctypes.data
        row = self._source.kernel.charlm_choose(
            *(self._next.ctypes.data, self.rows, self._V, self._next.shape[1], self._choice),
            *(self._uniform.ctypes.data, self._chosen.ctypes.data, scratch, scratch + 8 * self._V),
        )
        if row >= 0:
            raise nothing_to_draw(row, float(self._next[row, : self._V].max()))
        self._ids[self._all[:-1], self._length] = self._chosen
        self._length += 1
        return torch.from_numpy(self._chosen.copy())

    def _settle(self) -> None:
        """Read all there is, and see how long single steps can follow."""
        self._check_begun()
        self._logits([range(length, length + 1) for length in self.lengths])
        end = self._begin + self._source.packed.block_size  # the last position with this context
        room = self._begin + self._values.shape[3]
        self._steady = int((np.minimum(end, room) - self._length).min())
        self._widen(int(self._length.max()) + max(self._steady, 0) + 1)
        self._place[:] = self._length - self._begin
        work = self._fill(self._pass, self.rows, self.rows, self.rows)
        for name, array in (
            *(("begin", self._all), ("slot", self._all), ("id", self._chosen), ("position", self._place)),
            *(("want", self._all), ("logits", self._next), ("work", work)),
        ):
            setattr(self._pass, name, array.ctypes.data)

    def _step(self) -> None:
        """Read the ids that were just chosen."""
        self._steady -= 1
        self._look_for_changes()
        packed = self._source.packed
        packed.kernel.charlm_pass(packed.model, self._pass)
        self._counters[2:] += 1  # read, known, place

    def _look_for_changes(self) -> None:
        if self._source.packed.current_versions() != self._source.packed.versions:
            self._source.refresh()

    def _start(self, position: int) -> int:
        return context_start(position, self._block_size, self._overflow)


def _padded(width: int) -> int:
    return -(-width // 16) * 16


def _wider(values: Tensor, dim: int, width: int) -> Tensor:
    """Pad one dimension with zeros."""
    missing = width - values.size(dim)
    return F.pad(values, [0, 0] * (values.ndim - 1 - dim) + [0, missing])
