"""`NativeMixture`: the compiled engines of several models, and their mixture in C."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from charlm.generation.options import SamplingOptions
from charlm.generation.passes import Pass, context_start, plan_passes
from charlm.generation.sampling import nothing_to_draw
from charlm.native.engine import NativeEngine
from charlm.native.gpt import NativeGPT
from charlm.native.library import library
from charlm.native.ngram import NativeNGram
from charlm.native.untouched import has_its_own_forward, hooks_on_all_modules

if TYPE_CHECKING:
    from charlm.generation.state import PredictionState
    from charlm.models.base import LanguageModel
    from charlm.models.mixture import MixtureLM

__all__ = ["NativeMixture", "mixture_engine", "why_not_mixture"]


def mixture_engine(model: MixtureLM, members: Sequence[LanguageModel], rows: int) -> NativeMixture | None:
    """Return an engine for a mixture, or None if it does not apply.

    Args:
        model: of the class `MixtureLM` itself.
        members: its members.
        rows: B.
    """
    kernel = library()
    if kernel is None or why_not_mixture(model, members) is not None:
        return None
    engines = [engine for m in members if isinstance(engine := m._native_engine(rows), NativeEngine)]
    return NativeMixture(kernel, model, engines, rows) if len(engines) == len(members) else None


def why_not_mixture(model: MixtureLM, members: Sequence[LanguageModel]) -> str | None:
    """Return the reason why the compiled engine does not apply to a mixture, or None if it does."""
    reasons = [reason for member in members if (reason := member.why_not_native()) is not None]
    if reasons or (change := hooks_on_all_modules()) is not None:
        return reasons[0] if reasons else change
    hooked = model._forward_hooks or model._forward_pre_hooks
    if hooked or "forward" in vars(model) or not has_its_own_forward(type(model)):
        return "a part of the model was changed: the model itself"
    return None


class NativeMixture(NativeEngine):
    """Mixes the predictions of the members' engines.

    Args:
        kernel: the compiled library.
        model: the mixture; its gate is read.
        engines: of the members, for the same rows.
        rows: B.
    """

    def __init__(
        self, kernel: ctypes.CDLL, model: MixtureLM, engines: Sequence[NativeEngine], rows: int
    ) -> None:
        super().__init__(kernel, rows, vocab_size=model.vocab_size, block_size=None)
        self._model = model
        self._engines = engines
        self._read = [[range(0)] * rows for _ in engines]  # positions that each has read of each row
        self._is_pair = [type(engine) for engine in engines] == [
            NativeGPT,
            NativeNGram,
        ]  # then all is done in C
        self._room = torch.empty(8 * model.vocab_size, dtype=torch.float32, device="cpu")

    @override
    def fork(self, rows: Sequence[int]) -> Self:
        engines = [engine.fork(rows) for engine in self._engines]
        twin = type(self)(self._kernel, self._model, engines, len(rows))
        twin._read = [[read[row] for row in rows] for read in self._read]
        return twin

    @override
    def logits(self, texts: NDArray[np.int64], passes: Sequence[Pass]) -> list[Tensor]:
        pairs = zip(self._engines, self._read, strict=True)
        said = [_member_logits(engine, read, texts, passes) for engine, read in pairs]
        return [self._mixed(one) for one in zip(*said, strict=True)]

    @override
    def turns(
        self, state: PredictionState, options: SamplingOptions, addresses: Sequence[int], most: int
    ) -> Tensor | None:
        if (
            not self._knows(state, options)
            or not self._is_pair
            or (not state.steps_left and not self._set_up(state))
        ):
            return None
        gpt, ngram = cast("tuple[NativeGPT, NativeNGram]", tuple(self._engines))
        left, state.steps_left = state.steps_left, 0  # until all has gone well
        known, self._read[0] = self._read[0], [range(0)] * self.rows
        gpt.refresh()
        lengths, count = state.lengths, min(most, left, gpt.at_once)
        uniforms = options.uniforms(
            [*addresses] * count, [n + turn for turn in range(count) for n in lengths]
        )
        chosen = torch.empty(count * self.rows, dtype=torch.int64, device="cpu")
        texts, weights = state.widened(max(lengths) + count), self._weights()
        done: int = self._kernel.charlm_mixed_turns(
            *(gpt.sizes, gpt.step, ngram.tables(), weights.data_ptr()),
            (ctypes.c_void_p * self.rows)(
                *(texts.ctypes.data + row * texts.strides[0] for row in range(self.rows))
            ),
            (ctypes.c_int64 * self.rows)(*lengths),
            *(self._choice_of(options), self._walk_of(state)),
            *(None if uniforms is None else uniforms.ctypes.data, count),
            *(chosen.data_ptr(), self._room.data_ptr()),
        )
        if done == 0:
            raise nothing_to_draw(int((chosen[: self.rows] < 0).nonzero()[0]), float("nan"))
        state.took(chosen.numpy()[: done * self.rows])
        self._read[0] = [range(read.start, read.stop + done) for read in known]
        state.steps_left = left - done if done == count else 0
        return self._walked(state, done, chosen[: done * self.rows])

    def _set_up(self, state: PredictionState) -> bool:
        """Prepare single steps of the GPT, and return whether the next turn is one."""
        gpt = cast("NativeGPT", self._engines[0])
        window = gpt.block_size or 1
        for read, n in zip(self._read[0], state.lengths, strict=True):
            if read.stop != n - 1 or read.start != context_start(n, window, "restart"):
                return False
        places = np.array([len(read) for read in self._read[0]])
        state.steps_left = gpt.prepare(state, places, int(window - places.max()))
        return True

    def _weights(self) -> Tensor:
        """Return the gate's weights, (J, K + 1)."""
        return self._model.gate.detach().float().softmax(dim=-1)

    def _mixed(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the logarithms of the mixed probabilities, (t, V), from each member's logits (t, V)."""
        logits = [z if z.stride(1) == 1 else z.contiguous() for z in logits]
        K, (t, V) = len(logits), logits[0].shape
        weights = self._weights()
        mixed = torch.empty(t, V, dtype=torch.float32, device="cpu")
        work = torch.empty(K, V, dtype=torch.float32, device="cpu")
        self._kernel.charlm_mix(
            *(K, t, V),
            (ctypes.c_void_p * K)(*(z.data_ptr() for z in logits)),
            (ctypes.c_int64 * K)(*(z.stride(0) for z in logits)),
            *(weights.data_ptr(), work.data_ptr(), mixed.data_ptr()),
        )
        return mixed


def _member_logits(
    engine: NativeEngine, read: list[range], texts: NDArray[np.int64], passes: Sequence[Pass]
) -> list[Tensor]:
    """Return the logits of a member for some passes. Past its window, it restarts, as in reading."""
    if engine.block_size is None:
        return engine.logits(texts, passes)
    spans, known = [range(0)] * engine.rows, list(read)
    for one in passes:
        spans[one.row] = range(one.stop + 1 - one.wanted, one.stop + 1)
        known[one.row] = range(read[one.row].start, min(read[one.row].stop, one.start))
        read[one.row] = range(0)  # until all has gone well
    by_row: dict[int, list[Tensor]] = {one.row: [] for one in passes}
    for some in plan_passes(spans, known, engine.block_size, "restart"):
        for one, logits in zip(some, engine.logits(texts, some), strict=True):
            by_row[one.row].append(logits)
            read[one.row] = range(one.begin, one.stop)
    return [torch.cat(by_row[one.row]) for one in passes]
