"""Surprisal: against plain loops, and the same sum as the evaluation's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from harness.tiny_models import random_ids, tiny_config, tiny_gpt
from harness.tiny_training import PlainModule
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_evaluation import plain_surprisal
from torch import nn

from charlm import BigramLM, BlockDataset, ByteTokenizer, CharLM, CharTokenizer, LanguageModel, NGramLM
from charlm.errors import DataError, InputError, UnknownCharacterError
from charlm.evaluation import evaluate, surprisal

V = 13


def some_model(kind: str) -> LanguageModel:
    if kind == "bigram":
        torch.manual_seed(1)
        return BigramLM(V)
    return tiny_gpt(tiny_config("lecture")).eval()


def some_data(length: int, block_size: int) -> BlockDataset:
    return BlockDataset(random_ids(tiny_config("lecture"), 1, length, length)[0], block_size)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["bigram", "gpt"]),
    st.integers(2, 70),
    st.integers(1, 16),
    st.integers(1, 80),
    st.integers(0, V + 2),
)
def test_figures_are_those_of_plain_loops_for_any_batch_size(
    kind: str, length: int, block_size: int, batch_size: int, top: int
) -> None:
    data = some_data(length, min(block_size, length - 1))
    model = some_model(kind)
    found = surprisal(model, data, top=top, batch_size=batch_size)
    plain = plain_surprisal(model, data.ids.tolist(), data.block_size)
    assert np.isnan([found.bits[0], found.entropy_bits[0]]).all()
    assert (found.rank[0], found.context[0]) == (0, 0)
    assert (found.candidates[0] == -1).all()
    np.testing.assert_allclose(found.bits[1:], [place.bits for place in plain], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        found.entropy_bits[1:], [place.entropy for place in plain], rtol=1e-5, atol=1e-5
    )
    assert found.rank[1:].tolist() == [place.rank for place in plain]
    assert found.context[1:].tolist() == [place.context for place in plain]
    assert found.candidates.shape == found.candidate_probs.shape == (length, min(top, V))
    for ids, probs, place in zip(found.candidates[1:], found.candidate_probs[1:], plain, strict=True):
        assert ids.tolist() == place.likeliest[:top]
        np.testing.assert_allclose(probs, place.probs[:top], rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["bigram", "gpt"]), st.integers(2, 200), st.integers(1, 16))
def test_the_sum_is_that_of_the_evaluation(kind: str, length: int, block_size: int) -> None:
    data = some_data(length, min(block_size, length - 1))
    model = some_model(kind)
    found, result = surprisal(model, data), evaluate(model, data)
    bits = np.nansum(found.bits)
    assert bits == pytest.approx(result.bits_per_char * result.n_chars, rel=1e-5)
    assert found.result.loss_nats == pytest.approx(result.loss_nats, rel=1e-5)
    assert (found.result.accuracy, found.result.n_chars) == (result.accuracy, result.n_chars)


def test_the_sum_is_that_of_the_evaluation_on_tiny_shakespeare(shakespeare: str) -> None:
    tokenizer = CharTokenizer.from_text(shakespeare)
    train, val = BlockDataset.from_text(shakespeare, tokenizer, 256).split(0.9)
    lm = CharLM(NGramLM(tokenizer.vocab_size, order=4).fit(train), tokenizer)
    text = tokenizer.decode(val.ids)
    found, result = lm.surprisal(text), lm.evaluate(text)
    assert np.nansum(found.bits) == pytest.approx(result.bits_per_char * result.n_chars, rel=1e-5)
    assert found.result.bits_per_byte == pytest.approx(result.bits_per_byte, rel=1e-5)


def test_equally_likely_characters_have_their_places_by_id() -> None:
    model = BigramLM(4)
    nn.init.zeros_(model.token_embedding_table.weight)
    found = surprisal(model, BlockDataset(torch.tensor([0, 3, 0, 2, 1]), 4), top=4)
    assert found.rank.tolist() == [0, 4, 1, 3, 2]
    assert found.bits[1:].tolist() == found.entropy_bits[1:].tolist() == [2.0] * 4


def test_what_was_held_impossible_is_infinitely_surprising() -> None:
    data = BlockDataset(torch.tensor([0, 1] * 4), 4)
    model = BigramLM(2).fit(data, smoothing=0)
    found = surprisal(model, BlockDataset(torch.tensor([0, 0, 1]), 2))
    assert found.bits[1:].tolist() == [math.inf, 0.0]
    assert found.entropy_bits[1:].tolist() == [0.0, 0.0]
    assert found.result.loss_nats == math.inf


def test_any_module_can_be_asked() -> None:
    data = some_data(40, 8)
    model = PlainModule(V)
    assert surprisal(model, data).result.loss_nats == pytest.approx(evaluate(model, data).loss_nats)


@pytest.mark.parametrize("top", [-1, 2.0, True])
def test_a_wrong_number_of_candidates_is_refused(top: object) -> None:
    with pytest.raises(InputError, match="top must be"):
        surprisal(some_model("bigram"), some_data(20, 4), top=top)  # type: ignore[arg-type]


def test_figures_of_a_text_stand_beside_its_characters() -> None:
    lm = CharLM(some_model("gpt"), CharTokenizer("abcdefghijklm"))
    text = "abcabcabc" * 4
    found = lm.surprisal(text, top=2)
    assert found.bits.shape == (len(text),)
    assert found.context.tolist() == [0, *range(1, 17), *range(1, 17), 1, 2, 3]  # windows of 16
    assert lm.surprisal(text, block_size=3).context.tolist() == [0, *[1, 2, 3] * 11, 1, 2]
    alone = lm.surprisal("ab")
    np.testing.assert_allclose(alone.bits[1], found.bits[1], rtol=1e-5)


def test_with_a_byte_tokenizer_figures_are_per_byte() -> None:
    torch.manual_seed(1)
    lm = CharLM(BigramLM(256), ByteTokenizer())
    found = lm.surprisal("é\n")
    assert found.bits.shape == (3,)
    assert found.result.n_bytes == found.result.n_chars == 2


def test_texts_that_cannot_be_scored_are_refused() -> None:
    lm = CharLM(some_model("bigram"), CharTokenizer("abcdefghijklm"))
    with pytest.raises(DataError, match="at least two characters"):
        lm.surprisal("a")
    with pytest.raises(UnknownCharacterError, match="'z'"):
        lm.surprisal("az")
