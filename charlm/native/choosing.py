"""`Chooser`: the choice of ids in C, which spares a dozen of PyTorch's calls for each of them.

It does what `SamplingOptions.filter` and `sample` do, but for the caller's own filters.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from charlm.generation.options import SamplingOptions
from charlm.generation.sampling import nothing_to_draw
from charlm.native.library import ChoiceStruct

__all__ = ["Chooser"]


class Chooser:
    """Chooses ids from logits. Belongs to one engine.

    Args:
        kernel: the compiled library.
        vocab_size: V.

    Attributes:
        scratch: addresses of two places where the C function works, of V candidates and of V weights.
    """

    def __init__(self, kernel: ctypes.CDLL, vocab_size: int) -> None:
        self._kernel = kernel
        self._V = vocab_size
        self._work = torch.empty(2 * vocab_size, dtype=torch.float64)
        self.scratch: tuple[int, int] = self._work.data_ptr(), self._work.data_ptr() + 8 * vocab_size
        self._options: SamplingOptions | None = None  # those that `choice` says
        self._choice = ChoiceStruct()

    def choice(self, options: SamplingOptions) -> ChoiceStruct:
        """Return what the C function is told of options without filters."""
        if options is not self._options:
            self._options = options
            self._choice = ChoiceStruct(
                temperature=options.temperature,
                top_p=options.top_p or 1.0,
                min_p=options.min_p or 0.0,
                top_k=min(options.top_k or self._V, self._V),
            )
        return self._choice

    def __call__(
        self, logits: Tensor, options: SamplingOptions, numbers: NDArray[np.float64] | None
    ) -> Tensor:
        """Do what `Engine.choose` says.

        Args:
            logits: (n, V) float32.
            options: without filters.
            numbers: (n,) uniform numbers; None: the likeliest id.

        Raises:
            NonFiniteError: in a row nothing can be chosen.
        """
        logits = logits.contiguous()
        chosen = torch.empty(len(logits), dtype=torch.int64)
        at = None if numbers is None else numbers.ctypes.data
        sizes = len(logits), self._V, self._V
        row: int = self._kernel.charlm_choose(
            *(logits.data_ptr(), *sizes, self.choice(options), at, chosen.data_ptr(), *self.scratch)
        )
        if row >= 0:
            raise nothing_to_draw(row, float(logits[row].max()))
        return chosen
