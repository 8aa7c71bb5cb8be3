"""Drafts: whatever is guessed, the text is the one that the model writes by itself."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from harness.drawn_models import models, needs_kernel, ragged
from harness.states import torch_state
from harness.tiny_models import MODELS, prompt, tiny_config, tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_state import plain_logits
from torch import Tensor

from charlm import BigramLM, BlockDataset, CharLM, CharTokenizer
from charlm.errors import InputError, NonFiniteError
from charlm.generation import PredictionState, SamplingOptions, TorchEngine, next_ids
from charlm.generation.drafting import stream_drafted
from charlm.models.base import LanguageModel
from charlm.models.ngram import NGramLM

V = 13
W = 16


def counted(order: int = 4) -> NGramLM:
    ids = torch.randint(V, (300,), generator=torch.Generator().manual_seed(order))
    return NGramLM(V, order).fit(BlockDataset(ids, 2))


def like(model: LanguageModel) -> LanguageModel:
    """Return a model that predicts nearly the same: most of its guesses are right, and some are not."""
    twin = type(model).from_config(model.config)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return twin


GPTS = {name: MODELS[name](torch.float32) for name in ("lecture", "cpu-10s", "odd window", "window of one")}
DRAFTS: dict[str, LanguageModel] = {
    "ngram": counted(),
    "bigram": MODELS["bigram"](torch.float32),
    **{f"like {name}": like(model) for name, model in GPTS.items()},
}


@pytest.mark.slow
@settings(deadline=None)
@given(
    name=st.sampled_from([*GPTS, "bigram"]),
    draft=st.sampled_from(list(DRAFTS)),
    T0=st.integers(1, 2 * W),
    new=st.integers(0, 3 * W),
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 3]),
    overflow=st.sampled_from(["slide", "restart"]),
    use_cache=st.booleans(),
)
def test_a_draft_changes_no_id(
    name: str, draft: str, T0: int, new: int, seed: int, use_cache: bool, **options: Any
) -> None:
    # In float64, where a pass over several ids and one over each agree far below any chance of a difference.
    model = MODELS[name](torch.float64)
    alone = model.generate(prompt(1, T0), new, seed=seed, use_cache=use_cache, **options)
    drafted = model.generate(
        prompt(1, T0), new, seed=seed, use_cache=use_cache, draft=DRAFTS[draft], **options
    )
    assert torch.equal(drafted, alone)


@pytest.mark.parametrize("name", GPTS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_compiled_pass_gives_the_same_bits_with_a_draft(name: str, draft: str) -> None:
    model = GPTS[name]
    if isinstance(model.new_state().engine, TorchEngine):
        pytest.skip("there is no C compiler")
    for temperature, overflow in itertools.product((0, 1.0), ("slide", "restart")):
        options: dict[str, Any] = {"seed": 1, "overflow": overflow, "temperature": temperature}
        alone = model.generate(prompt(1, 3), 5 * W, **options)
        assert torch.equal(model.generate(prompt(1, 3), 5 * W, draft=DRAFTS[draft], **options), alone)


def test_good_guesses_save_passes() -> None:
    model, read = GPTS["lecture"], []
    state = torch_state(model)
    state.observe(prompt(1, 2))
    twin = model.new_state()
    twin.observe(prompt(1, 2))
    options = SamplingOptions(seed=4)
    ids = torch.cat([next_ids(twin, options) for _ in range(8)])
    handle = model.register_forward_hook(lambda _, given, __: read.append(given[0].size(1)))
    try:
        assert state.verify(ids[:5]).shape == (6, V)
        assert state.lengths == [2]  # nothing was observed
        state.observe(ids[None, :6])
        wrong = (ids[6:8] + torch.tensor([0, 1])) % V
        state.verify(wrong)
        state.observe(ids[None, 6:8])
        state.predict()
    finally:
        handle.remove()
    assert read == [
        7,  # the prompt and five guesses
        3,  # the sixth id, and two guesses
        1,  # what came in the place of the one that was wrong
    ]
    assert state.text(0).tolist() == [*prompt(1, 2)[0].tolist(), *ids.tolist()]


@settings(deadline=None)
@given(
    model=models(torch.float64),
    text=ragged(24, most=1),
    overflow=st.sampled_from(["slide", "restart"]),
    use_cache=st.booleans(),
    data=st.data(),
)
def test_guesses_are_predicted_as_if_they_were_observed_and_leave_no_trace(
    model: LanguageModel, text: list[list[int]], overflow: Any, use_cache: bool, data: st.DataObject
) -> None:
    """Whatever comes after them: ids that agree with some of them, a score, a fork, ids taken back."""
    state = model.new_state(overflow=overflow, use_cache=use_cache)
    state.observe(torch.tensor(text))
    ids = text[0]
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            state.predict()
        guesses = data.draw(st.lists(st.integers(0, V - 1), max_size=5))
        logits = state.verify(torch.tensor(guesses, dtype=torch.int64))
        wanted = [plain_logits(model, ids + guesses[:i], overflow) for i in range(len(guesses) + 1)]
        torch.testing.assert_close(logits, torch.stack(wanted), rtol=0, atol=1e-9)
        assert state.text(0).tolist() == ids
        right = data.draw(st.integers(0, len(guesses)))
        new = guesses[:right] + data.draw(st.lists(st.integers(0, V - 1), max_size=3))
        match data.draw(st.sampled_from(["observe", "score", "fork", "retract"])):
            case "observe":
                state.observe(torch.tensor([new], dtype=torch.int64))
                ids = ids + new
            case "score":
                state.score(torch.tensor([new], dtype=torch.int64))
                ids = ids + new
            case "fork":
                state = state.fork()
            case "retract" if len(ids) > 1:
                state.retract(1)
                ids = ids[:-1]
            case _:
                pass
        wanted_ = plain_logits(model, ids, overflow)
        torch.testing.assert_close(state.predict()[0], wanted_, rtol=0, atol=1e-9)


def test_filters_see_the_text_that_there_would_be_without_a_draft() -> None:
    def never_twice(logits: Tensor, ids: Tensor) -> Tensor:
        return logits.scatter(-1, ids[:, -1:], -math.inf)

    for model in (*GPTS.values(), MODELS["lecture"](torch.float64)):
        options: dict[str, Any] = {"seed": 2, "filters": [never_twice], "overflow": "restart"}
        alone = model.generate(prompt(1, 3), 40, **options)
        assert torch.equal(model.generate(prompt(1, 3), 40, draft=DRAFTS["ngram"], **options), alone)


def until(length: int) -> Any:
    """Return a filter that removes everything once a text is so long."""

    def remove(logits: Tensor, ids: Tensor) -> Tensor:
        return logits if ids.size(1) < length else torch.full_like(logits, -math.inf)

    return remove


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_error_comes_after_the_ids_that_were_still_right(dtype: torch.dtype) -> None:
    model = MODELS["lecture"](dtype)
    for draft in (None, DRAFTS["ngram"], DRAFTS["like lecture"]):
        steps = model.stream(prompt(1, 3), 40, seed=1, filters=[until(9)], draft=draft)
        got = list(itertools.islice(steps, 6))
        assert len(got) == 6
        with pytest.raises(NonFiniteError):
            next(steps)


@pytest.mark.parametrize("plain", [False, True])
def test_a_state_whose_verification_failed_is_as_before(plain: bool) -> None:
    model = tiny_gpt(tiny_config())
    state: PredictionState = torch_state(model) if plain else model.new_state()
    state.observe(prompt(1, 4))
    with torch.no_grad():
        model.lm_head.bias[3] = math.nan
    draft = DRAFTS["ngram"].new_state()
    draft.observe(prompt(1, 4))
    for count in (1, 5):  # without a guess, and with some
        with pytest.raises(NonFiniteError, match="row 0"):
            next(stream_drafted(state, draft.fork(), count, SamplingOptions(seed=1)))
        assert state.lengths == [4]
    assert torch.equal(state.text(0), prompt(1, 4)[0])


def test_a_draft_that_cannot_choose_does_no_harm() -> None:
    broken = BigramLM(V)
    with torch.no_grad():
        broken.token_embedding_table.weight.fill_(math.nan)
    model = GPTS["lecture"]
    drafted = model.generate(prompt(1, 3), 40, seed=1, draft=broken)
    assert torch.equal(drafted, model.generate(prompt(1, 3), 40, seed=1))


def going_round(by: int) -> BigramLM:
    """Return a model that is sure of the id so many after the last, on a ring of V."""
    model = BigramLM(V)
    with torch.no_grad():
        model.token_embedding_table.weight.copy_(20 * torch.eye(V).roll(by, 1))
    return model


def guessed(
    monkeypatch: pytest.MonkeyPatch, draft: BigramLM, count: int, better_at: int | None = None
) -> list[tuple[int, int]]:
    """Generate with a draft, which turns right at a place; return after how many ids it guessed how many."""
    state, other = going_round(1).new_state(), draft.new_state()
    for one in (state, other):
        one.observe(prompt(1, 3))
    asked: list[tuple[int, int]] = []
    verify = PredictionState.verify

    def noted(self: PredictionState, guesses: Tensor) -> Tensor:
        asked.append((self.lengths[0] - 3, len(guesses)))
        return verify(self, guesses)

    monkeypatch.setattr(PredictionState, "verify", noted)
    ids = stream_drafted(state, other, count, SamplingOptions(temperature=0.0))
    for at, _ in enumerate(itertools.islice(ids, 2 * count)):  # it ends by itself
        if at == better_at:
            draft.load_state_dict(going_round(1).state_dict())
    monkeypatch.undo()
    return asked


def test_a_draft_that_is_right_is_asked_for_more_and_never_for_more_than_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many as have a chance of 0.15, with what was right of late: 0.6 at first, and at most eight."""
    asked = guessed(monkeypatch, going_round(1), 80)
    assert asked == [(0, 3), (4, 4), (9, 5), (15, 7), *((at, 8) for at in range(23, 70, 9)), (77, 2)]


def test_a_draft_that_is_wrong_is_asked_for_fewer_and_at_last_in_each_eighth_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = guessed(monkeypatch, going_round(2), 60)
    fewer = [3] * 3 + [2] * 6 + [1] * 19
    assert asked == [*enumerate(fewer), *((at, 1) for at in (31, 39, 47, 55))]


def test_a_draft_that_gets_better_is_asked_for_more_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = guessed(monkeypatch, going_round(2), 400, better_at=60)
    counts = [count for at, count in asked if 60 < at < 390]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 8)


def test_several_rows_do_without_a_draft() -> None:
    model = GPTS["lecture"]
    both = model.generate(prompt(2, 3), 20, seed=1, draft=counted())
    assert torch.equal(both, model.generate(prompt(2, 3), 20, seed=1))


def test_a_draft_must_be_a_model_of_the_same_vocabulary() -> None:
    model = GPTS["lecture"]
    with pytest.raises(InputError, match="draft must have the model's vocabulary of 13 ids, got 5"):
        model.generate(prompt(1, 3), 5, draft=BigramLM(5))
    with pytest.raises(InputError, match="draft must be a language model, or None, got 3"):
        model.generate(prompt(1, 3), 5, draft=3)  # type: ignore[arg-type]


def test_text_can_be_drafted_streamed_and_stopped() -> None:
    tokenizer = CharTokenizer("\nabcdefghijkl")
    lm = CharLM(GPTS["cpu-10s"], tokenizer)
    free = lm.generate("abc", 60, seed=3)
    assert lm.generate("abc", 60, seed=3, draft=counted()) == free
    assert "abc" + "".join(lm.stream("abc", 60, seed=3, draft=counted())) == free
    stop = [free[20:22]]
    assert lm.generate("abc", 60, seed=3, stop=stop, draft=counted()) == lm.generate(
        "abc", 60, seed=3, stop=stop
    )


@settings(deadline=None)
@given(
    order=st.integers(1, 6),
    T=st.integers(1, 30),
    B=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    fitted=st.booleans(),
)
def test_an_n_gram_state_says_what_the_model_says(
    order: int, T: int, B: int, seed: int, fitted: bool
) -> None:
    model = counted(order) if fitted else NGramLM(V, order)
    idx = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))
    quick, plain = model.new_state(B), torch_state(model, B)
    for state in (quick, plain):
        state.observe(idx[:, :1])
    for row, other in zip(quick.score(idx[:, 1:]), plain.score(idx[:, 1:]), strict=True):
        torch.testing.assert_close(row, other, rtol=0, atol=1e-5)
    torch.testing.assert_close(quick.predict(), plain.predict(), rtol=0, atol=1e-5)
    assert quick.predict().exp().sum(dim=-1).tolist() == pytest.approx([1.0] * B, abs=1e-5)


@needs_kernel
def test_tables_out_of_order_are_read_within_their_bounds() -> None:
    model = counted(5)
    shuffled = torch.randperm(len(model.codes), generator=torch.Generator().manual_seed(1))
    for codes in (model.codes[shuffled], -model.codes, model.codes.flip(0), model.codes * 0 + 2**62):
        model.load_state_dict({**model.state_dict(), "codes": codes})
        state = model.new_state()
        state.observe(prompt(1, 30))
        assert state.predict().isfinite().all()


@needs_kernel
def test_an_n_gram_state_follows_its_model_and_leaves_the_rest_to_it() -> None:
    model = counted()
    state = model.new_state()
    twin = counted().new_state()
    for one in (state, twin):
        one.observe(prompt(1, 3))
        one.predict()
        one.observe(prompt(1, 4)[:, 3:])
    model.fit(BlockDataset(torch.zeros(50, dtype=torch.int64), 2))
    after = state.predict()
    assert not torch.equal(twin.predict(), after)
    torch.testing.assert_close(after[0], model(prompt(1, 4))[0][0, -1])
    model.codes.data = model.codes.data.clone()  # the memory of before is free
    model.counts.data = model.counts.data.clone()
    state.observe(prompt(1, 1))
    torch.testing.assert_close(state.predict()[0], model(state.text(0)[None])[0][0, -1])
    state.observe(prompt(1, 1))
    model.double()
    with pytest.raises(InputError, match="the tables must keep their types during a generation"):
        state.predict()
    flat = counted()
    flat.discounts = flat.discounts[:, 0].contiguous()
    assert isinstance(flat.new_state().engine, TorchEngine)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert isinstance(counted().new_state().engine, TorchEngine)
    finally:
        handle.remove()
    assert isinstance(counted().double().new_state().engine, TorchEngine)
    assert isinstance(counted().new_state(use_cache=False).engine, TorchEngine)
    watched = counted()
    watched.register_forward_hook(lambda *_: None)
    assert isinstance(watched.new_state().engine, TorchEngine)


@pytest.mark.parametrize("name", [*MODELS, "ngram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("overflow", ["slide", "restart"])
def test_what_is_taken_back_might_never_have_been(name: str, dtype: torch.dtype, overflow: Any) -> None:
    model = counted().to(dtype) if name == "ngram" else MODELS[name](dtype)
    idx = prompt(2, 3 * W)
    for length, count, ask in itertools.product((2, W - 1, W + 1, 2 * W + 3), (1, 5, 20), (False, True)):
        if count >= length:
            continue
        state, fresh = (model.new_state(2, overflow=overflow) for _ in range(2))
        for at in range(length) if ask else ():
            state.observe(idx[:, at : at + 1])
            state.predict()
        if not ask:
            state.observe(idx[:, :length])
        state.retract(count)
        state.observe(idx[:, 5:9])
        fresh.observe(torch.cat([idx[:, : length - count], idx[:, 5:9]], dim=1))
        assert state.lengths == fresh.lengths
        assert torch.equal(state.text(1), fresh.text(1))
        torch.testing.assert_close(state.predict(), fresh.predict(), rtol=0, atol=1e-4)


def test_no_more_can_be_taken_back_than_leaves_one_id() -> None:
    for model in (GPTS["lecture"], counted()):
        state = model.new_state()
        with pytest.raises(InputError, match="count must be an int from 0 to below 0, got 1"):
            state.retract(1)
        state.observe(prompt(1, 3))
        for count in (3, -1, 1.0):
            with pytest.raises(InputError, match="count must be an int from 0 to below 3"):
                state.retract(count)  # type: ignore[arg-type]
        state.retract(2)
        assert state.lengths == [1]
