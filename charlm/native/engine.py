"""`NativeEngine`: what the compiled engines share, which is the choice of ids in C.

It spares a dozen of PyTorch's calls for each id, and does what `SamplingOptions.filter` and `sample` do, but
for bans, the penalty of repetition and the caller's own filters.
"""

from __future__ import annotations

import ctypes

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
from charlm.native.library import ChoiceStruct

__all__ = ["NativeEngine"]


class NativeEngine(Engine):
    """Base of the engines on a CPU whose logits are float32.

    Args:
        kernel: the compiled library.
        rows: B.
        vocab_size: V.
        block_size: the most ids that it sees at once; None: no limit.
    """

    def __init__(self, kernel: ctypes.CDLL, rows: int, *, vocab_size: int, block_size: int | None) -> None:
        super().__init__(rows, vocab_size=vocab_size, block_size=block_size, device=torch.device("cpu"))
        self._kernel = kernel
        self._scratch = torch.empty(2 * vocab_size, dtype=torch.float64, device="cpu")
        # Where the C functions work: V weights, and V candidates of the same size.
        self._scratch_at = self._scratch.data_ptr(), self._scratch.data_ptr() + 8 * vocab_size
        self._options: SamplingOptions | None = None  # those of `choice`
        self._choice = ChoiceStruct()

    def _choice_of(self, options: SamplingOptions) -> ChoiceStruct:
        """Return what the C functions are told of options without filters."""
        if options is not self._options:
            self._options = options
            self._choice = ChoiceStruct(
                temperature=options.temperature,
                top_p=options.top_p or 1.0,
                min_p=options.min_p or 0.0,
                top_k=min(options.top_k or self.vocab_size, self.vocab_size),
            )
        return self._choice

    @override
    def choose(
        self, logits: Tensor, options: SamplingOptions, uniforms: NDArray[np.float64] | None
    ) -> Tensor:
        logits, n, V = logits.contiguous(), logits.shape[0], self.vocab_size
        if logits.dtype != torch.float32 or logits.shape != (n, V) or not is_host(logits.device):
            raise InputError(f"logits must be float32 of shape (n, {V}) on the CPU, got {shown(logits)}")
        chosen = torch.empty(n, dtype=torch.int64, device="cpu")
        uniforms_at = None if uniforms is None else uniforms.ctypes.data
        row: int = self._kernel.charlm_choose(
            *(logits.data_ptr(), n, V, V),
            *(self._choice_of(options), uniforms_at, chosen.data_ptr(), *self._scratch_at),
        )
        if row >= 0:
            raise nothing_to_draw(row, float(logits[row].max()))
        return chosen
