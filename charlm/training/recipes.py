"""How to train each preset, and which preset a machine, a text and a time call for.

The recipes were found on Tiny Shakespeare and confirmed on another text; docs/experiments.md has what was
tried, and docs/benchmarks.md what each of them reaches. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from charlm.models.config import PRESETS, PresetName
from charlm.training.config import TrainerConfig

__all__ = ["RECIPES", "Recommendation", "recommend"]

RECIPES: Mapping[PresetName, TrainerConfig] = MappingProxyType(
    {
        "lecture": TrainerConfig(
            max_steps=5_000,
            batch_size=64,
            replacement=True,
            optimizer="adamw",
            learning_rate=3e-4,
            weight_decay=0.01,
            betas=(0.9, 0.999),
            momentum=0.95,
            schedule="constant",
            warmup_steps=0,
            eval_interval=500,
        ),
        "gpt2": TrainerConfig(
            max_steps=5_000,
            batch_size=12,
            replacement=True,
            optimizer="adamw",
            learning_rate=6e-4,
            betas=(0.9, 0.95),
            momentum=0.95,
            grad_clip=1.0,
            schedule="cosine",
            warmup_steps=100,
            min_lr_ratio=0.1,
        ),
        "cpu-10s": TrainerConfig(max_steps=500, learning_rate=0.015),
        "cpu-1min": TrainerConfig(),
        "cpu-5min": TrainerConfig(max_steps=2_000, batch_size=8, learning_rate=0.006),
    }
)
"""How to train each preset of `charlm.models.config.PRESETS`; `RECIPES[name].replace(...)` changes fields."""


@dataclass(frozen=True)
class Recommendation:
    """A preset, and what a text changes in it."""

    preset: PresetName
    """Where to begin."""
    changes: Mapping[str, object]
    """Fields of the preset to replace."""
    most_chars: int
    """Characters to train on, repetitions included, beyond which a text is only learnt by heart."""
    reasons: tuple[str, ...]
    """Why, each a clause for a person to read."""


_BY_MINUTES: tuple[tuple[float, PresetName], ...] = (
    (2.5, "cpu-5min"),
    (0.5, "cpu-1min"),
    (0.0, "cpu-10s"),
)
_BY_LENGTH: tuple[tuple[int, PresetName], ...] = (
    (200_000, "cpu-5min"),
    (50_000, "cpu-1min"),
    (0, "cpu-10s"),
)
_GPU_SPEED = 20  # how much further a minute goes on a GPU than on two cores, roughly
_MOST_EPOCHS: Mapping[PresetName, int] = {"cpu-10s": 10, "cpu-1min": 8, "cpu-5min": 8}


def recommend(
    train_chars: int, val_chars: int | None, *, minutes: float | None = None, on_gpu: bool = False
) -> Recommendation:
    """Choose a preset for a text and a time, and fit it to a short text.

    Args:
        train_chars: characters to train on.
        val_chars: characters for validation; None: there are none.
        minutes: how long the training may take; None: about one.
        on_gpu: whether it will run on one. The presets were measured on two cores; a GPU gets the one for
            twenty times the time.

    Returns:
        The preset, and which of its fields to change.

    Example:
        >>> recommend(1_000_000, 100_000, minutes=5).preset
        'cpu-5min'
        >>> short = recommend(3_000, 40, minutes=5)
        >>> short.preset, short.changes, short.most_chars
        ('cpu-10s', {'block_size': 32}, 30000)
    """
    time = 1.0 if minutes is None else minutes
    allowed = next(
        i for i, (least, _) in enumerate(_BY_MINUTES) if time * (_GPU_SPEED if on_gpu else 1) >= least
    )
    sensible = next(i for i, (least, _) in enumerate(_BY_LENGTH) if train_chars >= least)
    preset = _BY_MINUTES[max(allowed, sensible)][1]
    reasons = [f"for {time:g} min on {'a GPU' if on_gpu else 'a CPU'}"]
    if sensible > allowed:
        reasons = [f"as the text is short ({train_chars:,} characters to train on)"]

    changes: dict[str, object] = {}
    longest = (train_chars if val_chars is None else min(train_chars, val_chars)) - 1
    if PRESETS[preset]["block_size"] > longest > 0:
        changes["block_size"] = 2 ** (longest.bit_length() - 1)
        reasons.append("with blocks that fit into the shorter part of the text")
    return Recommendation(preset, changes, _MOST_EPOCHS[preset] * train_chars, tuple(reasons))
