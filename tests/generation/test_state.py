"""Prediction states, of every kind of model: what predict, observe, fork and advance promise.

`oracles.plain_state` says what is right: for each position the context that the model may see, read anew.
In float64 it must be met to 1e-9.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from harness.drawn_models import (
    OVERFLOWS,
    models,
    needs_kernel,
    overflows,
    ragged,
    random_rows,
)
from harness.own_model import Recurrent
from harness.states import ROWS, STATES, state_of, tensors, tolerance_of
from harness.tiny_models import prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_state import plain_log_probs, plain_logits, plain_text, plain_window

from charlm.generation import (
    KVCache,
    Overflow,
    PredictionState,
    SamplingOptions,
    TorchEngine,
    context_start,
    next_ids,
)
from charlm.models.base import LanguageModel
from charlm.native.gpt import NativeGPT
from charlm.native.mixture import NativeMixture
from charlm.native.ngram import NativeNGram

F64 = torch.float64
GREEDY = SamplingOptions(temperature=0)


@pytest.fixture(params=STATES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return STATES[request.param]()


def assert_predicts(
    state: PredictionState, model: LanguageModel, rows: Sequence[list[int]], overflow: Overflow
) -> None:
    wanted = torch.stack([plain_logits(model, ids, overflow) for ids in rows])
    torch.testing.assert_close(state.predict(), wanted, rtol=0, atol=1e-9)


@settings(deadline=None)
@given(window=st.none() | st.integers(1, 40), overflow=overflows, position=st.integers(1, 200))
def test_the_context_is_what_counting_from_the_start_gives(
    window: int | None, overflow: Overflow, position: int
) -> None:
    assert position - context_start(position, window, overflow) == plain_window(position, window, overflow)


@settings(deadline=None)
@given(
    model=models(F64),
    rows=ragged(24),
    overflow=overflows,
    use_cache=st.booleans(),
    data=st.data(),
)
def test_whatever_is_done_in_whatever_order_a_state_predicts_what_its_texts_say(
    model: LanguageModel, rows: list[list[int]], overflow: Overflow, use_cache: bool, data: st.DataObject
) -> None:
    """A few steps of observing, predicting, scoring, choosing, forking and taking back, drawn at random."""
    options = SamplingOptions(seed=data.draw(st.integers(0, 9)), overflow=overflow)
    live = [(state_of(model, rows, overflow=overflow, use_cache=use_cache), rows, list(range(len(rows))))]
    for _ in range(data.draw(st.integers(2, 8))):
        at = data.draw(st.integers(0, len(live) - 1))
        state, texts, addresses = live[at]
        B = len(texts)
        pieces = st.lists(st.lists(st.integers(0, 12), max_size=4), min_size=B, max_size=B)
        match data.draw(st.sampled_from(["predict", "observe", "score", "advance", "fork", "retract"])):
            case "predict":
                assert_predicts(state, model, texts, overflow)
            case "observe":
                new = data.draw(pieces)
                state.observe(tensors(new))
                live[at] = state, [a + b for a, b in zip(texts, new, strict=True)], addresses
            case "score":
                new = data.draw(pieces)
                scores = state.score(tensors(new))
                whole = [a + b for a, b in zip(texts, new, strict=True)]
                for score, before, after in zip(scores, texts, whole, strict=True):
                    wanted = plain_log_probs(model, after, overflow)[len(before) - 1 :]
                    torch.testing.assert_close(score, torch.tensor(wanted, dtype=F64), rtol=0, atol=1e-9)
                live[at] = state, whole, addresses
            case "advance":
                chosen = next_ids(state, options, addresses).tolist()
                whole = [
                    plain_text(model, ids, 1, options, row) for ids, row in zip(texts, addresses, strict=True)
                ]
                assert chosen == [ids[-1] for ids in whole]
                live[at] = state, whole, addresses
            case "retract":
                count = data.draw(st.integers(0, min(map(len, texts)) - 1))
                state.retract(count)
                live[at] = state, [ids[: len(ids) - count] for ids in texts], addresses
            case "fork":
                picked = data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=4))
                twin = state.fork(picked)
                live.append((twin, [texts[row] for row in picked], [addresses[row] for row in picked]))
    for state, texts, _ in live:
        assert state.rows == len(texts)
        assert state.lengths == [len(ids) for ids in texts]
        assert [state.text(row).tolist() for row in range(state.rows)] == texts
        assert_predicts(state, model, texts, overflow)


@needs_kernel
def test_small_gpts_and_n_grams_on_a_cpu_take_a_fast_path_and_others_the_readable_one() -> None:
    taken = {name: type(make().new_state().engine) for name, make in STATES.items()}
    wanted = {
        "fast": NativeGPT,
        "fast in bfloat16": NativeGPT,
        "ngram": NativeNGram,
        "mixture": NativeMixture,
    }
    assert taken == {name: wanted.get(name, TorchEngine) for name in STATES}
    assert type(STATES["fast"]().new_state(use_cache=False).engine) is TorchEngine


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_predict_may_be_asked_again_and_its_answer_may_be_written_to(
    model: LanguageModel, overflow: Overflow
) -> None:
    state = state_of(model, ROWS, overflow=overflow)
    first = state.predict()
    kept = first.clone()
    assert torch.equal(state.predict(), kept)
    first.fill_(0)
    assert torch.equal(state.predict(), kept)
    assert not kept.requires_grad
    chosen = next_ids(state.fork(), GREEDY, range(3))
    assert torch.equal(next_ids(state, GREEDY, range(3)), chosen)
    for row in range(3):  # nor do the texts that it tells change with what the caller does to them
        before = state.text(row).clone()
        state.text(row).fill_(0)
        assert torch.equal(state.text(row), before)


def test_observing_nothing_changes_nothing(model: LanguageModel) -> None:
    state = state_of(model, ROWS)
    before = state.predict()
    state.observe(torch.empty(3, 0, dtype=torch.int64))
    state.observe([torch.empty(0, dtype=torch.int64)] * 3)
    assert [score.shape for score in state.score(torch.empty(3, 0, dtype=torch.int64))] == [(0,)] * 3
    assert torch.equal(state.predict(), before)
    new = model.new_state()
    new.observe(torch.empty(1, 0, dtype=torch.int64))
    assert new.lengths == [0]


def test_nothing_is_computed_before_the_first_prediction() -> None:
    model = Recurrent(13, None, keeps_cache=True)
    state = model.new_state(2)
    for t in range(5):
        state.observe(prompt(2, 5)[:, t : t + 1])
    assert model.read == 0
    state.predict()
    assert model.read == 2 * 5
    state.predict()
    state.observe(prompt(2, 1))
    assert model.read == 2 * 5
    state.predict()
    assert model.read == 2 * 6


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_forks_go_their_own_ways_and_rows_may_be_repeated_and_reordered(
    model: LanguageModel, overflow: Overflow
) -> None:
    rows = ROWS
    state = state_of(model, rows, overflow=overflow)
    state.predict()
    twin, many = state.fork(), state.fork([2, 0, 2, 2, 1])
    texts = [rows[row] for row in (2, 0, 2, 2, 1)]
    before = many.predict()
    assert torch.equal(before, state.predict()[[2, 0, 2, 2, 1]])
    state.observe(prompt(3, 12))  # over the window's end
    state.predict()
    assert torch.equal(twin.predict(), state_of(model, rows, overflow=overflow).predict())
    assert torch.equal(many.predict(), before)
    many.observe(prompt(5, 12))
    fresh = state_of(
        model,
        [ids + new for ids, new in zip(texts, prompt(5, 12).tolist(), strict=True)],
        overflow=overflow,
    )
    torch.testing.assert_close(many.predict(), fresh.predict(), rtol=0, atol=tolerance_of(model))
    other = state_of(
        model,
        [ids + new for ids, new in zip(rows, prompt(3, 12).tolist(), strict=True)],
        overflow=overflow,
    )
    torch.testing.assert_close(state.predict(), other.predict(), rtol=0, atol=tolerance_of(model))
    assert twin.lengths == [3, 9, 20]


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_a_fork_of_several_rows_goes_on_in_single_steps_as_the_original_does(
    model: LanguageModel, overflow: Overflow
) -> None:
    state = state_of(model, ROWS, overflow=overflow)
    options = SamplingOptions(seed=3)
    for _ in range(3):
        next_ids(state, options, [5, 6, 7])
    twin = state.fork([1, 2])
    chosen = [next_ids(state, options, [5, 6, 7]) for _ in range(12)]
    again = [next_ids(twin, options, [6, 7]) for _ in range(12)]
    assert torch.equal(torch.stack(again), torch.stack(chosen)[:, 1:])


def test_a_cache_that_cannot_be_copied_is_made_anew() -> None:
    model = Recurrent(13, None, keeps_cache=True)
    state = state_of(model, [[1, 2, 3], [4, 5, 6]])
    state.predict()
    read = model.read
    twin = state.fork([1])
    assert torch.equal(twin.predict(), state.predict()[1:])
    assert model.read == read  # what comes next was known
    for one in (state, twin):
        one.observe(torch.full((one.rows, 1), 7))
    assert torch.equal(twin.predict(), state.predict()[1:])
    assert model.read == read + 4 + 2  # the whole of that row, and one id for each of the original
    unread = KVCache(2, 4).fork([0, 1])
    assert [layer.length for layer in unread.layers] == [0, 0]


@pytest.mark.parametrize("inside", ["beginning", "middle", "fork"])
def test_a_generation_may_enter_and_leave_inference_mode(model: LanguageModel, inside: str) -> None:
    options = SamplingOptions(seed=3)
    expected = state_of(model, [[1, 2, 3], [4]])
    wanted = [next_ids(expected, options, [0, 1]) for _ in range(12)]
    if inside == "beginning":
        with torch.inference_mode():
            state = state_of(model, [[1, 2, 3], [4]])
            got = [next_ids(state, options, [0, 1])]
    else:
        state = state_of(model, [[1, 2, 3], [4]])
        got = [next_ids(state, options, [0, 1])]
        with torch.inference_mode():
            if inside == "fork":
                state = state.fork([0, 1])
            else:
                got.append(next_ids(state, options, [0, 1]))
    while len(got) < 12:
        got.append(next_ids(state, options, [0, 1]))
    assert torch.equal(torch.stack(got), torch.stack(wanted))


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_ids_taken_back_to_before_the_context_and_observed_anew_are_read_anew(
    model: LanguageModel, overflow: Overflow
) -> None:
    """The context begins again where it began before, with other ids in it."""
    first, second = random_rows([40, 40])
    state = state_of(model, [first.tolist()], overflow=overflow)
    state.predict()
    state.retract(35)
    state.observe(second[None, 5:])
    whole = [*first[:5].tolist(), *second[5:].tolist()]
    wanted = state_of(model, [whole], overflow=overflow).predict()
    torch.testing.assert_close(state.predict(), wanted, rtol=0, atol=tolerance_of(model))
    if overflow == "restart":
        chosen = [int(next_ids(state, GREEDY)) for _ in range(12)]
        assert chosen == plain_text(model, whole, 12, SamplingOptions(temperature=0, overflow=overflow))[40:]


def test_a_fork_of_a_fork_keeps_what_was_read_last(model: LanguageModel) -> None:
    """Rows that were read together, and one of them by itself since."""
    rows = random_rows([10, 10])
    state = state_of(model, [row.tolist() for row in rows])
    state.predict()
    state.retract(3)
    state.score([rows[1][:2], rows[0][:0]])
    texts = [[*rows[0][:7].tolist(), *rows[1][:2].tolist()], rows[1][:7].tolist()]
    wanted = state_of(model, texts).predict()
    torch.testing.assert_close(state.fork().fork().predict(), wanted, rtol=0, atol=tolerance_of(model))


@pytest.mark.parametrize("name", STATES)
def test_guesses_change_nothing_through_what_was_told_of_them(name: str) -> None:
    state = state_of(STATES[name](), ROWS[:1])
    before = state.predict()
    state.verify(torch.tensor([1, 2])).fill_(0)
    assert torch.equal(state.predict(), before)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torch_s_default_type_and_device_play_no_part(name: str, dtype: torch.dtype) -> None:
    model, options = STATES[name](), SamplingOptions(seed=3, top_k=9)
    state = state_of(model, ROWS)
    wanted = [next_ids(state, options) for _ in range(12)], state.score(torch.tensor([[1]] * 3))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            state = model.new_state(3)
            ids = [torch.tensor(row, device="cpu") for row in ROWS]
            state.observe(ids)
            got = [next_ids(state, options) for _ in range(12)]
            scores = state.score(torch.tensor([[1]] * 3, device="cpu"))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(torch.stack(got), torch.stack(wanted[0]))
    assert torch.equal(torch.cat(scores), torch.cat(wanted[1]))
