"""How many steps fit into a time or go through a text so many times.

The first is an estimate, from a few steps of a copy of the model. A run with `minutes` needs none, as it
looks at the clock throughout. This is for what must be known before: the end of a cosine, or whether a time
is worth the start.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

from charlm.backends.base import DeviceBackend
from charlm.backends.world import alone
from charlm.data.blocks import BlockDataset
from charlm.errors import InputError, shown
from charlm.models.base import LanguageModel
from charlm.plain import as_float, int_from
from charlm.training.config import MOST_STEPS, TrainerConfig
from charlm.training.schedules import epoch_steps
from charlm.training.trainer import Trainer

__all__ = ["StepsEstimate", "steps_for_epochs", "steps_within"]

_WARM_UP, _MEASUREMENTS, _STEPS = 3, 3, 4
_MOST_SECONDS = 1e9


@dataclass(frozen=True)
class StepsEstimate:
    """How many steps may fit into a time, each number at least 1."""

    steps: int
    """By the median of the measurements."""
    fewest: int
    """By the slowest of them."""
    most: int
    """By the fastest."""
    step_seconds: float
    """Of one step, the median."""


def steps_for_epochs(epochs: float, train_data: BlockDataset, config: TrainerConfig) -> int:
    """Return how many steps go through a text so many times: the `max_steps` of that many epochs.

    Args:
        epochs: above 0, such as 0.5 or 3.
        train_data: the text.
        config: of the training; batch_size and accumulate are used.

    Returns:
        Steps, rounded up.

    Raises:
        InputError: `epochs` is no such number, or more than a training can have.

    Example:
        >>> import torch
        >>> data = BlockDataset(torch.arange(1_010) % 9, block_size=10)  # 100 blocks in an epoch
        >>> steps_for_epochs(2, data, TrainerConfig(batch_size=8))
        25
    """
    return epoch_steps(epochs, train_data.n_ids, train_data.block_size, config)


def steps_within(
    seconds: float,
    model: LanguageModel,
    train_data: BlockDataset,
    config: TrainerConfig,
    *,
    val_data: BlockDataset | None = None,
    evaluations: int = 0,
    device: str | DeviceBackend = "auto",
) -> StepsEstimate:
    """Estimate how many steps of training fit into a time on this machine, from three short measurements.

    The model, the data and torch's generators stay as they are; only a copy is trained.

    Args:
        seconds: the time, evaluations included; what this measurement takes is subtracted.
        model: what is to be trained.
        train_data: where its batches come from.
        config: the settings; `max_steps`, `minutes` and `warmup_steps` are ignored.
        val_data: the validation text.
        evaluations: how many evaluations over it the run will make.
        device: where it will run.

    Returns:
        The estimate, and how far the measurements lie apart. A machine that is about to do something else
        keeps to neither.

    Raises:
        InputError: `seconds` is no positive number, or above 1e9.

    Example:
        >>> from charlm import BigramLM, CharTokenizer
        >>> data = BlockDataset.from_text("to be or not to be " * 9, CharTokenizer("benort "), block_size=8)
        >>> steps_within(0.5, BigramLM(7), data, TrainerConfig(), device="cpu").steps > 1
        True
    """
    budget = as_float(seconds)
    if budget is None or not 0 < budget <= _MOST_SECONDS:
        raise InputError(f"seconds must be above 0 and at most {_MOST_SECONDS:.0e}, got {shown(seconds)}")
    evaluations = int_from(0, evaluations, "evaluations")
    began = time.perf_counter()
    # A learning rate of 0 costs as much as any other, and cannot diverge.
    trial = config.replace(
        max_steps=_WARM_UP + _MEASUREMENTS * _STEPS,
        minutes=None,
        warmup_steps=0,
        learning_rate=0.0,
        sample_interval=None,
        max_seconds=None,
    )
    with alone():
        trainer = Trainer(copy.deepcopy(model), train_data, trial, device=device)
    times = []
    for _ in trainer.steps():
        trainer.backend.synchronize()
        times.append(time.perf_counter())
    taken = [b - a for a, b in zip(times[_WARM_UP - 1 :], times[_WARM_UP:], strict=False)]
    medians = sorted(statistics.median(taken[i : i + _STEPS]) for i in range(0, len(taken), _STEPS))
    evaluation_seconds = 0.0
    if val_data is not None and evaluations:
        before = time.perf_counter()
        trainer.evaluate(val_data)
        evaluation_seconds = time.perf_counter() - before
    left = budget - (time.perf_counter() - began) - evaluations * evaluation_seconds
    fastest, *_, slowest = medians
    step_seconds = statistics.median(medians)
    steps, fewest, most = (
        min(max(1, int(left / each)), MOST_STEPS) for each in (step_seconds, slowest, fastest)
    )
    return StepsEstimate(steps, fewest, most, step_seconds)
