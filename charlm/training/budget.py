"""The number of steps that fit into a time, or that make some epochs.

The first is estimated from a few steps of a copy of the model. A run with `minutes` needs no estimate, since
it watches the clock. Use one to know the end of a cosine schedule beforehand, or to judge a time before the
start.
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
    """Estimates of the number of steps that fit into a time, each at least 1."""

    steps: int
    """From the median of the measurements."""
    fewest: int
    """From the slowest measurement."""
    most: int
    """From the fastest measurement."""
    step_seconds: float
    """Median time of a step."""


def steps_for_epochs(epochs: float, train_data: BlockDataset, config: TrainerConfig) -> int:
    """Return the number of steps of some epochs, for `max_steps`.

    Args:
        epochs: above 0, such as 0.5 or 3.
        train_data: the text.
        config: of the training; batch_size and accumulate are used.

    Returns:
        The number of steps, rounded up.

    Raises:
        InputError: `epochs` is not above 0, or gives too many steps.

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
    """Estimate the number of training steps that fit into a time on this machine, from three measurements.

    A copy of the model is trained; the model, the data and torch's generators do not change.

    Args:
        seconds: the time, evaluations included; the time of this measurement is subtracted.
        model: the model to be trained.
        train_data: the training text.
        config: the settings; `max_steps`, `minutes` and `warmup_steps` are ignored.
        val_data: the validation text.
        evaluations: the number of evaluations that the run will make.
        device: the device of the run.

    Returns:
        The estimate and its range. Another load on the machine may change both.

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
    # A learning rate of 0 takes as long as any other, and cannot diverge.
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
