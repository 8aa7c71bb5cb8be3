"""One training in a process of its own, for benchmarks that measure whole processes.

`python -m benchmarks.train_once SPEC` takes a JSON object and prints one. It does what a user's script does:
load the text, build tokenizer, data, model and trainer, train into a directory, read the result.
Seconds count from the start of the process, imports included.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.common import Json, child, peak_device_memory_bytes, peak_memory_bytes

if TYPE_CHECKING:
    from charlm import BlockDataset, EvalResult, Trainer, TrainerConfig

__all__ = ["Spec", "run"]

_ALL_STEPS = 999_999_999_999
_RANDOM_BATCHES = 200  # as many as nanoGPT takes


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is to be trained."""

    data: str
    """Path of the text, or its name."""
    model: Json
    """Fields of `GPTConfig` but vocab_size."""
    training: Json
    """Fields of `TrainerConfig`; a budget and a number of evaluations replace max_steps and eval_interval."""
    budget: tuple[Literal["steps", "chars", "seconds"], float]
    """What ends the run."""
    evaluations: int
    """How many, evenly spaced, the last one at the end; by the clock in a budget in seconds. 0: at training's
    eval_interval."""
    seed: int
    """Of first weights, batches and dropout."""
    device: str
    """A name for `get_backend`."""
    random_batches: bool = False
    """Also estimate the loss as nanoGPT does, after everything else."""
    most_seconds: float | None = None
    """A clock beside a budget in steps or characters: whichever comes first, and the cool-down fits it."""
    keep: str | None = None
    """A missing or empty folder for the run; None: a temporary one."""
    began: float = 0.0
    """`time.monotonic()` at the start of the process."""


def run(spec: Spec, *, timeout: float | None = None) -> Json:
    """Train in a new process and return what came of it; "process_seconds" is its whole time.

    After `timeout` seconds the process is ended, as in `child`.
    """
    fields = {**asdict(spec), "began": time.monotonic()}  # one clock for all processes of a machine
    done = child(["-m", "benchmarks.train_once", json.dumps(fields)], timeout=timeout)
    return {"seed": spec.seed, "process_seconds": done.seconds, **json.loads(done.output)}


def _train(spec: Spec) -> Json:
    import torch

    from charlm import GPT, BlockDataset, CharTokenizer, GPTConfig, Trainer, TrainerConfig, load_corpus
    from charlm.training import Callback, EvalRecord

    class Clock(Callback):
        def on_evaluate(self, trainer: Trainer, evaluation: EvalRecord) -> None:
            history.append(
                {
                    "step": evaluation.step,
                    "chars_seen": trainer.chars_seen,
                    "seconds": time.monotonic() - spec.began,
                    "loss_nats": evaluation.result.loss_nats,
                }
            )

    history: list[Json] = []
    text = load_corpus(spec.data)
    tokenizer = CharTokenizer.from_text(text)
    config = GPTConfig.from_dict({**spec.model, "vocab_size": tokenizer.vocab_size})
    train, val = BlockDataset.from_text(text, tokenizer, config.block_size).split(0.9)
    torch.manual_seed(spec.seed)
    model = GPT(config)
    training = TrainerConfig.from_dict({**spec.training, "seed": spec.seed, "restore_best": False})
    kind, amount = spec.budget
    if kind == "seconds":
        interval = None if spec.evaluations else training.eval_interval
        whole = len(val.ids)  # the loss is that of the whole validation text
        training = training.replace(
            minutes=amount / 60, max_steps=_ALL_STEPS, eval_interval=interval, eval_chars=whole
        )
    else:
        steps = _steps(kind, amount, train, training)
        training = training.replace(max_steps=steps)
        if spec.evaluations:
            training = training.replace(eval_interval=math.ceil(steps / spec.evaluations))
        if spec.most_seconds is not None:
            training = training.replace(minutes=spec.most_seconds / 60, eval_chars=len(val.ids))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            train,
            training,
            val_data=val,
            tokenizer=tokenizer,
            out_dir=Path(spec.keep) if spec.keep else Path(folder, "run"),
            device=spec.device,
            callbacks=[Clock()],
        )
        trainer.seconds = time.monotonic() - spec.began
        result = trainer.fit()
        seconds = time.monotonic() - spec.began
    outcome: Json = {
        "steps": result.steps,
        "chars_seen": result.chars_seen,
        "parameters": model.num_parameters(),
        "seconds": seconds,
        "final": _values(result.final),
        "best": {**_values(result.best), "step": result.best_step},
        "history": history,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_device_memory_bytes": peak_device_memory_bytes(trainer.backend),
        "device": trainer.backend.name,
        "precision": trainer.precision,
        "threads": torch.get_num_threads(),
        "model": config.to_dict(),
        "training": training.to_dict(),
    }
    if spec.random_batches:
        outcome["random_batches"] = _random_batches(trainer, val, training.batch_size)
    return outcome


def _steps(
    kind: Literal["steps", "chars"], amount: float, train: BlockDataset, training: TrainerConfig
) -> int:
    if kind == "steps":
        return int(amount)
    return max(1, int(amount) // (training.batch_size * training.accumulate * train.block_size))


def _values(result: EvalResult | None) -> Json:
    if result is None:
        raise SystemExit("error: the run ended without an evaluation")
    return {
        "loss_nats": result.loss_nats,
        "bits_per_char": result.bits_per_char,
        "accuracy": result.accuracy,
        "n_chars": result.n_chars,
    }


def _random_batches(trainer: Trainer, val: BlockDataset, batch_size: int) -> Json:
    """Estimate the loss of the final weights as nanoGPT does: the mean over batches drawn at random."""
    import torch

    generator = torch.Generator().manual_seed(1337)
    trainer.model.eval()
    losses = []
    for _ in range(_RANDOM_BATCHES):
        x, y = trainer.backend.to_device(*val.sample_batch(batch_size, generator=generator))  # (B, T)
        with torch.no_grad():
            losses.append(float(trainer.model(x, y)[1]))
    return {
        "protocol": f"nanoGPT's: mean of {_RANDOM_BATCHES} random batches of {batch_size} blocks",
        "loss_nats": statistics.fmean(losses),
        "standard_error": statistics.stdev(losses) / math.sqrt(_RANDOM_BATCHES),
    }


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    print(json.dumps(_train(Spec(**{**spec, "budget": tuple(spec["budget"])})), allow_nan=False))
