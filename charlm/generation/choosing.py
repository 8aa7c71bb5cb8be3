"""`Chooser`: the choice of ids inside `kernel.c`, which spares a dozen of PyTorch's calls for each of them.

It does what `SamplingOptions.filter` and `sample` do, but for the caller's own filters.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from charlm.generation.native import Choice
from charlm.generation.options import SamplingOptions
from charlm.generation.sampling import nothing_to_draw
from charlm.randomness import uniforms

__all__ = ["Chooser"]


class Chooser:
    """Chooses ids from logits. Belongs to one state.

    Args:
        kernel: the compiled `kernel.c`.
        vocab_size: V.
    """

    def __init__(self, kernel: ctypes.CDLL, vocab_size: int) -> None:
        self._kernel = kernel
        self._V = vocab_size
        self._scratch = np.zeros(2 * vocab_size)  # candidates and weights
        self._places = self._scratch.ctypes.data, self._scratch.ctypes.data + 8 * vocab_size
        # Asking numpy for an address takes as long as the choice itself: those of the last call are kept.
        self._logits: NDArray[np.float32] | None = None
        self._out: NDArray[np.int64] | None = None
        self._logits_at = self._out_at = 0
        self._options: SamplingOptions | None = None  # those that `choice` says
        self._choice = Choice()

    def __call__(
        self,
        logits: NDArray[np.float32],
        options: SamplingOptions,
        addresses: Sequence[int],
        positions: Sequence[int],
        out: NDArray[np.int64],
    ) -> int:
        """Choose an id for each row.

        Args:
            logits: (n, V or more), contiguous.
            options: without filters.
            addresses: (n,) of the rows' random numbers.
            positions: (n,) of the ids.
            out: (n,) gets them.

        Returns:
            The first row in which nothing can be chosen, where the work ended; n if there is none.
        """
        if options is not self._options:
            self._options = options
            self._choice = Choice(
                options.temperature,
                options.top_p or 1.0,
                options.min_p or 0.0,
                min(options.top_k or self._V, self._V),
            )
        numbers = uniforms(options.seed or 0, addresses, positions) if options.temperature else None
        if logits is not self._logits:
            self._logits, self._logits_at = logits, logits.ctypes.data
        if out is not self._out:
            self._out, self._out_at = out, out.ctypes.data
        failed: int = self._kernel.charlm_choose(
            *(self._logits_at, len(logits), self._V, logits.shape[1], self._choice),
            *(None if numbers is None else numbers.ctypes.data, self._out_at, *self._places),
        )
        return len(logits) if failed < 0 else failed

    def all(
        self,
        logits: NDArray[np.float32],
        options: SamplingOptions,
        addresses: Sequence[int],
        positions: Sequence[int],
        out: NDArray[np.int64],
    ) -> None:
        """Do the same, for all rows.

        Raises:
            NonFiniteError: in a row nothing can be chosen.
        """
        row = self(logits, options, addresses, positions, out)
        if row < len(logits):
            raise nothing_to_draw(row, float(logits[row, : self._V].max()))
