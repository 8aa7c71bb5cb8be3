"""Filters at their exact points, their order, and filters of the caller's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from charlm.data.blocks import BlockDataset
from charlm.errors import InputError, NonFiniteError
from charlm.generation import (
    SamplingOptions,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    remove_ids,
    sample,
    scale_temperature,
)
from charlm.models.bigram import BigramLM

HALF_QUARTER = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
NONE = torch.zeros(1, 1, dtype=torch.long)


def kept(logits: Tensor) -> list[list[int]]:
    return [torch.isfinite(row).nonzero()[:, 0].tolist() for row in logits]


logit_rows = st.lists(
    st.sampled_from([-math.inf, -5.0, -1.0, -0.5, 0.0, 0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=9
).filter(lambda row: any(math.isfinite(x) for x in row))


@settings(deadline=None)
@given(logit_rows, st.integers(1, 12))
def test_top_k_keeps_exactly_k_of_the_largest_and_the_smaller_id_of_equals(row: list[float], k: int) -> None:
    best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    expected = [x if i in best else -math.inf for i, x in enumerate(row)]
    assert keep_top_k(torch.tensor([row]), k).tolist() == [expected]


def test_top_k_examples() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert kept(keep_top_k(logits, 1)) == [[1], [0]]
    assert kept(keep_top_k(logits, 2)) == [[1, 2], [0, 1]]
    assert torch.equal(keep_top_k(logits, 4), logits)
    assert torch.equal(keep_top_k(logits, 10**9), logits)


@settings(deadline=None)
@given(logit_rows, st.floats(1e-6, 1))
def test_top_p_keeps_the_smallest_likeliest_set_that_holds_p(row: list[float], p: float) -> None:
    logits = torch.tensor([row], dtype=torch.float64)
    probs = logits.softmax(dim=-1)[0].tolist()
    order = sorted(range(len(row)), key=lambda i: (-probs[i], i))
    held = [0.0]
    for i in order:
        held.append(held[-1] + probs[i])
    if any(abs(h - p) < 1e-9 for h in held):
        return  # rounding decides
    size = next((n for n, h in enumerate(held) if h >= p), len(row))
    expected = sorted(i for i in order[:size] if probs[i] > 0)
    assert kept(keep_top_p(logits, p)) == [expected]


@pytest.mark.parametrize(
    ("p", "ids"),
    [
        (0.0, [0]),
        (1e-9, [0]),
        (0.3, [0]),
        (0.5, [0]),
        (0.5001, [0, 1]),
        (0.75, [0, 1]),
        (0.8, [0, 1, 2]),
        (0.9, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_examples(p: float, ids: list[int]) -> None:
    assert kept(keep_top_p(HALF_QUARTER, p)) == [ids]


def test_top_p_keeps_the_smaller_ids_of_equals() -> None:
    assert kept(keep_top_p(torch.zeros(1, 4, dtype=torch.float64), 0.5)) == [[0, 1]]


def test_top_p_of_one_changes_nothing_at_all() -> None:
    logits = torch.tensor([[50.0, 0.0, -50.0]])
    assert torch.equal(keep_top_p(logits, 1.0), logits)


@pytest.mark.parametrize(
    ("p", "ids"),
    [(0.0, [0, 1, 2, 3]), (0.25, [0, 1, 2, 3]), (0.26, [0, 1]), (0.5, [0, 1]), (0.51, [0]), (1.0, [0])],
)
def test_min_p_examples(p: float, ids: list[int]) -> None:
    assert kept(keep_min_p(HALF_QUARTER, p)) == [ids]


def test_min_p_of_one_keeps_every_equal_of_the_best() -> None:
    assert kept(keep_min_p(torch.tensor([[2.0, 1.0, 2.0]]), 1.0)) == [[0, 2]]


@settings(deadline=None)
@given(logit_rows, st.integers(1, 9), st.floats(1e-6, 1), st.floats(0, 1))
def test_no_filter_removes_the_likeliest_or_changes_what_it_keeps(
    row: list[float], k: int, p: float, m: float
) -> None:
    logits = torch.tensor([row], dtype=torch.float64)
    before = logits.clone()
    for filtered in (keep_top_k(logits, k), keep_top_p(logits, p), keep_min_p(logits, m)):
        assert filtered[0, row.index(max(row))] == max(row)
        where = torch.isfinite(filtered)
        assert torch.equal(filtered[where], logits[where])
    assert torch.equal(logits, before)


def test_each_row_is_filtered_by_itself() -> None:
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.1, 0.2], [0.0, 9.0, 0.0]])
    filters: list[Callable[[Tensor], Tensor]] = [
        lambda x: keep_top_k(x, 2),
        lambda x: keep_top_p(x, 0.7),
        lambda x: keep_min_p(x, 0.5),
    ]
    for apply in filters:
        alone = torch.cat([apply(row[None]) for row in logits])
        assert torch.equal(apply(logits), alone)


def test_a_temperature_scales_the_logits_and_zero_leaves_them() -> None:
    logits = torch.tensor([[2.0, -1.0, -math.inf]])
    assert scale_temperature(logits, 0.5).tolist() == [[4.0, -2.0, -math.inf]]
    assert torch.equal(scale_temperature(logits, 1.0), logits)
    assert torch.equal(scale_temperature(logits, 0), logits)


def test_the_order_is_temperature_top_k_top_p_min_p_then_the_callers() -> None:
    seen: list[list[list[int]]] = []

    def note(logits: Tensor, _ids: Tensor) -> Tensor:
        seen.append(kept(logits))
        return logits

    def ban_the_best(logits: Tensor, _ids: Tensor) -> Tensor:
        return logits.scatter(-1, logits.argmax(dim=-1, keepdim=True), -math.inf)

    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    logits = probs.log()
    # Top-k first: of the two left, the best holds 4/7, which is more than 0.5. Before top-k it holds 0.4.
    options = SamplingOptions(top_k=2, top_p=0.5, filters=[note])
    options.filter(logits, NONE)
    # Temperature first: squared, the best holds 16/30, enough for top-p; and 9/16 is below min-p.
    SamplingOptions(temperature=0.5, top_p=0.5, filters=[note]).filter(logits, NONE)
    SamplingOptions(temperature=0.5, min_p=0.6, filters=[note]).filter(logits, NONE)
    # Top-p before min-p: without the tail that top-p removed nothing changes; the caller's come last.
    SamplingOptions(top_k=3, min_p=0.7, filters=[note, ban_the_best, note]).filter(logits, NONE)
    assert seen == [[[0]], [[0]], [[0]], [[0, 1]], [[1]]]


def test_filters_without_options_change_nothing() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(SamplingOptions().filter(logits, NONE), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_probabilities_are_added_up(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 4096, dtype=dtype)  # equal: in bf16 a sum of 4096 of them stops at 1/2
    filtered = SamplingOptions(top_p=0.75).filter(logits, NONE)
    assert filtered.dtype == torch.float32
    assert abs(len(kept(filtered)[0]) - 3072) <= 1


@pytest.mark.parametrize("returned", [None, 3.0, torch.zeros(4), torch.zeros(1, 4), torch.zeros(2, 3)])
def test_a_filter_that_returns_something_else_is_an_error(returned: Any) -> None:
    with pytest.raises(InputError, match=r"a filter must return logits \(2, 4\), got "):
        SamplingOptions(filters=[lambda *_: returned]).filter(torch.zeros(2, 4), NONE)


@pytest.fixture
def model() -> BigramLM:
    ids = torch.randint(6, (200,), generator=torch.Generator().manual_seed(0))
    return BigramLM(6).fit(BlockDataset(ids, 2))


def test_a_filter_can_ban_a_character(model: BigramLM) -> None:
    def ban(logits: Tensor, _ids: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([2]), -math.inf)

    free = model.generate(torch.zeros(3, 1, dtype=torch.long), 200, seed=0)
    banned = model.generate(torch.zeros(3, 1, dtype=torch.long), 200, seed=0, filters=[ban])
    assert (free == 2).any()
    assert not (banned == 2).any()


def test_a_filter_sees_all_ids_so_far_prompt_included(model: BigramLM) -> None:
    """A repetition penalty so strong that no id comes twice: each row becomes a permutation."""

    def never_again(logits: Tensor, ids: Tensor) -> Tensor:
        return logits.scatter(-1, ids, -math.inf)

    prompt = torch.tensor([[0, 3], [5, 1]])
    ids = model.generate(prompt, 4, seed=0, filters=[never_again])
    assert [sorted(row) for row in ids.tolist()] == [list(range(6))] * 2
    with pytest.raises(NonFiniteError, match="the filters removed every token"):
        model.generate(prompt, 5, seed=0, filters=[never_again])


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_every_way_to_take_the_likeliest_takes_it(model: BigramLM, options: dict[str, Any]) -> None:
    ids = model.generate(torch.tensor([[1], [4]]), 30, seed=3, **options)
    best = model.token_embedding_table.weight.argmax(dim=-1)
    assert torch.equal(ids[:, 1:], best[ids[:, :-1]])


def test_of_equal_logits_greedy_choice_takes_the_smaller_id() -> None:
    assert sample(torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]]), None).tolist() == [1, 0]


def plain_penalty(row: list[float], text: list[int], penalty: float) -> list[float]:
    seen = set(text[-64:])
    return [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(row)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=90), st.sampled_from([0.5, 1.0, 1.3, 4.0]))
def test_repetition_is_penalised_among_the_last_64_ids(text: list[int], penalty: float) -> None:
    row = [2.0, -1.0, 0.0, 0.5, -3.0]
    logits = torch.tensor([row, row], dtype=torch.float64)
    found = penalise_repetition(logits, torch.tensor([text, text]), penalty)
    for one in found.tolist():
        assert one == pytest.approx(plain_penalty(row, text, penalty))
    assert torch.equal(logits[0], torch.tensor(row, dtype=torch.float64)), "the logits themselves stay"


def test_banned_ids_are_removed_before_the_likeliest_are_kept() -> None:
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    assert kept(SamplingOptions(banned_ids=[1, 2], top_k=1).filter(logits)) == [[3]]
    assert remove_ids(logits, []) is logits
    assert SamplingOptions(banned_ids={3, 1}).banned_ids == (1, 3)
    with pytest.raises(InputError, match=r"banned ids must be below the vocabulary's size 4, got 4"):
        SamplingOptions(banned_ids=[4]).filter(logits)
    for bad in ("ab", 3, [-1], [1.5], [None]):
        with pytest.raises(InputError, match="banned_ids must be ids, 0 or more"):
            SamplingOptions(banned_ids=bad)  # type: ignore[arg-type]  # the point
    with pytest.raises(InputError, match="ids must be given"):
        SamplingOptions(repetition_penalty=2.0).filter(logits)


def test_every_engine_bans_and_penalises_alike() -> None:
    """The compiled engine leaves it to PyTorch, and so does a draft."""
    from charlm.models.gpt import GPT
    from charlm.models.ngram import NGramLM

    torch.manual_seed(0)
    gpt = GPT.from_config("cpu-10s", vocab_size=9, n_layer=1, n_embd=16, block_size=16).eval()
    ngram = NGramLM(9).fit(BlockDataset(torch.arange(500) % 9, block_size=8))
    prompt = torch.tensor([[1, 2, 3]])
    for model in (gpt, ngram):
        double = model.double() if model is gpt else model
        for options in ({"banned_ids": [4, 5]}, {"repetition_penalty": 1.5}):
            text = double.generate(prompt, 40, seed=3, overflow="restart", **options)[0].tolist()
            state, wanted = double.new_state(overflow="restart"), prompt[0].tolist()
            state.observe(prompt)
            for _ in range(40):
                row = state.predict()
                filtered = SamplingOptions(**options).filter(row, torch.tensor([wanted]))
                uniform = SamplingOptions(seed=3).uniforms([0], [len(wanted)])
                wanted += sample(filtered, uniform).tolist()
                state.observe(torch.tensor([wanted[-1:]]))
            assert text == wanted
            drafted = double.generate(prompt, 40, seed=3, overflow="restart", draft=ngram, **options)
            assert drafted[0].tolist() == wanted
