"""Every kind of text can be the prompt and the vocabulary of a model, of characters and of bytes."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.texts import TEXTS
from harness.tiny_models import tiny_config, tiny_gpt

from charlm import BigramLM, BlockDataset, ByteTokenizer, CharLM, CharTokenizer, load

NEW = 20


@functools.cache
def models_of(kind: str) -> tuple[CharLM, CharLM]:
    """Return a GPT of the text's characters, and a bigram model of its bytes, which knows their order."""
    characters, data = CharTokenizer.from_text(TEXTS[kind]), ByteTokenizer()
    # In float64 the rounding that depends on a pass's size is far below what a sample could show.
    gpt = tiny_gpt(tiny_config(vocab_size=characters.vocab_size, n_layer=1), dtype=torch.float64)
    bigram = BigramLM(256).fit(BlockDataset(data.encode_array(TEXTS[kind]), 1), smoothing=1e-4)
    return CharLM(gpt.eval(), characters), CharLM(bigram.eval(), data)


def prompts_of(kind: str) -> list[str]:
    """Return pieces of the text: its beginning, longer than the window; its end; and nothing."""
    return [TEXTS[kind][:20], TEXTS[kind][-1:], ""]


@pytest.mark.parametrize("kind", TEXTS)
def test_prompts_come_back_first_and_a_seed_gives_the_same_text_whole_and_streamed(kind: str) -> None:
    for lm in models_of(kind):
        wholes = lm.generate(prompts_of(kind), NEW, seed=3)
        assert lm.generate(prompts_of(kind), NEW, seed=3) == wholes
        for prompt, whole in zip(prompts_of(kind), wholes, strict=True):
            assert whole.startswith(prompt)
            new = whole[len(prompt) :]
            if isinstance(lm.tokenizer, ByteTokenizer):
                assert 0 < len(new) <= NEW
            else:
                assert len(new) == NEW
                assert set(new) <= set(TEXTS[kind])
        for prompt in prompts_of(kind)[::2]:
            pieces = list(lm.stream(prompt, NEW, seed=3))
            assert all(pieces)
            assert prompt + "".join(pieces) == lm.generate(prompt, NEW, seed=3)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_character_of_the_text_ends_it_as_a_stop_string(kind: str) -> None:
    for lm in models_of(kind):
        prompt = TEXTS[kind][:3]
        free = lm.generate(prompt, NEW, seed=4)[len(prompt) :]
        for stop in (free[len(free) // 2], free[-2:]):
            end = free.index(stop)
            whole = lm.generate(prompt, NEW, seed=4, stop=[stop])
            assert whole == prompt + free[:end]
            assert "".join(lm.stream(prompt, NEW, seed=4, stop=[stop])) == free[:end]
            kept = lm.generate(prompt, NEW, seed=4, stop=[stop], keep_stop=True)
            assert kept == prompt + free[: end + len(stop)]


@pytest.mark.parametrize("kind", TEXTS)
def test_log_probs_surprisal_and_evaluation_tell_the_same(kind: str) -> None:
    for lm in models_of(kind):
        text = TEXTS[kind][:13]
        ids = lm.tokenizer.encode(text)
        scores = lm.log_probs(text[1:], prompt=text[:1])
        assert len(scores) == len(lm.tokenizer.encode(text[1:]))
        assert np.all(scores <= 0)
        found = lm.surprisal(text, block_size=16 if lm.model.block_size else 100)
        assert np.isnan(found.bits).tolist() == [True] + [False] * (len(ids) - 1)
        np.testing.assert_allclose(-math.log(2) * found.bits[-len(scores) :], scores, rtol=1e-5, atol=1e-6)

        text = TEXTS[kind][:500]
        found, result = lm.surprisal(text, top=2), lm.evaluate(text)
        assert found.bits[1:].mean() == pytest.approx(result.bits_per_char, rel=1e-6, abs=1e-6)
        assert (found.result.accuracy, found.result.n_chars) == (result.accuracy, result.n_chars)
        # Of bytes the first alone has nothing before it, of characters all bytes of the first.
        first = 1 if isinstance(lm.tokenizer, ByteTokenizer) else len(text[0].encode())
        assert found.result.n_bytes == result.n_bytes == len(text.encode()) - first
        assert found.candidates.max() < lm.tokenizer.vocab_size


@pytest.mark.parametrize("kind", TEXTS)
def test_a_saved_model_says_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a loss of power is the business of other tests
    for lm in models_of(kind):
        lm.save(tmp_path / "model")
        again = load(tmp_path / "model", device="cpu")
        assert again.tokenizer == lm.tokenizer
        for prompt in prompts_of(kind)[1:]:
            assert again.generate(prompt, NEW, seed=5) == lm.generate(prompt, NEW, seed=5)
        assert again.log_probs(TEXTS[kind][:20]).tolist() == lm.log_probs(TEXTS[kind][:20]).tolist()
