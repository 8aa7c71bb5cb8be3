"""What the type checkers must infer: read by mypy and pyright, and run once by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import charlm
from charlm import (
    GPT,
    BigramLM,
    BlockDataset,
    ByteTokenizer,
    CharLM,
    CharTokenizer,
    EvalResult,
    LanguageModel,
    Trainer,
    TrainerConfig,
    load,
)
from charlm.testing import tiny_corpus
from charlm.training import StepRecord, TrainResult


def check(folder: Path) -> None:
    """Use every overload once."""
    text = tiny_corpus(400)
    tokenizer = CharTokenizer.from_text(text)
    assert_type(tokenizer, CharTokenizer)
    assert_type(tokenizer.encode("the"), list[int])
    assert_type(tokenizer.encode_array("the"), NDArray[np.uint8 | np.uint16 | np.uint32])
    assert_type(ByteTokenizer().encode_array("the"), NDArray[np.uint8])
    assert_type(tokenizer.decode([0, 1]), str)

    train, val = BlockDataset.from_text(text, tokenizer, block_size=8).split()
    assert_type(train, BlockDataset)
    x, y = train.sample_batch(2)
    assert_type(x, Tensor)

    model = GPT.from_config("lecture", vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8)
    assert_type(model, GPT)
    assert_type(model(x), tuple[Tensor, None])
    assert_type(model(x, y), tuple[Tensor, Tensor])
    assert_type(model.generate(x, 2), Tensor)
    assert_type(model.stream(x, 2), Iterator[Tensor])
    assert_type(BigramLM(4).fit(BlockDataset(torch.arange(4), 2)), BigramLM)

    lm = CharLM(model, tokenizer)
    assert_type(lm.model, LanguageModel)
    assert_type(lm.generate("the", 2), str)
    assert_type(lm.generate(["the", "a"], 2), list[str])
    assert_type(lm.stream("the", 2), Iterator[str])
    assert_type(lm.evaluate("the king"), EvalResult)

    trainer = Trainer(model, train, TrainerConfig(max_steps=1), val_data=val, device="cpu")
    for record in trainer.steps():
        assert_type(record, StepRecord)
        assert_type(record.loss, float)
    assert_type(trainer.result(), TrainResult)
    assert_type(charlm.evaluation.evaluate(model, val), charlm.evaluation.EvalResult)

    lm.save(folder / "model")
    assert_type(load(folder / "model"), CharLM)
    assert_type(GPT.load(folder / "model"), GPT)
    assert_type(LanguageModel.load(folder / "model"), LanguageModel)
