"""Generation: each overflow mode is what it says and costs; see also `test_properties_of_generation.py`."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from harness.states import torch_state
from harness.tiny_models import MODELS, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_generation import lecture_slide, plain_restart
from torch import Tensor, nn

from charlm.generation import Cache, Overflow, SamplingOptions, context_start, next_ids, stream_ids
from charlm.models.base import LanguageModel

W = 16
NAN = math.nan
OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_in_float32_the_cache_changes_logits_by_no_more_than_1e_4(name: str, overflow: Overflow) -> None:
    model = MODELS[name](torch.float32)
    seen: list[Tensor] = []

    def note(logits: Tensor, _ids: Tensor) -> Tensor:
        seen.append(logits)
        return logits

    texts, logits = [], []
    for use_cache in (True, False):
        seen.clear()
        ids = model.generate(
            prompt(2, 5), 3 * W, temperature=0, overflow=overflow, use_cache=use_cache, filters=[note]
        )
        texts.append(ids[:, 5:])
        logits.append(torch.stack(seen, dim=1))  # (B, n, V)
    best_two = logits[1].topk(2, dim=-1).values
    close = (best_two[..., 0] - best_two[..., 1]) <= 1e-4
    for row in range(2):
        tie = int(close[row].nonzero()[0]) if close[row].any() else 3 * W
        assert torch.equal(texts[0][row, :tie], texts[1][row, :tie])
        torch.testing.assert_close(logits[0][row, :tie], logits[1][row, :tie], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [11, None])
def test_slide_is_the_lectures_loop(name: str, seed: int | None) -> None:
    model = MODELS[name](torch.float64).eval()
    for T0, new in ((1, 2 * W), (2 * W + 3, W)):
        with torch.no_grad():
            expected = lecture_slide(model, prompt(2, T0), new, model.block_size, seed)
        got = model.generate(prompt(2, T0), new, seed=seed, temperature=0 if seed is None else 1.0)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bigram"])
@pytest.mark.parametrize("seed", [11, None])
def test_restart_is_reading_the_text_with_a_window_that_empties_by_half(name: str, seed: int | None) -> None:
    model = MODELS[name](torch.float64).eval()
    for T0, new in ((1, 2 * W), (2 * W + 3, W)):
        with torch.no_grad():
            assert model.block_size is not None
            expected = plain_restart(model, prompt(2, T0), new, model.block_size, seed)
        options: dict[str, Any] = {"seed": seed, "temperature": 0 if seed is None else 1.0}
        assert torch.equal(model.generate(prompt(2, T0), new, overflow="restart", **options), expected)


def test_slide_and_restart_differ_only_past_the_window() -> None:
    model = MODELS["cpu-1min"](torch.float64)
    slide, restart = (model.generate(prompt(3, 1), 3 * W, seed=3, overflow=o) for o in OVERFLOWS)
    assert torch.equal(slide[:, : W + 1], restart[:, : W + 1])
    assert not torch.equal(slide, restart)


@settings(deadline=None)
@given(window=st.integers(1, 40), overflow=st.sampled_from(OVERFLOWS), first=st.integers(1, 200))
def test_the_context_grows_by_one_but_at_a_restart_and_always_fits(
    window: int, overflow: Overflow, first: int
) -> None:
    lengths = [p - context_start(p, window, overflow) for p in range(first, first + 3 * window + 2)]
    for position, length in enumerate(lengths, start=first):
        if position <= window:
            assert length == position
        elif overflow == "slide":
            assert length == window
        else:
            assert max(window // 2, 1) <= length <= window
    for before, after in itertools.pairwise(lengths):
        if overflow == "restart":
            assert after == before + 1 or (before == window and after == max(window // 2, 1))


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_a_model_without_a_window_sees_everything(overflow: Overflow) -> None:
    assert {context_start(p, None, overflow) for p in (1, 10, 10**9)} == {0}


class Counting(nn.Module):
    """A predictor that notes how many ids each call reads."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self.block_size = model.block_size
        self.vocab_size = model.vocab_size
        self.device = model.device
        self.read: list[int] = []

    def new_cache(self) -> Cache | None:
        return self.model.new_cache()

    def forward(
        self, idx: Tensor, targets: None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self.read.append(idx.size(1))
        return self.model(idx, targets, cache=cache)


def test_with_a_cache_all_but_the_restarts_read_one_character() -> None:
    counting = Counting(MODELS["lecture"](torch.float32))
    state = torch_state(counting, overflow="restart")
    state.observe(prompt(1, 3))
    list(stream_ids(state, 40, SamplingOptions(seed=0)))
    # positions 3 ... 42: the prompt, then a restart of 8 characters after each full window of 16
    assert counting.read == [3, *[1] * 13, 8, *[1] * 8, 8, *[1] * 8, 8, *[1] * 7]


def test_sliding_costs_a_window_for_each_character_past_it() -> None:
    counting = Counting(MODELS["lecture"](torch.float32))
    state = torch_state(counting, overflow="slide")
    state.observe(prompt(1, 3))
    list(stream_ids(state, 20, SamplingOptions(seed=0)))
    assert counting.read == [3, *[1] * 13, *[16] * 6]


def test_rows_can_be_given_the_addresses_of_others() -> None:
    model = MODELS["lecture"](torch.float64)
    same = prompt(1, 6).expand(4, 6)
    together = model.generate(same, W, seed=5)
    options = SamplingOptions(seed=5)
    state = model.new_state(2)
    state.observe(same[:2])
    picked = torch.stack(list(stream_ids(state, W, options, addresses=[3, 1])), dim=1)
    assert torch.equal(picked, together[[3, 1], 6:])


def test_different_seeds_give_different_texts() -> None:
    model = MODELS["lecture"](torch.float32)
    texts = {tuple(model.generate(prompt(1, 2), 30, seed=seed)[0].tolist()) for seed in range(20)}
    assert len(texts) == 20


def test_more_than_a_thousand_characters_are_generated_in_one_piece() -> None:
    model = MODELS["bigram"](torch.float32)
    ids = model.generate(prompt(2, 3), 2500, seed=1)
    assert ids.shape == (2, 2503)
    assert torch.equal(ids[:, 3:], torch.stack(list(model.stream(prompt(2, 3), 2500, seed=1)), dim=1))


def test_no_new_ids_give_the_prompt_back() -> None:
    model = MODELS["lecture"](torch.float32)
    assert torch.equal(model.generate(prompt(2, 40), 0, seed=1), prompt(2, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fast", "readable"])
@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_seed_of_none_is_drawn_from_torch_s_generator_everywhere(
    dtype: torch.dtype, one_by_one: bool
) -> None:
    model, options = MODELS["lecture"](dtype), SamplingOptions()

    def text() -> list[int]:
        state = model.new_state()
        state.observe(prompt(1, 3))
        if one_by_one:
            return [int(next_ids(state, options)) for _ in range(40)]
        return [int(ids) for ids in stream_ids(state, 40, options)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, second = text(), text()
        torch.manual_seed(1)
        assert text() == first
        assert first != second
        torch.manual_seed(2)
        assert text() not in (first, second)
