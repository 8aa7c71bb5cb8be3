"""Settings of a training run. No torch here.

The docstring below a field gives its meaning and unit, and is the command line's help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from charlm.config import Config, Range

__all__ = ["ABSENT", "MOST_STEPS", "TrainerConfig", "saved_config"]

MOST_STEPS = 999_999_999_999
"""The most steps of a run, which is as good as no limit."""

_SEED = Range(-(2**63), 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Config):
    """Settings of a `Trainer`: its length, optimizer, learning rate, evaluations and checkpoints.

    The defaults are the recipe for a minute on two cores, `RECIPES["cpu-1min"]`.

    Raises:
        ConfigError: lists every field that is unknown or out of range.

    Example:
        >>> config = TrainerConfig(max_steps=500, learning_rate=3e-4)
        >>> config.replace(batch_size=64).batch_size
        64
    """

    _other_names: ClassVar[Mapping[str, str]] = {
        "adam_beta1": "betas",
        "adam_beta2": "betas",
        "beta1": "betas",
        "beta2": "betas",
        "bf16": "precision",
        "decay_lr": "schedule",
        "dtype": "precision",
        "early_stopping_patience": "patience",
        "eval_steps": "eval_interval",
        "fp16": "precision",
        "grad_norm_clip": "grad_clip",
        "gradient_accumulation_steps": "accumulate",
        "gradient_clip_val": "grad_clip",
        "load_best_model_at_end": "restore_best",
        "logging_steps": "log_interval",
        "lr": "learning_rate",
        "lr_decay_iters": "max_steps",
        "lr_scheduler_type": "schedule",
        "max_grad_norm": "grad_clip",
        "max_iters": "max_steps",
        "max_time": "minutes",
        "min_lr": "min_lr_ratio",
        "optim": "optimizer",
        "per_device_train_batch_size": "batch_size",
        "save_steps": "save_interval",
        "save_total_limit": "keep_last",
        "warmup_iters": "warmup_steps",
    }

    max_steps: Annotated[int, Range(1, MOST_STEPS)] = 1_200
    """Optimizer steps of the whole run; the schedule ends there. With minutes: the most steps (in
    `charlm train` no limit, unless it is given)."""
    minutes: Annotated[float, Range(above=0, maximum=1e6)] | None = None
    """Time of the whole run in minutes, evaluations and checkpoints included. The run makes as many steps as
    fit, at most max_steps, and the learning rate falls by its end. None: the run ends after max_steps."""
    batch_size: Annotated[int, Range(1, 1_048_576)] = 16
    """B, blocks in one forward pass."""
    accumulate: Annotated[int, Range(1, 65_536)] = 1
    """V, forward passes whose gradients are averaged for one step. Several processes share these passes."""
    reduce: Literal["exact", "fast"] = "exact"
    """How several processes sum gradients. exact: in a fixed order, so that any number of processes gives the
    same bits. fast: during the backward pass; the result is close, not equal."""
    seed: Annotated[int, _SEED] = 1337
    """Seed of batches, dropout and samples. (`charlm train` also seeds the initial weights with it.)"""
    replacement: bool = False
    """Draw blocks with replacement, as in the lecture. no: in epochs, each of which shows the text once."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices inside the blocks, AdamW for the rest. adamw: AdamW for all."""
    learning_rate: Annotated[float, Range(0, 1_000)] = 0.007
    """The largest learning rate of the schedule."""
    weight_decay: Annotated[float, Range(0, 1_000)] = 0.1
    """Decoupled weight decay. adamw: of all matrices and embeddings; muon: of Muon's matrices only."""
    betas: tuple[Annotated[float, Range(0, below=1)], Annotated[float, Range(0, below=1)]] = (0.8, 0.95)
    """AdamW's decay rates of the two moments."""
    momentum: Annotated[float, Range(0, below=1)] = 0.85
    """Muon's momentum."""
    grad_clip: Annotated[float, Range(above=0, maximum=1e6)] | None = None
    """Largest global norm of the gradient; a larger gradient is scaled down. None: no limit."""
    nonfinite: Literal["raise", "skip"] = "raise"
    """A step whose loss or gradient is not finite never changes a weight. raise: the run ends with an error.
    skip: the run continues with the next step, unless ten steps in a row were skipped."""
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """Shape of the learning rate after the warm-up. wsd: constant, then linear down."""
    warmup_steps: Annotated[int, Range(0, MOST_STEPS)] = 20
    """Steps of linear rise at the start; in a short run at most half of all steps."""
    cooldown: Annotated[float, Range(0, 1)] = 0.6
    """wsd: share of all steps in which the learning rate falls."""
    min_lr_ratio: Annotated[float, Range(0, 1)] = 0.0
    """Final learning rate, as a share of the largest one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of matrix products; auto lets the device choose. Weights and moments stay float32."""
    compile: bool = False
    """Compile the model with torch.compile, which takes at least half a minute before the first step."""
    eval_interval: Annotated[int, Range(1, MOST_STEPS)] | None = 250
    """Steps between evaluations on the validation text; the last step is evaluated, too. None, with minutes:
    after each fifth of the time, and at least every two minutes (the default of `charlm train --minutes`).
    None, without minutes: after the last step alone. With minutes, evaluations take at most a tenth of the
    time; others are left out."""
    eval_chars: Annotated[int, Range(1, MOST_STEPS)] | None = None
    """The most characters of the validation text that an evaluation scores, spread evenly over it. None: all,
    or with minutes as many as the time allows."""
    log_interval: Annotated[int, Range(1, MOST_STEPS)] = 10
    """Steps between records in metrics.jsonl."""
    save_interval: Annotated[int, Range(1, MOST_STEPS)] | None = None
    """Steps between checkpoints. None: one after each evaluation. A new best evaluation and the last step are
    always saved."""
    sample_interval: Annotated[int, Range(1, MOST_STEPS)] | None = None
    """Steps between samples of text; needs a tokenizer. None: no samples."""
    sample_chars: Annotated[int, Range(1, 10_000)] = 200
    """Characters of a sample."""
    keep_last: Annotated[int, Range(1, 1_000_000)] = 1
    """Number of newest checkpoints to keep."""
    keep_best: Annotated[int, Range(0, 1_000_000)] = 1
    """Number of checkpoints with the lowest validation loss to keep, too."""
    patience: Annotated[int, Range(1, 1_000_000)] | None = None
    """Stop after this many evaluations without a new lowest loss. None: do not stop."""
    restore_best: bool = True
    """At the end, put the weights with the lowest validation loss into the model."""
    max_seconds: Annotated[float, Range(above=0, maximum=1e9)] | None = None
    """Stop after this time in seconds, counted from the first step of this process. The schedule does not
    change. None: no limit."""


ABSENT: Mapping[str, object] = MappingProxyType(
    {
        "max_steps": 2_000,
        "minutes": None,
        "batch_size": 32,
        "accumulate": 1,
        "reduce": "exact",
        "seed": 1337,
        "replacement": True,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "betas": (0.9, 0.99),
        "momentum": 0.95,
        "grad_clip": 1.0,
        "nonfinite": "raise",
        "schedule": "wsd",
        "warmup_steps": 50,
        "cooldown": 0.6,
        "min_lr_ratio": 0.0,
        "precision": "auto",
        "compile": False,
        "eval_interval": 250,
        "eval_chars": None,
        "log_interval": 10,
        "save_interval": None,
        "sample_interval": None,
        "sample_chars": 200,
        "keep_last": 1,
        "keep_best": 1,
        "patience": None,
        "restore_best": True,
        "max_seconds": None,
    }
)
"""The value of a field that a file lacks. It is frozen with the format of the files: a new field is added
with the value that means what was done before it existed, and a new default changes nothing here."""


def saved_config(values: Mapping[str, object]) -> TrainerConfig:
    """Return the settings in a file of a run. A missing field has its value of the time of writing.

    Args:
        values: fields by name.

    Raises:
        ConfigError: lists unknown names and bad values.

    Example:
        >>> saved_config({"max_steps": 10}).optimizer, TrainerConfig(max_steps=10).optimizer
        ('adamw', 'muon')
    """
    return TrainerConfig.from_dict({**ABSENT, **values})


def with_end(config: TrainerConfig, max_steps: int) -> TrainerConfig:
    """Return the settings with a new end in steps; an end in time is removed.

    Raises:
        ConfigError: there is no such number of steps.

    Example:
        >>> with_end(TrainerConfig(minutes=5, eval_interval=None), 100).eval_interval
        20
    """
    config = config.replace(max_steps=max_steps)
    if config.eval_interval is None:  # by the clock
        config = config.replace(eval_interval=-(-config.max_steps // 5))
    return config.replace(minutes=None)
