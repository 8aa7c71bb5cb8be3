"""The learning rate from its description, in exact fractions: rise, plateau, fall."""

from __future__ import annotations

import math
from fractions import Fraction

from charlm.training.config import TrainerConfig

__all__ = ["plain_learning_rate"]


def plain_learning_rate(step: int, config: TrainerConfig) -> float:
    """Return the learning rate of a step: the top times a share between 0 and 1."""
    top, low = Fraction(config.learning_rate), Fraction(config.min_lr_ratio)
    steps, rising = config.max_steps, min(config.warmup_steps, config.max_steps // 2)
    if step < rising:
        return float(top * Fraction(step + 1, rising))
    if config.schedule == "constant":
        return float(top)
    falling = steps - rising
    if config.schedule == "wsd":
        falling = min(falling, round(config.cooldown * steps))
    done = step - (steps - falling)  # steps of the fall that came before this one
    if done < 0:
        return float(top)
    share = Fraction(done, falling)
    if config.schedule == "cosine":
        share = Fraction(1 - math.cos(math.pi * done / falling)) / 2
    return float(top * (1 - share * (1 - low)))
