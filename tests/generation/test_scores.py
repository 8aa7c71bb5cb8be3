"""Log-probabilities of ids that are given and that were generated, by state, by model and by text."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from harness.drawn_models import (
    OVERFLOWS,
    models,
    overflows,
    ragged,
    random_rows,
)
from harness.states import STATES, state_of, tolerance_of
from harness.tiny_models import MODELS, prompt, tiny_config, tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_state import plain_log_probs, plain_logits

from charlm import CharLM, CharTokenizer
from charlm.generation import Overflow
from charlm.models.base import LanguageModel

F64 = torch.float64


@pytest.fixture(params=STATES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return STATES[request.param]()


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_scores_are_the_same_in_one_call_or_many_and_by_the_choice_of_each_id(
    model: LanguageModel, overflow: Overflow
) -> None:
    rows = random_rows([41, 41])
    atol = tolerance_of(model)
    whole = torch.stack(
        state_of(model, [row[:1].tolist() for row in rows], overflow=overflow).score(
            [row[1:] for row in rows]
        )
    )
    assert whole.dtype == F64
    for cuts in ([40], [1] * 40, [7, 0, 1, 12, 20]):
        state = state_of(model, [row[:1].tolist() for row in rows], overflow=overflow)
        parts = [
            state.score(torch.stack(rows)[:, a:b])
            for a, b in itertools.pairwise([1, *np.cumsum([1, *cuts])[1:]])
        ]
        joined = torch.stack([torch.cat([part[row] for part in parts]) for row in range(2)])
        torch.testing.assert_close(joined, whole, rtol=0, atol=atol)
    singly = state_of(model, [row[:1].tolist() for row in rows], overflow=overflow)
    for t in range(1, 41):
        log_probs = singly.predict().double().log_softmax(dim=-1)
        for row in range(2):
            assert log_probs[row, rows[row][t]].item() == pytest.approx(whole[row, t - 1].item(), abs=atol)
        singly.observe(torch.stack(rows)[:, t : t + 1])


def test_within_the_window_a_score_is_the_log_softmax_of_one_forward_pass(model: LanguageModel) -> None:
    idx = prompt(3, model.block_size or 30)
    wide = model.double()  # in place: its scores are those of the readable path
    with torch.no_grad():
        logits, _ = wide(idx)
    wanted = logits.log_softmax(dim=-1)[:, :-1].gather(2, idx[:, 1:, None])[..., 0]
    for overflow in OVERFLOWS:
        torch.testing.assert_close(wide.log_probs(idx, overflow=overflow), wanted, rtol=0, atol=1e-9)


@settings(deadline=None)
@given(model=models(F64), rows=ragged(30, most=1), copies=st.integers(1, 3), overflow=overflows)
def test_log_probs_are_those_of_the_context_that_each_position_sees(
    model: LanguageModel, rows: list[list[int]], copies: int, overflow: Overflow
) -> None:
    idx = torch.tensor(rows).repeat(copies, 1)
    wanted = torch.tensor([plain_log_probs(model, rows[0], overflow)] * copies, dtype=F64)
    got = model.log_probs(idx, overflow=overflow)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


@settings(deadline=None)
@given(
    model=models(F64),
    text=st.text("\nabcdefghijkl", min_size=1, max_size=25),
    prompt_=st.text("\nabcdefghijkl", max_size=25),
    overflow=overflows,
    count=st.integers(0, 6),
)
def test_characters_given_and_generated_are_scored_alike(
    model: LanguageModel, text: str, prompt_: str, overflow: Overflow, count: int
) -> None:
    lm = CharLM(model, CharTokenizer("\nabcdefghijkl"))
    whole = lm.generate(prompt_ + text, count, seed=1, overflow=overflow)
    scored = whole[len(prompt_) :]
    ids = lm.tokenizer.encode((prompt_ or "\n") + scored)
    wanted = plain_log_probs(model, ids, overflow)[-len(scored) :]
    got = lm.log_probs(scored, prompt=prompt_, overflow=overflow)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-9)


def test_without_overflow_charlm_scores_as_it_generates_and_a_model_as_it_does() -> None:
    model = tiny_gpt(tiny_config(block_size=4), dtype=F64)
    lm = CharLM(model, CharTokenizer("\nabcdefghijkl"))
    text = "abcdefghijklabc"
    ids = torch.tensor([lm.tokenizer.encode("\n" + text)])
    slide, restart = (model.log_probs(ids, overflow=o)[0].numpy() for o in OVERFLOWS)
    assert not np.allclose(slide, restart)
    np.testing.assert_array_equal(lm.log_probs(text), restart)
    np.testing.assert_array_equal(model.log_probs(ids)[0].numpy(), slide)


@pytest.mark.parametrize("name", ["fast", "own without cache", "bigram"])
def test_texts_of_thousands_of_ids_are_scored_in_pieces(name: str) -> None:
    """1,024 ids are read at once; rows of other lengths end in other pieces."""
    model = STATES[name]()
    lengths = [2_500, 1_025, 3, 1_024]
    rows = random_rows(lengths)
    if name == "own without cache":  # reads everything again for each piece
        rows = [row[:1_030] for row in rows]
    state = state_of(model, [row[:1].tolist() for row in rows], overflow="restart")
    scores = state.score([row[1:] for row in rows])
    assert [len(score) for score in scores] == [len(row) - 1 for row in rows]
    for row, score in zip(rows, scores, strict=True):
        alone = model.log_probs(row[None], overflow="restart")[0]
        torch.testing.assert_close(score, alone, rtol=0, atol=1e-5)
    for t in (1, 7, 8, 9, 1_023, 1_024, 1_025):
        row = rows[0]
        wanted = plain_logits(model, row[:t].tolist(), "restart").double().log_softmax(dim=-1)[row[t]]
        assert scores[0][t - 1].item() == pytest.approx(wanted.item(), abs=1e-4)


def test_a_model_that_makes_an_id_impossible_says_minus_infinity() -> None:
    model = MODELS["bigram"](torch.float32)
    with torch.no_grad():
        model.get_parameter("token_embedding_table.weight")[1, 2] = -torch.inf
    assert model.log_probs(torch.tensor([[1, 2, 3]])).tolist()[0][0] == -torch.inf
