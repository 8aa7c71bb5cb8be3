"""How many steps fit into a time: measured once, before the schedule is fixed.

A budget in seconds becomes a number of steps by running a few of them on a copy of the model. After that
the run knows only the number, so that repeating it with that number gives the same bits.
"""

from __future__ import annotations

import copy
import statistics
import time

from charlm.backends.base import DeviceBackend
from charlm.data.blocks import BlockDataset
from charlm.errors import InputError, shown
from charlm.models.base import LanguageModel
from charlm.training.config import TrainerConfig
from charlm.training.trainer import Trainer

__all__ = ["steps_within"]

_WARM_UP, _MEASURED = 3, 12
_MOST_SECONDS, _MOST_STEPS = 1e9, 999_999_999_999


def steps_within(
    seconds: float,
    model: LanguageModel,
    train_data: BlockDataset,
    config: TrainerConfig,
    *,
    val_data: BlockDataset | None = None,
    evaluations: int = 0,
    device: str | DeviceBackend = "auto",
) -> int:
    """Return how many steps of training fit into a time on this machine.

    The model, the data and torch's generators stay as they are; only a copy is trained.

    Args:
        seconds: the time, evaluations included; what this measurement takes is subtracted.
        model: what is to be trained.
        train_data: where its batches come from.
        config: the settings; `max_steps` and `warmup_steps` are ignored.
        val_data: the validation text.
        evaluations: how many evaluations over it the run will make.
        device: where it will run.

    Returns:
        At least 1.

    Raises:
        InputError: `seconds` is no positive number, or above 1e9.

    Example:
        >>> from charlm import BigramLM, CharTokenizer
        >>> data = BlockDataset.from_text("to be or not to be " * 9, CharTokenizer("benort "), block_size=8)
        >>> steps_within(0.5, BigramLM(7), data, TrainerConfig(), device="cpu") > 1
        True
    """
    if type(seconds) not in (int, float) or not 0 < seconds <= _MOST_SECONDS:
        raise InputError(f"seconds must be above 0 and at most {_MOST_SECONDS:.0e}, got {shown(seconds)}")
    began = time.perf_counter()
    # A learning rate of 0 costs as much as any other, and cannot diverge.
    trial = config.replace(
        max_steps=_WARM_UP + _MEASURED,
        warmup_steps=0,
        learning_rate=0.0,
        sample_interval=None,
        max_seconds=None,
    )
    trainer = Trainer(copy.deepcopy(model), train_data, trial, device=device)
    times = []
    for _ in trainer.steps():
        trainer.backend.synchronize()
        times.append(time.perf_counter())
    step_seconds = statistics.median(
        b - a for a, b in zip(times[_WARM_UP - 1 :], times[_WARM_UP:], strict=False)
    )
    evaluation_seconds = 0.0
    if val_data is not None and evaluations:
        before = time.perf_counter()
        trainer.evaluate(val_data)
        evaluation_seconds = time.perf_counter() - before
    left = seconds - (time.perf_counter() - began) - evaluations * evaluation_seconds
    return min(max(1, int(left / step_seconds)), _MOST_STEPS)
