"""`NativeGPT`: a `TorchEngine` in C for a small GPT on a CPU, with one native call for each id.

PyTorch needs a few microseconds for each of a hundred operations per token; the whole arithmetic of a small
model needs less. `kernel.c` computes a whole pass and the choice of the next id in one call. It reads weights
of 32, 16 and 8 bits. With 16 or 8, it keeps keys and values in 16 bits. `gpt_engine` decides whether it
applies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn
from typing_extensions import override

from charlm.backends.traits import is_host
from charlm.generation.options import SamplingOptions
from charlm.generation.passes import Pass
from charlm.generation.sampling import nothing_to_draw
from charlm.native.engine import NativeEngine
from charlm.native.library import ModelStruct, PassStruct, library, why_no_library
from charlm.native.storage import STORAGES
from charlm.native.untouched import first_change, hooks_on_all_modules
from charlm.native.weights import PANEL, Rotary, Weights

if TYPE_CHECKING:
    from charlm.generation.state import PredictionState
    from charlm.models.gpt import GPT

__all__ = ["NativeGPT", "gpt_engine", "why_not_gpt"]

_LONGEST = 65_536  # positions whose angles are kept
_AT_ONCE = 1024  # ids in one call, which bounds the work space
_WORTH_A_THREAD = 200_000  # multiplications: about 10 microseconds of one thread
_ONE_CALL = 200_000_000  # multiplications: some 10 milliseconds, after which Python may handle a signal


def gpt_engine(model: GPT, rows: int, rotary: Rotary) -> NativeGPT | None:
    """Return an engine for a model, or None if it does not apply.

    Args:
        model: of the class `GPT` itself.
        rows: B.
        rotary: returns the angles of the positions, if they are rotary.
    """
    kernel = library()
    if kernel is None or why_not_gpt(model) is not None:
        return None
    return NativeGPT(Weights(kernel, model, rotary), model.block_size, rows)


def why_not_gpt(model: GPT) -> str | None:
    """Return the reason why the compiled engine does not apply to a model, or None if it does."""
    first, *others = parameters = list(model.parameters())
    if (reason := why_no_library()) is not None:
        return reason
    if any(not is_host(p.device) for p in parameters):
        return f"the model lies on {next(p.device for p in parameters if not is_host(p.device))}"
    if first.dtype not in {torch.float32, torch.bfloat16} or any(p.dtype != first.dtype for p in others):
        return f"its weights are {first.dtype}, and not all float32 or all bfloat16"
    # Not a substitute of a tensor, such as a quantised one.
    if any(type(p) is not nn.Parameter or p.is_inference() or not p.is_contiguous() for p in parameters):
        return "a weight is no plain tensor, contiguous and made outside of inference mode"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return "the call is inside a transform"
    if model.block_size > _LONGEST:
        return f"its window is longer than {_LONGEST:,}"
    if (change := hooks_on_all_modules()) is not None:
        return change
    if (part := first_change(model, model.config)) is not None:
        return f"a part of the model was changed: {part}"
    return None


class _Caches:
    """Keys and values of the positions of B rows, in the kernel's order, and their addresses.

    Args:
        keys: (n_layer, B, H, panels, D, 64), float32, or the bits of bfloat16 as uint16.
        values: (n_layer, B, H, 64 panels, Dp), likewise.
    """

    def __init__(self, keys: NDArray[Any], values: NDArray[Any]) -> None:
        self.keys, self.values = keys, values
        self.keys_at, self.values_at = keys.ctypes.data, values.ctypes.data
        self.panels: int = keys.shape[3]
        self.positions: int = PANEL * self.panels
        self.are_half = keys.dtype == np.uint16

    @classmethod
    def empty(cls, sizes: ModelStruct, rows: int, panels: int, dtype: DTypeLike) -> _Caches:
        L, H, D, Dp = sizes.n_layer, sizes.H, sizes.D, sizes.Dp
        keys = np.zeros((L, rows, H, panels, D, PANEL), dtype)
        return cls(keys, np.zeros((L, rows, H, PANEL * panels, Dp), dtype))


class NativeGPT(NativeEngine):
    """The engine; see the docstring of the module.

    Args:
        weights: of the model.
        block_size: the model's window.
        rows: B.
    """

    def __init__(self, weights: Weights, block_size: int, rows: int) -> None:
        sizes = weights.packed.struct
        super().__init__(weights.kernel, rows, vocab_size=sizes.V, block_size=block_size)
        self._weights = weights
        self._window = block_size
        kept = np.float32 if STORAGES[sizes.storage] == "float32" else np.uint16
        self._caches = _Caches.empty(
            sizes, rows, 0, kept
        )  # of one type, also if the weights leave their grid
        self._work = torch.empty(0, dtype=torch.float32, device="cpu")
        # Arguments of all single steps.
        self._one_each = np.arange(rows + 1)  # begins, rows and outputs of a step with one id for each row
        self._ids = np.zeros(rows, np.int64)  # the last id of each row, which is read next
        self._before = np.zeros((rows, sizes.earlier), np.int64)  # the ids before it, nearest first
        self._places = np.zeros(rows, np.int64)  # its place in the window
        self._logits = torch.empty(rows, sizes.Vp, dtype=torch.float32, device="cpu")
        self._uniforms = np.zeros(0)
        self._uniforms_at = 0
        self._step = PassStruct()

    @override
    def fork(self, rows: Sequence[int]) -> Self:
        twin = type(self)(self._weights, self._window, len(rows))
        # take, because the kernel needs rows in order, and indexing may return another memory layout.
        old = self._caches
        twin._caches = _Caches(old.keys.take(rows, axis=1), old.values.take(rows, axis=1))
        return twin

    @override
    def logits(self, texts: NDArray[np.int64], passes: Sequence[Pass]) -> list[Tensor]:
        self._weights.refresh()
        found: list[list[Tensor]] = [[] for _ in passes]
        for parts in _in_parts(passes):  # mostly one, with all of every pass
            logits = self._read(texts, [part for _, part in parts])  # (all that is wanted, V)
            at = 0
            for number, part in parts:
                found[number].append(logits[at : at + part.wanted])
                at += part.wanted
        return [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in found]

    def _read(self, texts: NDArray[np.int64], passes: Sequence[Pass]) -> Tensor:
        """Do some passes in one call, and return their requested logits in order."""
        counts = [one.stop - one.start for one in passes]
        begin = np.cumsum([0, *counts])  # (B + 1,), where each row's ids begin among all
        slot = np.array([one.row for one in passes])
        rows = slot.repeat(counts)  # (n,)
        positions = np.concatenate([np.arange(one.start, one.stop) for one in passes])  # (n,)
        ids = texts[rows, positions]
        places = positions - np.array([one.begin for one in passes]).repeat(counts)
        want = np.concatenate(
            [np.arange(end - one.wanted, end) for one, end in zip(passes, begin[1:], strict=True)]
        )
        Vp = self._weights.packed.struct.Vp
        logits = torch.empty(len(want), Vp, dtype=torch.float32, device="cpu")
        self._make_room(int(places.max()) + 1)
        before = self._ids_before(texts, rows, positions, places)
        one_call = self._call(
            begin=begin, slot=slot, ids=ids, before=before, places=places, want=want, logits=logits
        )
        self._kernel.charlm_pass(self._weights.packed.struct, one_call)
        return logits[:, : self.vocab_size]

    @override
    def turn(
        self, state: PredictionState, options: SamplingOptions, addresses: Sequence[int]
    ) -> Tensor | None:
        return self.turns(state, options, addresses, 1)

    @override
    def turns(
        self, state: PredictionState, options: SamplingOptions, addresses: Sequence[int], most: int
    ) -> Tensor | None:
        if not self._knows(state, options):
            return None
        if not state.steps_left and not self._set_up(state):
            return None
        left, state.steps_left = state.steps_left, 0  # until all has gone well: an interrupt may come
        self._weights.refresh()
        packed, B, count = self._weights.packed, self.rows, min(most, left, self.at_once)
        places = [n + turn for turn in range(count) for n in state.lengths]
        uniforms = options.uniforms([*addresses] * count, places)  # (count B,)
        if uniforms is not None and len(uniforms) > len(self._uniforms):
            self._uniforms, self._uniforms_at = uniforms, uniforms.ctypes.data
        elif uniforms is not None:
            self._uniforms[: len(uniforms)] = uniforms  # whose address is known
        chosen = torch.empty(count * B, dtype=torch.int64, device="cpu")
        done: int = self._kernel.charlm_turns(
            *(packed.struct, self._step, self._choice_of(options), self._walk_of(state)),
            *(None if uniforms is None else self._uniforms_at, count, chosen.data_ptr()),
        )
        if done == 0:
            row = int((chosen[:B] < 0).nonzero()[0])
            raise nothing_to_draw(row, float(self._logits[row, : self.vocab_size].max()))
        # Of a single turn no tensor is asked again: after a pass each such call takes some microseconds.
        state.took(self._ids if count == 1 else chosen.numpy()[: done * B])
        state.steps_left = left - done if done == count else 0
        return self._walked(state, done, chosen if count == 1 else chosen[: done * B])

    def refresh(self) -> None:
        """Pack the weights again if they were changed."""
        self._weights.refresh()

    @property
    def sizes(self) -> ModelStruct:
        """The model, for C."""
        return self._weights.packed.struct

    @property
    def step(self) -> PassStruct:
        """The arguments of single steps, for C, once they are prepared."""
        return self._step

    @property
    def at_once(self) -> int:
        """The largest number of turns in one call, after which Python can handle a signal."""
        return 1 + _ONE_CALL // (self.rows * self._weights.packed.multiplications)

    def _set_up(self, state: PredictionState) -> bool:
        """Prepare single steps, and return whether the next turn is one."""
        if (steps := state.single_steps()) is None:
            return False
        state.steps_left = self.prepare(state, *steps)
        return True

    def prepare(self, state: PredictionState, places: NDArray[np.int64], turns: int) -> int:
        """Prepare single steps, and return how many can be made.

        Args:
            state: its last ids are read next.
            places: (B,) the places of these ids in the window.
            turns: the number of turns that fit into the window.
        """
        most = int(places.max())
        self._make_room(most + 1)
        self._places[:] = places
        last = np.array(state.lengths) - 1
        self._ids[:] = state.texts[self._one_each[:-1], last]
        self._before[:] = self._ids_before(state.texts, self._one_each[:-1], last, places)
        self._step = self._call(
            begin=self._one_each,
            slot=self._one_each,
            ids=self._ids,
            before=self._before,
            places=self._places,
            want=self._one_each[:-1],
            logits=self._logits,
        )
        return min(turns, self._caches.positions - most)

    def _ids_before(
        self,
        texts: NDArray[np.int64],
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        places: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Return the ids (n, earlier) before some positions of the texts, or -1 outside the window."""
        back = np.arange(1, self._before.shape[1] + 1)
        found = texts[rows[:, None], np.maximum(positions[:, None] - back, 0)]
        return np.where(back <= places[:, None], found, -1)

    def _make_room(self, positions: int) -> None:
        """Enlarge the caches to a number of positions for each row."""
        old = self._caches
        if positions <= old.positions:
            return
        panels = max(-(-positions // PANEL), min(2 * old.panels, -(-self._window // PANEL)))
        new = _Caches.empty(self._weights.packed.struct, self.rows, panels, old.keys.dtype)
        new.keys[:, :, :, : old.panels] = old.keys
        new.values[:, :, :, : old.positions] = old.values
        self._caches = new

    def _call(
        self,
        *,
        begin: NDArray[np.int64],
        slot: NDArray[np.int64],
        ids: NDArray[np.int64],
        before: NDArray[np.int64],
        places: NDArray[np.int64],
        want: NDArray[np.int64],
        logits: Tensor,
    ) -> PassStruct:
        """Return the arguments of one pass for the kernel, with pointers to these arrays."""
        packed, caches, n = self._weights.packed, self._caches, len(ids)
        threads = min(torch.get_num_threads(), 1 + n * packed.multiplications // _WORTH_A_THREAD)
        needed = self._kernel.charlm_work(packed.struct, n, threads, caches.positions)
        if needed > len(self._work):
            self._work = torch.empty(needed, dtype=torch.float32, device="cpu")
        return PassStruct(
            B=len(begin) - 1,
            n=n,
            wanted=len(want),
            threads=threads,
            capacity=caches.positions,
            begin=begin.ctypes.data,
            slot=slot.ctypes.data,
            id=ids.ctypes.data,
            before=before.ctypes.data,
            position=places.ctypes.data,
            want=want.ctypes.data,
            keys=caches.keys_at,
            values=caches.values_at,
            slots=self.rows,
            half=caches.are_half,
            logits=logits.data_ptr(),
            work=self._work.data_ptr(),
        )


def _in_parts(passes: Sequence[Pass]) -> Iterator[list[tuple[int, Pass]]]:
    """Split passes into calls of at most 1,024 ids; yield the parts of each call with their pass's number."""
    parts: list[tuple[int, Pass]] = []
    left = _AT_ONCE
    for number, whole in enumerate(passes):
        start = whole.start
        while start < whole.stop:
            stop = min(whole.stop, start + left)
            part = whole
            if stop - start < whole.stop - whole.start:
                wanted = max(stop - max(start, whole.stop - whole.wanted), 0)
                part = whole._replace(start=start, stop=stop, wanted=wanted)
            parts.append((number, part))
            left -= stop - start
            start = stop
            if not left:
                yield parts
                parts, left = [], _AT_ONCE
    if parts:
        yield parts
