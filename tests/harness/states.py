"""Prediction states of every kind of model, for tests of what all of them promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from harness.drawn_models import mixed, random_rows
from harness.own_model import Recurrent
from harness.tiny_models import MODELS, tiny_config, tiny_gpt
from torch import Tensor

from charlm import BlockDataset, NGramLM
from charlm.generation import Overflow, PredictionState, Predictor, TorchEngine
from charlm.models import ops
from charlm.models.base import LanguageModel

__all__ = [
    "ROWS",
    "STATES",
    "keys_and_values_in_bfloat16",
    "state_of",
    "tensors",
    "tolerance_of",
    "torch_state",
]

F64 = torch.float64

STATES: dict[str, Callable[[], LanguageModel]] = {
    "plain": lambda: tiny_gpt(tiny_config(block_size=8), dtype=F64),
    "rotary": lambda: tiny_gpt(tiny_config("cpu-10s", block_size=8), dtype=F64),
    "bigram": lambda: MODELS["bigram"](torch.float32),
    "ngram": lambda: NGramLM(13, 4).fit(BlockDataset(random_rows([200])[0], 4)),
    "mixture": lambda: mixed([STATES["fast"](), STATES["ngram"]()]),
    "mixture in float64": lambda: mixed([STATES["plain"](), STATES["ngram"]().double()]),
    "own": lambda: Recurrent(13, 8, keeps_cache=True),
    "own without cache": lambda: Recurrent(13, None, keeps_cache=False),
    "fast": lambda: tiny_gpt(tiny_config(block_size=8)),
    "fast in bfloat16": lambda: tiny_gpt(tiny_config("cpu-10s", block_size=8), dtype=torch.bfloat16),
}
"""A model of each kind by name; the window of those that have one is 8."""

ROWS: list[list[int]] = [row.tolist() for row in random_rows([3, 9, 20])]
"""Three texts, two of them longer than the window."""


def tensors(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return ids (t,) of each row."""
    return [torch.tensor(row, dtype=torch.int64) for row in rows]


def state_of(model: LanguageModel, rows: Sequence[Sequence[int]], **options: Any) -> PredictionState:
    """Return a state that has observed some texts."""
    state = model.new_state(len(rows), **options)
    state.observe(tensors(rows))
    return state


def torch_state(
    model: Predictor, rows: int = 1, *, overflow: Overflow = "slide", use_cache: bool = True
) -> PredictionState:
    """Return a state that asks the model in PyTorch, also where there is a compiled engine."""
    return PredictionState(TorchEngine(model, rows, use_cache=use_cache), overflow=overflow)


@contextmanager
def keys_and_values_in_bfloat16() -> Iterator[None]:
    """Let attention in PyTorch round its keys and values, as the compiled pass does beside narrow weights."""
    heads = ops.heads

    def rounded(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = heads(*args, **options)
        return q, k.bfloat16().to(k.dtype), v.bfloat16().to(v.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "heads", rounded)
        yield


def tolerance_of(model: LanguageModel) -> float:
    """Return by how much logits may differ that were computed in another order."""
    dtypes = {tensor.dtype for tensor in model.state_dict().values()}
    if torch.bfloat16 in dtypes and isinstance(model.new_state().engine, TorchEngine):
        return 0.2  # the fast path computes in float32
    return 1e-9 if F64 in dtypes else 1e-5
