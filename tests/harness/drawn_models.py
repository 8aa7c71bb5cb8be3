"""Models and texts for property tests of generation: strategies that draw them, small and random.

Whatever is drawn is made once: what a model says depends on its settings, type and seed alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from harness.own_model import Recurrent
from harness.tiny_models import ACTIVATIONS, PRESET_NAMES, tiny_config, tiny_gpt
from hypothesis import strategies as st
from torch import Tensor

from charlm import BlockDataset, MixtureLM, NGramLM
from charlm.generation import Overflow
from charlm.models.base import LanguageModel
from charlm.models.bigram import BigramLM
from charlm.models.config import GPTConfig
from charlm.models.gpt import GPT
from charlm.native.library import library
from charlm.native.storage import Storage, round_weights

__all__ = [
    "OVERFLOWS",
    "block_sizes",
    "gpt_configs",
    "gpts",
    "mixed",
    "models",
    "needs_kernel",
    "overflows",
    "ragged",
    "random_rows",
    "seeds",
    "table_gpt",
]

V = 13
OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)

overflows = st.sampled_from(OVERFLOWS)
seeds = st.none() | st.integers(0, 2**40)
"""None: greedily."""
block_sizes = st.integers(1, 20)

needs_kernel = pytest.mark.skipif(
    library() is None, reason="the fast path needs a C compiler, and CHARLM_NATIVE other than 0"
)


@st.composite
def gpt_configs(
    draw: st.DrawFn, windows: st.SearchStrategy[int] = block_sizes, vocab_sizes: Sequence[int] = (V,)
) -> GPTConfig:
    """Draw any switches of a GPT, with widths that fill no vector, one, or several."""
    if draw(st.booleans()):
        preset = draw(st.sampled_from(PRESET_NAMES))
        return tiny_config(preset, block_size=draw(windows), vocab_size=draw(st.sampled_from(vocab_sizes)))
    position = draw(st.sampled_from(["learned", "rotary"]))
    n_head = draw(st.sampled_from([1, 1, 2, 3]))
    head_size = draw(st.sampled_from([2, 4, 10, 16, 18, 32] if position == "rotary" else [1, 5, 10, 16, 17]))
    switches: dict[str, Any] = {
        name: draw(st.booleans()) for name in ("bias", "qkv_bias", "head_bias", "qk_norm", "tie_weights")
    }
    return tiny_config(
        vocab_size=draw(st.sampled_from(vocab_sizes)),
        block_size=draw(windows),
        n_layer=draw(st.sampled_from([1, 2, 3])),
        n_head=n_head,
        n_embd=n_head * head_size,
        mlp_width=draw(st.sampled_from([None, 1, 7, 16, 65])),
        position=position,
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        **switches,
    )


@functools.lru_cache(maxsize=512)
def _gpt(config: GPTConfig, dtype: torch.dtype, seed: int, storage: Storage | None) -> GPT:
    model = tiny_gpt(config, seed=seed, dtype=dtype)
    if storage is not None:
        round_weights(model, storage)
    return model


@st.composite
def gpts(
    draw: st.DrawFn,
    dtype: torch.dtype,
    windows: st.SearchStrategy[int] = block_sizes,
    vocab_sizes: Sequence[int] = (V,),
    storage: Storage | None = None,
) -> GPT:
    """Draw a GPT with random weights, rounded if a storage is given. It is shared: nobody may change it."""
    return _gpt(draw(gpt_configs(windows, vocab_sizes)), dtype, draw(st.integers(0, 3)), storage)


@functools.lru_cache(maxsize=64)
def _counted(kind: type[BigramLM | NGramLM], dtype: torch.dtype, seed: int) -> LanguageModel:
    ids = torch.randint(V, (80,), generator=torch.Generator().manual_seed(seed))
    data = BlockDataset(ids.repeat(2), 2)
    if kind is BigramLM:
        return BigramLM(V).to(dtype).fit(data, smoothing=0.1)
    return NGramLM(V, 1 + seed % 5).to(dtype).fit(data)


@functools.lru_cache(maxsize=256)
def _recurrent(block_size: int | None, keeps: bool, dtype: torch.dtype, seed: int) -> Recurrent:
    return Recurrent(V, block_size, keeps_cache=keeps, seed=seed).to(dtype)


@st.composite
def models(draw: st.DrawFn, dtype: torch.dtype) -> LanguageModel:
    """Draw any kind of model: a GPT, a bigram, an n-gram, a mixture, or a user's own, of V = 13."""
    kind = draw(st.sampled_from(["gpt", "gpt", "gpt", "bigram", "ngram", "own", "own", "mixture", "mixture"]))
    seed = draw(st.integers(0, 9))
    if kind == "mixture":
        second = _counted(draw(st.sampled_from([NGramLM, NGramLM, BigramLM])), dtype, seed)
        return mixed([draw(gpts(dtype)), second], seed)
    if kind == "gpt":
        return draw(gpts(dtype))
    if kind == "own":
        return _recurrent(draw(st.none() | block_sizes), draw(st.booleans()), dtype, seed)
    return _counted(BigramLM if kind == "bigram" else NGramLM, dtype, seed)


def mixed(members: Sequence[LanguageModel], seed: int = 0) -> MixtureLM:
    """Return a mixture with a random gate."""
    mixture = MixtureLM(members)
    gate = torch.randn(mixture.gate.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        mixture.gate.copy_(gate)
    return mixture.eval()


@st.composite
def ragged(draw: st.DrawFn, longest: int, vocab_size: int = V, most: int = 4) -> list[list[int]]:
    """Draw the ids of 1 to `most` texts, each of 1 to `longest`."""
    one = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=longest)
    return draw(st.lists(one, min_size=1, max_size=most))


def random_rows(lengths: Sequence[int], vocab_size: int = V, seed: int = 0) -> list[Tensor]:
    """Return ids (t,) for each length, at random: for texts too long to be drawn one by one."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def table_gpt(table: Tensor) -> GPT:
    """Return a GPT that predicts row i of a table (V, V) after the id i, whatever stands before it.

    Equal numbers of a row stay equal; each comes out within the rounding of float32.
    """
    C = len(table) + len(table) % 2  # rotary heads are even
    config = tiny_config(
        "cpu-1min", vocab_size=len(table), n_layer=1, n_head=1, n_embd=C, mlp_width=1, head_bias=True
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(len(table), C))
        # The norm turns a one among C - 1 zeros into 1 / sqrt(1 / C + eps).
        model.lm_head.weight[:, : len(table)] = table.t() * (1 / C + 1e-6) ** 0.5
    return model
