"""`NativeNGram`: predictions from the tables of an n-gram model, with one native call for each.

A draft must be much faster than the model, and PyTorch's calls are too slow for that. C reads the tables and
the texts in place, so nothing has to be prepared or kept, and every change is seen. `ngram_engine` decides
whether it applies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from charlm.backends.traits import is_host
from charlm.errors import InputError
from charlm.generation.options import SamplingOptions
from charlm.generation.passes import Pass
from charlm.native.engine import NativeEngine
from charlm.native.library import NGramStruct, library, why_no_library
from charlm.native.untouched import has_its_own_forward, hooks_on_all_modules

if TYPE_CHECKING:
    from charlm.generation.state import PredictionState
    from charlm.models.config import NGramConfig
    from charlm.models.ngram import NGramLM

__all__ = ["NativeNGram", "ngram_engine", "why_not_ngram"]


_Tables = tuple[Tensor, Tensor, Tensor, Tensor]
"""Codes, counts, discounts, and shares of the window."""


def ngram_engine(model: NGramLM, rows: int) -> NativeNGram | None:
    """Return an engine for a model, or None if it does not apply.

    Args:
        model: of the class `NGramLM` itself.
        rows: B.
    """
    kernel = library()
    if kernel is None or why_not_ngram(model) is not None:
        return None
    return NativeNGram(kernel, model, rows)


def why_not_ngram(model: NGramLM) -> str | None:
    """Return the reason why the compiled engine does not apply to a model, or None if it does."""
    if (reason := why_no_library()) is not None:
        return reason
    if (change := hooks_on_all_modules()) is not None:
        return change
    hooked = model._forward_hooks or model._forward_pre_hooks
    if hooked or "forward" in vars(model) or not has_its_own_forward(type(model)):
        return "a part of the model was changed: the model itself"
    if not _readable(_tables_of(model), model.config):
        return "its tables are not as `fit` makes them on a CPU"
    return None


def _readable(tables: _Tables, config: NGramConfig) -> bool:
    codes, counts, discounts, shares = tables
    return (
        (codes.dtype, counts.dtype) == (torch.int64, torch.int32)
        and discounts.dtype == shares.dtype == torch.float32
        and all(is_host(table.device) and table.is_contiguous() for table in tables)
        and codes.shape == counts.shape == (codes.numel(),)
        and discounts.shape == (config.order, 3)
        and shares.shape == (config.window_lengths, 3)
    )


def _tables_of(model: NGramLM) -> _Tables:
    return model.codes, model.counts, model.discounts, model.window_shares


class NativeNGram(NativeEngine):
    """The engine; see the docstring of the module.

    Args:
        kernel: the compiled library.
        model: its tables are read.
        rows: B.
    """

    def __init__(self, kernel: ctypes.CDLL, model: NGramLM, rows: int) -> None:
        super().__init__(kernel, rows, vocab_size=model.vocab_size, block_size=None)
        self._model = model
        self._places: list[tuple[int, torch.Size]] = []  # where they lie
        self._struct = NGramStruct()

    @override
    def fork(self, rows: Sequence[int]) -> Self:
        return type(self)(self._kernel, self._model, len(rows))

    @override
    def logits(self, texts: NDArray[np.int64], passes: Sequence[Pass]) -> list[Tensor]:
        return [self._predict(texts, one.row, one.stop + 1 - one.wanted, one.stop + 1) for one in passes]

    @override
    def turn(
        self, state: PredictionState, options: SamplingOptions, addresses: Sequence[int]
    ) -> Tensor | None:
        if not self._knows(state, options):
            return None
        if not state.steps_left:
            if (steps := state.single_steps()) is None:
                return None
            state.steps_left = steps[1]
        lengths = state.lengths
        logits = [self._predict(state.texts, row, n, n + 1) for row, n in enumerate(lengths)]
        uniforms = options.uniforms(addresses, lengths)
        ids = self._chosen(torch.cat(logits), options, uniforms, self._walk_of(state))
        state.took(ids.numpy())
        state.steps_left -= 1
        return self._walked(state, 1, ids)

    def _predict(self, texts: NDArray[np.int64], row: int, first: int, end: int) -> Tensor:
        """Return log-probabilities (t, V) of the ids of a row at the positions `first` ... `end` - 1."""
        tables = self.tables()
        logits = torch.empty(end - first, self.vocab_size, dtype=torch.float32, device="cpu")
        ids = texts.ctypes.data + row * texts.strides[0]
        self._kernel.charlm_ngrams(tables, ids, first, end, logits.data_ptr())
        return logits

    def tables(self) -> NGramStruct:
        """Return the model's present tables, for C."""
        tables = _tables_of(self._model)
        if [(table.data_ptr(), table.shape) for table in tables] != self._places:  # fitted anew, perhaps
            self._look_at(tables)
        return self._struct

    def _look_at(self, tables: _Tables) -> None:
        """Set the pointers of the structure to tables, and keep references to these."""
        config = self._model.config
        if not _readable(tables, config):
            raise InputError("the tables must keep their types during a generation. Begin a new one.")
        codes, counts, discounts, shares = (table.detach() for table in tables)
        place = torch.empty(config.WINDOW_PLACES, dtype=torch.int64, device="cpu")
        seen = torch.zeros(self.vocab_size, dtype=torch.int64, device="cpu")
        self._struct = NGramStruct(
            V=self.vocab_size,
            M=codes.numel(),
            order=len(discounts),
            window=config.window,
            lengths=len(shares),
            places=len(place),
            codes=codes.data_ptr(),
            counts=counts.data_ptr(),
            discounts=discounts.data_ptr(),
            shares=shares.data_ptr(),
            place=place.data_ptr(),
            seen=seen.data_ptr(),
        )
        self._struct.kept = (
            codes,
            counts,
            discounts,
            shares,
            place,
            seen,
        )  # as long as somebody has the structure
        self._places = [(table.data_ptr(), table.shape) for table in tables]
