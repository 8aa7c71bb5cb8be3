"""Recipes for training each preset, and the choice of a preset for a machine, a text and a time. No torch.

The recipes were found on Tiny Shakespeare and confirmed on another text. docs/experiments.md lists the
experiments, and docs/benchmarks.md the results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from charlm.errors import InputError, shown
from charlm.models.config import PRESETS, PresetName
from charlm.plain import as_float, int_from
from charlm.training.config import TrainerConfig

if TYPE_CHECKING:
    from charlm.text.tokenizer import Unit

__all__ = ["RECIPES", "Recommendation", "recommend"]


@dataclass(frozen=True)
class _Preset:
    """Recipe and limits of a preset."""

    recipe: TrainerConfig
    minutes: float | None = None
    """Least minutes on two cores for which it is recommended; None: it is never recommended."""
    chars: int = 0
    """Least characters to train on for which it is recommended."""
    epochs: int = 0
    """The most epochs before a model only memorises the text; with a convolution, a few do most."""


_PRESETS: Mapping[PresetName, _Preset] = {
    "lecture": _Preset(
        TrainerConfig(
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
        )
    ),
    "gpt2": _Preset(
        TrainerConfig(
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
        )
    ),
    "cpu-10s": _Preset(TrainerConfig(max_steps=500, learning_rate=0.015), minutes=0.0, epochs=5),
    "cpu-1min": _Preset(TrainerConfig(), minutes=0.5, chars=50_000, epochs=3),
    "cpu-5min": _Preset(
        TrainerConfig(max_steps=1_500, batch_size=8, learning_rate=0.006),
        minutes=2.5,
        chars=200_000,
        epochs=3,
    ),
}
"""All presets; those with minutes in increasing order."""

RECIPES: Mapping[PresetName, TrainerConfig] = MappingProxyType(
    {name: preset.recipe for name, preset in _PRESETS.items()}
)
"""The settings for training each preset of `charlm.models.config.PRESETS`. `RECIPES[name].replace(...)`
changes fields."""

_CONV_WIDTH = 5
_GPU_SPEED = 20  # rough speed of a GPU, relative to two cores


@dataclass(frozen=True)
class Recommendation:
    """A preset and the changes to it that a text needs."""

    preset: PresetName
    """The name of the preset."""
    changes: Mapping[str, object]
    """Fields of the preset to replace."""
    most_chars: int
    """Training on more characters than this, repetitions included, only memorises the text."""
    reasons: tuple[str, ...]
    """The reasons, each a clause for a person to read."""


def recommend(
    train_chars: int,
    val_chars: int | None,
    *,
    minutes: float | None = None,
    on_gpu: bool = False,
    unit: Unit = "character",
) -> Recommendation:
    """Choose a preset for a text and a time, and adapt it to a short text.

    Args:
        train_chars: characters to train on.
        val_chars: characters for validation; None: there are none.
        minutes: time for the training; None: about one minute.
        on_gpu: whether it will run on a GPU. The presets were measured on two cores; for a GPU, the preset
            for twenty times the time is chosen.
        unit: the unit of the numbers, for the reasons.

    Returns:
        The preset and its changes.

    Raises:
        InputError: `minutes` is not above 0, or a number of characters is below 0.

    Example:
        >>> recommend(1_000_000, 100_000, minutes=5).preset
        'cpu-5min'
        >>> short = recommend(3_000, 40, minutes=5)
        >>> short.preset, short.changes, short.most_chars
        ('cpu-10s', {'block_size': 32}, 15000)
    """
    train_chars = int_from(0, train_chars, "train_chars")
    val_chars = None if val_chars is None else int_from(0, val_chars, "val_chars")
    time = 1.0 if minutes is None else as_float(minutes)
    if time is None or not time > 0:
        raise InputError(f"minutes must be above 0, got {shown(minutes)}")
    speed = _GPU_SPEED if on_gpu else 1
    sizes = {name: (one.minutes, one.chars) for name, one in _PRESETS.items() if one.minutes is not None}
    allowed = [name for name, (least, _) in sizes.items() if least <= time * speed]
    sensible = [name for name, (_, least) in sizes.items() if least <= train_chars]
    preset = min(allowed, sensible, key=len)[-1]
    reasons = [f"for {time:g} min on {'a GPU' if on_gpu else 'a CPU'}"]
    if len(sensible) < len(allowed):
        reasons = [f"as the text is short ({train_chars:,} {unit}s to train on)"]

    changes: dict[str, object] = {}
    chosen, fields = _PRESETS[preset], PRESETS[preset]
    if fields["conv_width"] == 1:
        changes["conv_width"] = _CONV_WIDTH
        reasons.append("with a convolution")
    longest = (train_chars if val_chars is None else min(train_chars, val_chars)) - 1
    if fields["block_size"] > longest > 0:
        changes["block_size"] = 2 ** (longest.bit_length() - 1)
        reasons.append("with blocks that fit into the shorter part of the text")
    return Recommendation(preset, changes, chosen.epochs * train_chars, tuple(reasons))
