"""What generation promises of every model, at any length around its window, as properties.

In float64 the rounding that depends on a batch's shape is far below what a sample could show, so ids must be
equal there. In float32 and bfloat16 the ids are given, and the logits compared. (The fast path promises equal
bits: `native/test_gpt.py`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness.drawn_models import models, overflows, ragged, random_rows, seeds
from harness.own_model import Recurrent
from harness.states import torch_state
from harness.tiny_models import MODELS, prompt, tiny_config, tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_generation import stopped_text
from oracles.plain_state import plain_logits, plain_text
from torch import Tensor

from charlm import CharLM, CharTokenizer, MixtureLM
from charlm.errors import InputError, TextError
from charlm.generation import Overflow, SamplingOptions, stream_ids
from charlm.models.base import LanguageModel

F64 = torch.float64
LETTERS = "\nabcdefghijkl"

ways = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.3, 3),
        "top_k": st.integers(1, 20),
        "top_p": st.floats(0.05, 1),
        "min_p": st.floats(0, 0.5),
    },
)
counts = st.integers(0, 8)


def options_of(way: dict[str, Any], seed: int | None, overflow: Overflow) -> dict[str, Any]:
    greedy = {"temperature": 0} if seed is None else {}
    return {**way, **greedy, "seed": seed, "overflow": overflow}


def text_of(ids: Sequence[int]) -> str:
    return "".join(LETTERS[i] for i in ids)


@settings(deadline=None)
@given(
    model=models(F64),
    rows=ragged(30, most=1),
    copies=st.integers(1, 3),
    count=counts,
    way=ways,
    seed=seeds,
    overflow=overflows,
)
def test_with_a_cache_or_without_the_ids_are_those_of_reading_everything_anew(
    model: LanguageModel,
    rows: list[list[int]],
    copies: int,
    count: int,
    way: dict[str, Any],
    seed: int | None,
    overflow: Overflow,
) -> None:
    options = options_of(way, seed, overflow)
    idx = torch.tensor(rows).repeat(copies, 1)
    cached = model.generate(idx, count, **options)
    assert torch.equal(model.generate(idx, count, use_cache=False, **options), cached)
    wanted = [plain_text(model, rows[0], count, SamplingOptions(**options), row) for row in range(copies)]
    assert cached.tolist() == wanted


@settings(deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    overflow=overflows,
    data=st.data(),
)
def test_in_float32_and_bfloat16_the_cache_changes_logits_within_their_rounding(
    dtype: torch.dtype, lengths: list[int], steps: list[int], overflow: Overflow, data: st.DataObject
) -> None:
    """1e-4 in float32. bfloat16 keeps 8 bits: a logit of size s may move by a few s / 256."""
    model = data.draw(models(dtype))
    rows = random_rows(lengths)
    cached, plain = (torch_state(model, len(rows), overflow=overflow, use_cache=use) for use in (True, False))
    for state in (cached, plain):
        state.observe(rows)
    for count in steps:
        got, wanted = cached.predict().float(), plain.predict().float()
        largest = float(wanted.abs().max())
        # What a mixture says are log-probabilities, each the difference of two logits of its members.
        share = 0.1 if isinstance(model, MixtureLM) else 0.05
        atol = 1e-4 if dtype == torch.float32 else share * max(largest, 1.0)
        torch.testing.assert_close(got, wanted, rtol=0, atol=atol)
        best = wanted.topk(2, dim=-1).values
        clear = best[:, 0] - best[:, 1] > 2 * atol
        assert torch.equal(got.argmax(dim=-1)[clear], wanted.argmax(dim=-1)[clear])
        for state in (cached, plain):
            state.observe(random_rows([count] * len(rows), seed=count))
    texts = [cached.text(row).tolist() for row in range(len(rows))]
    anew = torch.stack([plain_logits(model, ids, overflow) for ids in texts]).float()
    torch.testing.assert_close(cached.predict().float(), anew, rtol=0, atol=atol)


@settings(deadline=None)
@given(
    model=models(F64), rows=ragged(30), count=counts, way=ways, seed=seeds, overflow=overflows, data=st.data()
)
def test_each_prompt_of_a_batch_gets_what_it_would_get_alone(
    model: LanguageModel,
    rows: list[list[int]],
    count: int,
    way: dict[str, Any],
    seed: int | None,
    overflow: Overflow,
    data: st.DataObject,
) -> None:
    options = SamplingOptions(**options_of(way, seed, overflow))
    addresses = data.draw(st.lists(st.integers(0, 2**40), min_size=len(rows), max_size=len(rows)))
    together = model.new_state(len(rows), overflow=overflow)
    together.observe([torch.tensor(ids) for ids in rows])
    columns = list(stream_ids(together, count, options, addresses=addresses))
    for row, ids in enumerate(rows):
        alone = model.new_state(overflow=overflow)
        alone.observe(torch.tensor([ids]))
        wanted = [int(new) for new in stream_ids(alone, count, options, addresses=addresses[row : row + 1])]
        assert [int(column[row]) for column in columns] == wanted
        assert together.text(row).tolist() == ids + wanted


@settings(deadline=None)
@given(
    model=models(F64),
    rows=ragged(30, most=1),
    batch=st.integers(1, 6),
    fewer=st.integers(1, 6),
    count=counts,
    way=ways,
    seed=seeds,
    overflow=overflows,
)
def test_a_seed_gives_the_same_text_in_any_batch_and_streamed_and_continued(
    model: LanguageModel,
    rows: list[list[int]],
    batch: int,
    fewer: int,
    count: int,
    way: dict[str, Any],
    seed: int | None,
    overflow: Overflow,
) -> None:
    options = options_of(way, seed, overflow)
    idx = torch.tensor(rows).repeat(batch, 1)
    together = model.generate(idx, count, **options)
    assert torch.equal(model.generate(idx[:fewer], count, **options), together[:fewer])
    streamed = list(model.stream(idx, count, **options))
    assert len(streamed) == count
    assert [ids.tolist() for ids in streamed] == together[:, idx.size(1) :].t().tolist()
    half = idx.size(1) + count // 2
    assert torch.equal(model.generate(together[:, :half], count - count // 2, **options), together)


prompts = st.lists(st.text(LETTERS, max_size=25), min_size=1, max_size=4)
stops = st.lists(st.text(LETTERS[:6], min_size=1, max_size=2), min_size=0, max_size=3)


@settings(deadline=None)
@given(
    model=models(F64),
    texts=prompts,
    stop=stops,
    count=st.integers(0, 12),
    seed=seeds,
    overflow=overflows,
)
def test_a_row_that_has_stopped_changes_nothing_for_the_others(
    model: LanguageModel,
    texts: list[str],
    stop: list[str],
    count: int,
    seed: int | None,
    overflow: Overflow,
) -> None:
    lm = CharLM(model, CharTokenizer(LETTERS))
    options = options_of({}, seed, overflow)
    got = lm.generate(texts, count, stop=stop, **options)
    for row, given_ in enumerate(texts):
        ids = lm.tokenizer.encode(given_ or "\n")
        state = model.new_state(overflow=overflow)
        state.observe(torch.tensor([ids]))
        steps = stream_ids(state, count, SamplingOptions(**options), addresses=[row])
        new, _ = stopped_text(text_of([int(i) for i in steps]), stop)
        assert got[row] == given_ + new
    assert lm.generate(texts[0], count, stop=stop, **options) == got[0]
    assert texts[0] + "".join(lm.stream(texts[0], count, stop=stop, **options)) == got[0]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "abX"}, "X"),
    ({"prompt": "\ud800"}, r"U\+D800"),
    ({"prompt": b"ab"}, "prompt must be a str"),
    ({"max_new_tokens": -1}, "max_new_tokens must be an int, 0 or more, got -1"),
    ({"max_new_tokens": 1.0}, "max_new_tokens must be an int, 0 or more, got 1.0"),
    ({"temperature": -0.5}, "temperature must be 0, or from 1e-6 to 1e6, got -0.5"),
    ({"top_k": 0}, "top_k must be an int, 1 or more, or None, got 0"),
    ({"top_p": 0}, "top_p must be above 0 and at most 1, or None, got 0"),
    ({"top_p": 1.01}, "top_p must be above 0 and at most 1, or None, got 1.01"),
    ({"min_p": -0.1}, "min_p must be from 0 to 1, or None, got -0.1"),
    ({"overflow": "crop"}, "overflow must be 'slide' or 'restart', got 'crop'"),
    ({"stop": "end"}, "stop must be a sequence of non-empty strings"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["fast", "readable"])
def test_bad_input_is_refused_alike_on_both_paths(
    dtype: torch.dtype, arguments: dict[str, Any], message: str
) -> None:
    lm = CharLM(tiny_gpt(tiny_config(), dtype=dtype), CharTokenizer(LETTERS))
    for call in (lm.generate, lm.stream):
        with pytest.raises((InputError, TextError), match=message):
            call(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["fast", "readable"])
def test_the_ends_of_the_options_mean_what_is_documented(dtype: torch.dtype) -> None:
    """An empty prompt, no new characters, and limits that remove nothing or all but one."""
    lm = CharLM(tiny_gpt(tiny_config(), dtype=dtype), CharTokenizer(LETTERS))
    free = lm.generate("ab", 40, seed=1)
    no_limits: list[dict[str, Any]] = [
        {"top_k": 13},
        {"top_k": 14},
        {"top_k": 2**64 + 1},
        {"top_p": 1},
        {"min_p": 0},
    ]
    for none in no_limits:
        assert lm.generate("ab", 40, seed=1, **none) == free
    greedy = lm.generate("ab", 40, temperature=0)
    only_ones: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-300}, {"min_p": 1}, {"temperature": 1e-6}]
    for one in only_ones:
        assert lm.generate("ab", 40, seed=1, **one) == greedy
    assert lm.generate("ab", 0, seed=1) == "ab"
    assert list(lm.stream("ab", 0, seed=1)) == []
    assert lm.generate("", 0) == ""
    assert "\n" + lm.generate("", 40, seed=1) == lm.generate("\n", 40, seed=1)
    long = LETTERS * 400  # longer than a pass of the fast path, and than any window
    assert lm.generate(long, 5, seed=1)[: len(long)] == long
    assert lm.generate(long, 5, seed=1, overflow="slide")[len(long) :] == text_of(
        plain_text(lm.model, lm.tokenizer.encode(long), 5, SamplingOptions(seed=1))[len(long) :]
    )


def test_a_stream_computes_no_further_than_it_is_asked_for() -> None:
    model = Recurrent(13, None, keeps_cache=True)
    stream = model.stream(torch.tensor([[1, 2, 3]]), 10**9, seed=0)
    assert model.read == 0
    for number in range(5):
        next(stream)
        assert model.read == 3 + number
    lm = CharLM(model, CharTokenizer(LETTERS))
    model.read = 0
    pieces = lm.stream("abc", 10**9, seed=0)
    for number in range(5):
        next(pieces)
        assert model.read == 3 + number


def test_the_ids_of_a_step_are_the_caller_s_to_keep() -> None:
    for dtype in (torch.float32, F64):
        kept: list[Tensor] = list(MODELS["cpu-1min"](dtype).stream(prompt(2, 3), 20, seed=0))
        again = MODELS["cpu-1min"](dtype).generate(prompt(2, 3), 20, seed=0)
        assert torch.equal(torch.stack(kept, dim=1), again[:, 3:])
        assert {(ids.dtype, ids.shape) for ids in kept} == {(torch.int64, (2,))}
