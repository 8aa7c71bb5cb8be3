"""`NativeEngine`: the base of the compiled engines, with the choice of ids in C.

It replaces a dozen calls of PyTorch for each id. It does the same as `SamplingOptions.filter` and `sample`,
except for bans, the repetition penalty and the caller's own filters.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from charlm.backends.traits import is_host
from charlm.errors import InputError, shown
from charlm.generation.engine import Engine
from charlm.generation.options import SamplingOptions
from charlm.generation.sampling import nothing_to_draw
from charlm.native.library import ChoiceStruct, WalkStruct
from charlm.patterns.automaton import Automaton

if TYPE_CHECKING:
    from charlm.generation.state import PredictionState

__all__ = ["NativeEngine"]


class NativeEngine(Engine):
    """Base of the engines on a CPU whose logits are float32.

    Args:
        kernel: the compiled library.
        rows: B.
        vocab_size: V.
        block_size: the largest number of ids in a context; None: no limit.
    """

    def __init__(self, kernel: ctypes.CDLL, rows: int, *, vocab_size: int, block_size: int | None) -> None:
        super().__init__(rows, vocab_size=vocab_size, block_size=block_size, device=torch.device("cpu"))
        self._kernel = kernel
        self._scratch = torch.empty(2 * vocab_size, dtype=torch.float64, device="cpu")
        # Work space of the C functions: V weights, and V candidates of the same size.
        self._scratch_at = self._scratch.data_ptr(), self._scratch.data_ptr() + 8 * vocab_size
        self._options: SamplingOptions | None = None  # those of `choice`
        self._choice = ChoiceStruct()
        self._automaton: Automaton | None = None  # that of `walk`
        self._walk = WalkStruct()
        self._states = np.zeros(rows, np.int32)  # where `walk` has them

    def _choice_of(self, options: SamplingOptions) -> ChoiceStruct:
        """Return the options without filters, for the C functions."""
        if options is not self._options:
            self._options = options
            self._choice = ChoiceStruct(
                temperature=options.temperature,
                top_p=options.top_p or 1.0,
                min_p=options.min_p or 0.0,
                top_k=min(options.top_k or self.vocab_size, self.vocab_size),
            )
        return self._choice

    def _knows(self, state: PredictionState, options: SamplingOptions) -> bool:
        """Return whether the C functions support all parts of the choice."""
        return not options.filters_by_itself and (
            state.walk is None or type(state.walk.constraint) is Automaton
        )

    def _walk_of(self, state: PredictionState) -> WalkStruct | None:
        """Return the automaton for the C functions, or None if there is none."""
        if state.walk is None:
            return None
        automaton = state.walk.constraint
        if isinstance(automaton, Automaton) and automaton is not self._automaton:
            self._automaton = automaton
            tables = automaton.column, automaton.next, automaton.distance, self._states
            column, after, distance, states = (table.ctypes.data for table in tables)
            self._walk = WalkStruct(column=column, next=after, distance=distance, state=states)
            self._walk.K = automaton.next.shape[1]
        self._walk.left = state.walk.left
        self._states[:] = [at or 0 for at in state.walk.states]
        return self._walk

    def _walked(self, state: PredictionState, turns: int, ids: Tensor) -> Tensor:
        """Add finished turns to the walk; return their ids (t B,), -1 for a row whose text ends."""
        if state.walk is not None:
            state.walk.moved(turns, self._states.tolist(), none_ends=self._walk.ends == 0)
            if self._walk.ends:
                ids[-self.rows :][torch.from_numpy(self._states) < 0] = -1
        return ids

    @override
    def choose(
        self, logits: Tensor, options: SamplingOptions, uniforms: NDArray[np.float64] | None
    ) -> Tensor:
        return self._chosen(logits, options, uniforms, None)

    def _chosen(
        self,
        logits: Tensor,
        options: SamplingOptions,
        uniforms: NDArray[np.float64] | None,
        walk: WalkStruct | None,
    ) -> Tensor:
        """Choose as `choose` does, in a walk. This changes the logits."""
        logits, n, V = logits.contiguous(), logits.shape[0], self.vocab_size
        if logits.dtype != torch.float32 or logits.shape != (n, V) or not is_host(logits.device):
            raise InputError(f"logits must be float32 of shape (n, {V}) on the CPU, got {shown(logits)}")
        chosen = torch.empty(n, dtype=torch.int64, device="cpu")
        uniforms_at = None if uniforms is None else uniforms.ctypes.data
        row: int = self._kernel.charlm_choose(
            *(logits.data_ptr(), n, V, V),
            *(self._choice_of(options), walk, uniforms_at, chosen.data_ptr(), *self._scratch_at),
        )
        if row >= 0:
            raise nothing_to_draw(row, float(logits[row].max()))
        return chosen
