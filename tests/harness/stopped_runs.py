"""Runs of 200 tiny steps in several configurations, and everything that two of them are compared by.

Called as a program, it resumes a run in a process of its own: `python stopped_runs.py KIND DIRECTORY` writes
what the run came to as JSON.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from harness.tiny_models import tiny_config, tiny_gpt
from harness.tiny_training import TOKENIZER, Noise, Numbers, quick_config, tiny_split
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from typing_extensions import override

from charlm import BigramLM, BlockDataset, DeviceBackend, LanguageModel, Trainer
from charlm.backends.base import Precision
from charlm.files import safetensors
from charlm.runs.checkpoint import read_checkpoint
from charlm.runs.log import read_metrics
from charlm.training import Callback, StepRecord, list_checkpoints

__all__ = [
    "FOUR_KINDS",
    "KINDS",
    "STEPS",
    "StopAt",
    "assert_equal",
    "callbacks",
    "digests",
    "kind_data",
    "kind_model",
    "kind_trainer",
    "outcome",
    "outcome_on_disk",
    "resumed",
    "seed_generators",
]

STEPS = 200
SIZE = {"vocab_size": TOKENIZER.vocab_size, "n_embd": 8, "n_layer": 1, "n_head": 2, "block_size": 4}

KINDS: dict[str, tuple[dict[str, object] | None, dict[str, object]]] = {
    "bigram": (None, {"learning_rate": 0.3}),
    "gpt": ({}, {"learning_rate": 0.1, "schedule": "cosine"}),
    "gpt with dropout and accumulation": ({"dropout": 0.3}, {"accumulate": 4}),
    "gpt in bf16 with warm-up and muon": ({}, {"precision": "bf16", "warmup_steps": 60, "optimizer": "muon"}),
    "gpt in fp16 with a scaler": ({}, {"precision": "fp16", "optimizer": "muon", "learning_rate": 0.1}),
}
"""The model's settings (None: a bigram model), and those of the training, by name."""

FOUR_KINDS = tuple(KINDS)[:4]


class HalfBackend(DeviceBackend):
    """The CPU with fp16, and a scaler that grows often enough to overflow several times in a short run."""

    @override
    def supported_precisions(self) -> tuple[Precision, ...]:
        return ("fp16", "fp32")

    @override
    def scaler(self, precision: Precision) -> GradScaler | None:
        return GradScaler("cpu", init_scale=2.0**14, growth_interval=7) if precision == "fp16" else None


class StopAt(Callback):
    """Asks the trainer to stop in one step, as a signal handler would; in none while `step` is 0."""

    step = 0

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == self.step:
            trainer.interrupt()


def callbacks() -> tuple[Noise, Numbers, StopAt]:
    """Return the callbacks of every run: one with a state, one that keeps figures, one that stops."""
    return Noise(), Numbers(), StopAt()


def seed_generators(seed: int = 3) -> None:
    """Seed the generators that belong to the caller."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global generator is the point
    random.seed(seed)


def kind_model(kind: str) -> LanguageModel:
    """Return a new model, always with the same weights."""
    changes, _ = KINDS[kind]
    if changes is not None:
        return tiny_gpt(tiny_config("gpt2", **{**SIZE, **changes}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BigramLM(TOKENIZER.vocab_size)


def kind_data() -> tuple[BlockDataset, BlockDataset]:
    """Return blocks to train on, and few enough for validation that it takes a moment."""
    train, val = tiny_split(4)
    return train, BlockDataset(val.ids[:65], 4)


def device_of(kind: str) -> DeviceBackend | str:
    """Return the device that can do what the kind asks for."""
    return HalfBackend("cpu") if "fp16" in kind else "cpu"


def kind_trainer(
    kind: str, out_dir: Path | None, listeners: Sequence[Callback] = (), **changes: object
) -> Trainer:
    """Return the trainer of a new run; each step is logged, and checkpoints are pruned."""
    settings: dict[str, object] = {
        "max_steps": STEPS,
        "batch_size": 2,
        "learning_rate": 0.3,  # so high that the best evaluation is not the last
        "schedule": "constant",
        "eval_interval": 7,
        "save_interval": 5,
        "sample_interval": 19,
        "sample_chars": 3,
        "keep_last": 2,
        "patience": 1_000,  # counts, and never ends the run
    }
    train, val = kind_data()
    return Trainer(
        kind_model(kind),
        train,
        quick_config(**{**settings, **KINDS[kind][1], **changes}),
        val_data=val,
        tokenizer=TOKENIZER,
        device=device_of(kind),
        out_dir=out_dir,
        callbacks=listeners,
    )


def resumed(kind: str, out_dir: Path) -> dict[str, Any]:
    """Go on with a run to its end, after other work, and return what it came to."""
    seed_generators(99)
    listeners = callbacks()
    train, val = kind_data()
    trainer = Trainer.resume(out_dir, train, val_data=val, device=device_of(kind), callbacks=listeners)
    trainer.fit()
    return outcome(trainer, listeners[1])


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the sha256 of each tensor's bytes, and its type."""
    data = {name: t.detach().flatten().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
    return {name: f"{tensors[name].dtype} {hashlib.sha256(data[name]).hexdigest()}" for name in data}


def outcome(trainer: Trainer, numbers: Numbers) -> dict[str, Any]:
    """Return all that a finished run came to, as JSON has it: two equal runs have equal outcomes."""
    assert trainer.out_dir is not None
    found = {"steps": numbers.steps, "model at the end": digests(trainer.model.state_dict())}
    result: dict[str, Any] = json.loads(json.dumps({**found, **outcome_on_disk(trainer.out_dir)}))
    return result


def outcome_on_disk(run: Path, *, generators: bool = True) -> dict[str, Any]:
    """Return what a run's newest checkpoint and its log hold, as JSON has it.

    Left out is what differs between any two runs: ids, seconds, speeds.

    Args:
        run: its directory.
        generators: whether the states of the caller's own generators belong to it.
    """
    last = read_checkpoint(list_checkpoints(run)[-1].path)
    state = {key: value for key, value in last.state.items() if key not in {"run_id", "save_id", "seconds"}}
    for name in ("best", "last"):
        evaluation = state[name]
        assert isinstance(evaluation, dict)
        state[name] = {key: value for key, value in evaluation.items() if key != "seconds"}
    train = digests(safetensors.loads(last.files["train.safetensors"], path="train.safetensors")[0])
    if not generators:
        del state["rng"]
        train = {name: digest for name, digest in train.items() if not name.startswith("rng.")}
    records = [
        {key: value for key, value in record.items() if key not in {"seconds", "chars_per_second"}}
        for record in read_metrics(run / "metrics.jsonl")
    ]
    found = {
        "state": state,
        "metrics": records,
        "model.safetensors": digests(
            safetensors.loads(last.files["model.safetensors"], path="model.safetensors")[0]
        ),
        "train.safetensors": train,
    }
    result: dict[str, Any] = json.loads(json.dumps(found))
    return result


def assert_equal(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Name the first part in which two outcomes differ."""
    assert found.keys() == wanted.keys(), what
    for part, value in wanted.items():
        if found[part] == value:
            continue
        if isinstance(value, list):
            pairs = zip(found[part], value, strict=False)
            lengths = f"{len(found[part])} items, not {len(value)}"
            at = next((f"{one} is not {other}" for one, other in pairs if one != other), lengths)
        else:
            at = ", ".join(str(key) for key in value if found[part].get(key) != value[key])
        raise AssertionError(f"{what}: {part} differ: {at}")


if __name__ == "__main__":
    print(json.dumps(resumed(sys.argv[1], Path(sys.argv[2]))))
