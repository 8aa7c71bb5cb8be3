"""The lecture's bigram, trained by gradient on Tiny Shakespeare, beside the exact one from counts."""

from __future__ import annotations

import pytest
import torch

from charlm import BigramLM, BlockDataset, CharTokenizer, Trainer, TrainerConfig
from charlm.evaluation import evaluate

pytestmark = pytest.mark.slow

EXACT = 2.4519  # training loss of the unsmoothed closed form, in nats


def trained(text: str, *, batch_size: int, learning_rate: float, steps: int) -> float:
    """Train as the lecture does, with plain AdamW, and return the exact loss over the training text."""
    tokenizer = CharTokenizer.from_text(text)
    train, _ = BlockDataset.from_text(text, tokenizer, block_size=8).split(0.9)
    config = TrainerConfig(
        max_steps=steps,
        batch_size=batch_size,
        replacement=True,
        optimizer="adamw",
        learning_rate=learning_rate,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        grad_clip=None,
        schedule="constant",
        warmup_steps=0,
        precision="fp32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1337)
        model = BigramLM(tokenizer.vocab_size)
    Trainer(model, train, config, device="cpu").fit()
    return evaluate(model, train).loss_nats


def test_gradient_descent_comes_close_to_the_counts(shakespeare: str) -> None:
    loss = trained(shakespeare, batch_size=32, learning_rate=1e-2, steps=3_000)
    assert EXACT < loss < EXACT + 0.03


def test_the_lectures_own_settings_end_a_little_above(shakespeare: str) -> None:
    loss = trained(shakespeare, batch_size=4, learning_rate=1e-3, steps=10_000)
    assert EXACT + 0.06 < loss < EXACT + 0.12
