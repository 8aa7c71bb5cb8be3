"""Without a compiler an n-gram model says what it says with one, bit for bit."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm.compression.plain_ngram import PlainNGram
from charlm.data.blocks import BlockDataset
from charlm.generation.state import PredictionState
from charlm.models.ngram import NGramLM
from charlm.native.library import portable_library
from charlm.native.ngram import NativeNGram

IDS = st.lists(st.integers(0, 4), min_size=2, max_size=200)
WINDOWS = st.sampled_from([0, 1, 7, 50, 4_096])


def kernel() -> ctypes.CDLL:
    found = portable_library()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@settings(deadline=None)
@given(IDS, IDS, st.integers(1, 6), WINDOWS)
def test_both_say_the_same_bits(counted: list[int], ids: list[int], order: int, window: int) -> None:
    model = NGramLM(5, order, window).fit(BlockDataset(torch.tensor(counted), 1))
    with torch.no_grad():  # other shares than those that nothing was learnt of
        model.window_shares *= torch.linspace(0.3, 1.0, model.window_shares.numel()).view(-1, 3)
    said = []
    for engine in (PlainNGram(model, 1), NativeNGram(kernel(), model, 1)):
        state = PredictionState(engine)
        state.observe(torch.tensor([ids[:1]]))
        said.append(state.verify(torch.tensor(ids[1:], dtype=torch.int64)))
    assert torch.equal(*said)
    torch.testing.assert_close(said[0].exp().sum(dim=-1), torch.ones(len(ids)))


def test_it_says_what_the_model_says() -> None:
    ids = torch.randint(0, 9, (3_000,), generator=torch.Generator().manual_seed(1))
    model = NGramLM(9).fit(BlockDataset(ids, 1))
    state = PredictionState(PlainNGram(model, 1))
    state.observe(ids[None, :1])
    wanted = model(ids[None, :400])[0][0]
    torch.testing.assert_close(state.verify(ids[1:400]), wanted)


def test_a_model_that_was_not_fitted_is_uniform() -> None:
    state = PredictionState(PlainNGram(NGramLM(4), 2))
    state.observe(torch.tensor([[1, 2], [3, 3]]))
    torch.testing.assert_close(state.fork([1]).predict().exp(), torch.full((1, 4), 0.25))
