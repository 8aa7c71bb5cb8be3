"""The learning rate as a pure function of the step, and the steps of an epoch. No state, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from charlm.errors import InputError, shown
from charlm.plain import as_float, blocks_in_epoch
from charlm.training.config import MOST_STEPS, TrainerConfig

__all__ = ["epoch_steps", "learning_rate_at"]


def learning_rate_at(
    step: int, config: TrainerConfig, ends: Sequence[tuple[int, int]] | None = None
) -> float:
    """Return the learning rate of one step.

    The rate rises linearly over `warmup_steps`, at most half of all steps, and reaches its top at the last of
    them. Then "constant" stays there. "linear" and "cosine" fall over all remaining steps. "wsd" (warm-up,
    stable, decay: arXiv:2404.06395) stays there and falls linearly over the last `cooldown` share of all
    steps. A falling rate reaches `min_lr_ratio` of the top one step after the last, so that no step is wasted
    at zero.

    In a run with `minutes` (see `Timetable`) the end of "wsd" is not known beforehand. Then the warm-up does
    not depend on the end, and from each recorded decision on the rate falls from its present value.

    Args:
        step: from 0 to `max_steps - 1`.
        config: learning_rate, schedule, warmup_steps, cooldown, min_lr_ratio and max_steps are used.
        ends: the decisions of the clock, pairs of a step and the end that was fixed there; empty: none yet.
            None: the end is `max_steps`, known from the start.

    Example:
        >>> config = TrainerConfig(max_steps=10, warmup_steps=2, cooldown=0.5, learning_rate=1.0)
        >>> [round(learning_rate_at(step, config), 2) for step in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
        >>> [round(learning_rate_at(step, config, [(2, 6), (4, 9)]), 2) for step in range(9)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.4, 0.3, 0.2, 0.1]
    """
    if ends is not None:
        return _within_a_time(step, config, ends)
    top, total = config.learning_rate, config.max_steps
    warmup = min(config.warmup_steps, total // 2)
    if step < warmup:
        return top * ((step + 1) / warmup)  # in this order, the last one is exactly the top
    if config.schedule == "constant":
        return top
    start = max(warmup, total - round(config.cooldown * total)) if config.schedule == "wsd" else warmup
    if step < start:
        return top
    fallen = min((step - start) / max(total - start, 1), 1.0)  # 0 at the start, 1 after the last step
    if config.schedule == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return top * (config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 - fallen))


def _within_a_time(step: int, config: TrainerConfig, ends: Sequence[tuple[int, int]]) -> float:
    """Return the learning rate of a run whose ends were fixed one after the other."""
    top, lowest = config.learning_rate, config.learning_rate * config.min_lr_ratio
    decided = [pair for pair in ends if pair[0] <= step] if config.schedule == "wsd" else []
    flat_until = decided[0][0] if decided else step
    warmup = max(min(config.warmup_steps, config.max_steps // 2), 1)
    rate = top * min((flat_until + 1) / warmup, 1.0)
    for i, (at, end) in enumerate(decided):
        until = decided[i + 1][0] if i + 1 < len(decided) else step
        rate += (lowest - rate) * min((until - at) / max(end - at, 1), 1.0)
    return rate


def epoch_steps(epochs: float, n_ids: int, block_size: int, config: TrainerConfig) -> int:
    """Compute `steps_for_epochs` from the length of a text."""
    times = as_float(epochs)
    each = blocks_in_epoch(n_ids, block_size) / (config.batch_size * config.accumulate)
    if times is None or not 0 < times * each <= MOST_STEPS:
        raise InputError(
            f"epochs must be above 0 and come to at most {MOST_STEPS:,} steps, got {shown(epochs)}"
        )
    return math.ceil(times * each)
