"""Runs of eight micro-batches a step, to be shared out over processes, and what they come to.

As a program under torchrun, `shares.py FILE` writes what the runs come to in a world of real processes.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from harness.stopped_runs import HalfBackend
from harness.tiny_models import tiny_gpt
from harness.tiny_training import (
    TEXT,
    TOKENIZER,
    Numbers,
    PlainModule,
    quick_config,
    tensors_of,
    tiny_split,
)
from torch import Tensor, nn
from typing_extensions import override

from charlm import BlockDataset, DeviceBackend, GPTConfig, Trainer
from charlm.backends.world import join, leave
from charlm.errors import CharLMError

__all__ = ["KINDS", "digest", "outcome"]

SIZE = {"vocab_size": TOKENIZER.vocab_size, "n_embd": 8, "n_layer": 1, "n_head": 2, "block_size": 8}


class SomeUnused(nn.Module):
    """Has hundreds of small parameters, some of which have a gradient in some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(TOKENIZER.vocab_size, 5, sparse=True)
        self.scales = nn.ParameterList([nn.Parameter(torch.full((), 1 / (i + 1))) for i in range(300)])
        self.never = nn.Parameter(torch.ones(3))
        self.output = nn.Linear(5, TOKENIZER.vocab_size)

    @override
    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scales[int(idx[0, :3].sum()) * 7 % 300]
        logits = self.output(self.rows(idx) * scale)  # (B, T, V)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@functools.cache  # drawn once, in one thread: the generator is everybody's
def model_of(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if kind == "plain":
            return PlainModule(TOKENIZER.vocab_size, width=3)
        if kind == "unused":
            return SomeUnused()
    return tiny_gpt(GPTConfig.from_dict({**SIZE, "dropout": 0.3 if kind == "dropout" else 0.0}))


KINDS: dict[str, dict[str, object]] = {
    "adamw": {},
    "muon": {"optimizer": "muon", "grad_clip": 0.1},
    "dropout": {"replacement": False},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "optimizer": "muon", "learning_rate": 0.1},
    "plain": {},
    "unused": {},
    "documents": {"replacement": False},
}


def documents() -> tuple[BlockDataset, BlockDataset]:
    """Return training and validation blocks of documents with weights."""
    texts = [TEXT[:900], TEXT[900:910], TEXT[910:1_700], TEXT[1_700:2_400]]
    return BlockDataset.from_texts(texts, TOKENIZER, 8, weights=[1, 1, 2.5, 1]).split()


def outcome(kind: str, **changes: object) -> tuple[list[tuple[int, float, float, float]], dict[str, Tensor]]:
    """Return the numbers of each step and all tensors at the end, the losses of evaluations among them."""
    train, val = documents() if kind == "documents" else tiny_split()
    numbers = Numbers()
    config = quick_config(**{"max_steps": 6, "batch_size": 1, "accumulate": 8, **KINDS[kind], **changes})
    trainer = Trainer(
        copy.deepcopy(model_of(kind)),
        train,
        config,
        val_data=val,
        device=HalfBackend("cpu") if kind == "fp16" else "cpu",
        callbacks=[numbers],
    )
    trainer.fit()
    tensors = tensors_of(trainer)
    tensors["evaluations"] = torch.tensor(
        [record.result.loss_nats for record in trainer.history], dtype=torch.float64
    )
    if trainer.scaler is not None:
        tensors["scale"] = torch.tensor(trainer.scaler.get_scale())
    return numbers.steps, tensors


def digest(kind: str, **changes: object) -> str:
    """Return the sha256 of all that a run comes to."""
    found = hashlib.sha256()
    for name, tensor in sorted(outcome(kind, **changes)[1].items()):
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def _fails(error: Exception, rank: int, **changes: object) -> str:
    """Let a process fail in the third step, and return what is said of it in this one."""
    trainer = Trainer(
        copy.deepcopy(model_of("plain")),
        tiny_split()[0],
        quick_config(**{"batch_size": 1, "accumulate": 8, **changes}),
        device="cpu",
    )
    backward = trainer._stepper._backward

    def fail(step: int, model: nn.Module, micro: int, count: int) -> Tensor:
        if step == 2 and rank == 1:
            raise error
        return backward(step, model, micro, count)

    trainer._stepper._backward = fail  # type: ignore[method-assign]
    try:
        trainer.fit()
    except (CharLMError, MemoryError) as said:
        return f"{type(said).__name__}: {said}"
    return "no error"


def main(file: Path) -> None:
    """Write the digests of all kinds, whether they are the same everywhere, and what is said of failures."""
    world = join(DeviceBackend())
    found: dict[str, object] = {kind: digest(kind) for kind in KINDS}
    found["differing"] = world.differing({name: str(value) for name, value in found.items()})
    exact, fast = outcome("adamw")[1], outcome("adamw", reduce="fast")[1]
    found["drift"] = max(float((exact[name] - fast[name]).abs().max()) for name in exact)
    found["told"] = _fails(MemoryError("no room"), world.rank)
    fast_one = _fails(MemoryError("no room"), world.rank, reduce="fast")
    if world.is_first:
        file.write_text(json.dumps({**found, "gone": fast_one}), encoding="utf-8")
    leave()
    os._exit(0)  # as the command does: gloo makes an end abort now and then


if __name__ == "__main__":
    main(Path(sys.argv[1]))
