"""A small text, small runs on it, and what two runs are compared by."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from charlm.data.blocks import BlockDataset
from charlm.errors import CharLMError
from charlm.text.tokenizer import CharTokenizer
from charlm.training.callbacks import Callback
from charlm.training.config import TrainerConfig
from charlm.training.records import StepRecord
from charlm.training.trainer import Trainer

__all__ = [
    "TEXT",
    "TOKENIZER",
    "Noise",
    "Numbers",
    "PlainModule",
    "global_generators",
    "quick_config",
    "same_tensors",
    "tensors_of",
    "tiny_split",
]


def _text(length: int = 4_000) -> str:
    """Return words of three syllables drawn at random: a bigram model can learn a part of it."""
    draw = random.Random(5)
    words = iter(lambda: "".join(draw.choices(["ba", "de", "fi"], k=3)) + draw.choice("   \n"), "")
    return "".join(next(words) for _ in range(length // 7))


TEXT = _text()
TOKENIZER = CharTokenizer.from_text(TEXT)


def tiny_split(block_size: int = 8, text: str = TEXT) -> tuple[BlockDataset, BlockDataset]:
    """Return training and validation blocks of the text."""
    return BlockDataset.from_text(text, TOKENIZER, block_size).split()


def quick_config(**changes: object) -> TrainerConfig:
    """Return settings of a short run in float32, with what the golden runs were trained with."""
    base: dict[str, object] = {
        "max_steps": 12,
        "batch_size": 4,
        "replacement": True,
        "optimizer": "adamw",
        "learning_rate": 0.05,
        "betas": (0.9, 0.99),
        "momentum": 0.95,
        "grad_clip": 1.0,
        "warmup_steps": 2,
        "precision": "fp32",
        "eval_interval": 4,
        "log_interval": 1,
    }
    return TrainerConfig.from_dict({**base, **changes})


class Numbers(Callback):
    """Keeps every step's number, loss, learning rate and gradient norm."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float, float, float]] = []

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.steps.append((record.step, record.loss, record.learning_rate, record.grad_norm))


class Noise(Callback):
    """Draws from every global generator and keeps what it drew across a resume."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        legacy = np.random.normal()  # noqa: NPY002 - the global generator is the point
        self.drawn += [float(torch.rand(())), legacy, random.gauss(0, 1)]

    @override
    def state(self) -> Mapping[str, object]:
        return {"drawn": self.drawn}

    @override
    def load_state(self, state: Mapping[str, object]) -> None:
        drawn = state["drawn"]
        if not isinstance(drawn, list):
            raise CharLMError("drawn must be a list")
        self.drawn = drawn


class PlainModule(nn.Module):
    """A model that is no LanguageModel: one embedding, one layer."""

    def __init__(self, vocab_size: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.output = nn.Linear(width, vocab_size)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    @override
    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.output(self.embedding(idx))  # (B, T, V)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return copies of the model's tensors and of the optimizers' state, by name."""
    found = {f"model.{name}": t.clone() for name, t in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.named_parameters():
        for optimizer in trainer.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"{key}.{name}"] = value.clone()
    return found


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Say whether two sets of tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def global_generators() -> list[object]:
    """Return the states of torch's, numpy's and Python's own generators, to be compared."""
    _, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the global generator is the point
    return [torch.get_rng_state().tolist(), np.asarray(keys).tolist(), rest, random.getstate()]
