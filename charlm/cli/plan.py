"""The plan of a training, which `charlm train` follows and `charlm inspect` shows. No torch here.

It is a pure function: it reads no file and no clock, and knows neither the text itself nor the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from charlm.cli.settings import Settings
from charlm.models.config import UNLIMITED_WINDOW, GPTConfig, PresetName
from charlm.plain import share_of
from charlm.training.config import MOST_STEPS, TrainerConfig
from charlm.training.recipes import recommend
from charlm.training.schedules import epoch_steps
from charlm.training.timetable import EVALUATION_SHARE, LONGEST_EVALUATION, evaluation_interval_seconds

if TYPE_CHECKING:
    from charlm.text.tokenizer import Unit

__all__ = ["Plan", "plan_training"]

_MICRO_BATCHES = 8  # of a step that several processes may share
_COUNTING_SHARE = 0.06  # share of a run's minutes for counting the n-gram model
_SCORING_SHARE = 0.02  # share of a run's minutes for scoring with it
_ASIDE_SHARE, _MOST_ASIDE = 0.025, 50_000  # set aside of the training text: a share, and the most characters
_MOST_ASIDE_SHARE, _LEAST_ASIDE = 0.1, 2_000  # of a short text: the largest share, and the least characters


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training before its first step."""

    preset: PresetName
    """The preset of model and recipe."""
    reasons: tuple[str, ...]
    """The reasons for the preset, each a clause for a person to read; empty: it was given."""
    model: GPTConfig
    """The model."""
    training: TrainerConfig
    """The recipe, with the steps that the text and the time allow."""
    val_fraction: float
    """Share of the text, at its end, for validation; 0: none."""
    train_chars: int
    """Characters to train on (bytes, with a byte tokenizer), at the beginning of the text."""
    val_chars: int
    """Characters for validation, at its end."""
    aside: int
    """Characters of the training text that are set aside to choose the result; 0: none."""
    aside_chars: int | None
    """How many of these are read for the choice; None: all, or as many as the time allows."""
    shared_out: bool
    """Whether a step was cut into micro-batches for several processes."""
    most_steps: int | None
    """More steps than this would only memorise the text; None: a person has decided."""

    @property
    def seconds(self) -> float | None:
        """The time of the whole run; None: its steps end it."""
        return None if self.training.minutes is None else 60 * self.training.minutes

    @property
    def counting_seconds(self) -> float | None:
        """The time for counting the n-gram model; None: no limit."""
        return None if self.seconds is None else _COUNTING_SHARE * self.seconds

    @property
    def scoring_seconds(self) -> tuple[float, float] | None:
        """The longest time of an evaluation, for the model and for the n-gram model.

        None: the whole validation text is scored, or a given number of characters.
        """
        if self.seconds is None or not self.val_chars or self.training.eval_chars is not None:
            return None
        return LONGEST_EVALUATION * self.seconds, _SCORING_SHARE * self.seconds

    def evaluating_seconds(self, each: float) -> float:
        """Return the time of all evaluations by the clock, if each takes `each` seconds."""
        if self.seconds is None:
            return 0.0
        number = self.seconds / evaluation_interval_seconds(self.seconds)
        return min(number * each, EVALUATION_SHARE * self.seconds)


def plan_training(
    settings: Settings,
    n_chars: int,
    vocab_size: int,
    *,
    val_fraction: float,
    choose: bool,
    on_gpu: bool,
    unit: Unit = "character",
    aside: int | None = None,
    aside_chars: int | None = None,
    shares_out: bool = False,
    limits: bool = False,
    epochs: float | None = None,
) -> Plan:
    """Plan the training of a text.

    Args:
        settings: the given settings.
        n_chars: length of the text (in bytes, with a byte tokenizer).
        vocab_size: V of its tokenizer.
        val_fraction: share of the text, at its end, for validation; 0: none.
        choose: whether text, time and device choose the preset; else it is that of the settings.
        on_gpu: whether the training runs on a GPU.
        unit: the unit of the length.
        aside: number of characters to set aside. None: as many as a text of this length can spare.
        aside_chars: how many of them are read, if that is known.
        shares_out: whether several processes may train. Then a step whose micro-batches were not given is cut
            into eight, or as many as its blocks allow.
        limits: whether a short text limits the steps although the preset is not chosen.
        epochs: number of epochs; None: the settings give the number of steps.

    Raises:
        UsageError: a flag is in conflict with the chosen preset.
        ConfigError: another setting is.
    """
    train_chars = share_of(n_chars, 1 - val_fraction)
    val_chars = n_chars - train_chars
    reasons: tuple[str, ...] = ()
    most_chars = None
    if choose or limits:
        advice = recommend(
            train_chars,
            val_chars if val_fraction else None,
            minutes=settings.training.minutes,
            on_gpu=on_gpu,
            unit=unit,
        )
        if choose:
            settings, reasons = settings.over(advice.preset, advice.changes), advice.reasons
        most_chars = None if epochs is not None or "max_steps" in settings.given else advice.most_chars
    model = GPTConfig.from_dict({**settings.model, "vocab_size": vocab_size})
    training = settings.training
    shares_out = shares_out and not settings.given & {"batch_size", "accumulate"}
    if shares_out:
        blocks = training.batch_size * training.accumulate
        accumulate = math.gcd(blocks, _MICRO_BATCHES)
        training = training.replace(batch_size=blocks // accumulate, accumulate=accumulate)
    aside = _aside(train_chars, model.block_size) if aside is None else aside
    if epochs is not None:
        steps = epoch_steps(epochs, train_chars - aside, model.block_size, training)
        training = training.replace(max_steps=steps)
    most_steps = None
    if most_chars is not None:
        most_steps = max(1, most_chars // (training.batch_size * training.accumulate * model.block_size))
    return Plan(
        preset=settings.preset,
        reasons=reasons,
        model=model,
        training=training.replace(**_ends(settings, most_steps)),
        val_fraction=float(val_fraction),
        train_chars=train_chars,
        val_chars=val_chars,
        aside=aside,
        aside_chars=aside_chars,
        shared_out=shares_out,
        most_steps=most_steps,
    )


def _aside(train_chars: int, block_size: int) -> int:
    """Return how many characters a training can set aside to choose its result."""
    least = min(_LEAST_ASIDE, int(_MOST_ASIDE_SHARE * train_chars))
    aside = min(max(int(_ASIDE_SHARE * train_chars), least), _MOST_ASIDE)
    if aside > UNLIMITED_WINDOW:
        aside -= aside % UNLIMITED_WINDOW  # in pieces of this length, each read by itself
    return aside if block_size < aside < train_chars - block_size else 0


def _ends(settings: Settings, most_steps: int | None) -> dict[str, object]:
    """Return changes to the recipe, so that text and time decide the settings that were not given."""
    if settings.training.minutes is None:
        return {} if most_steps is None else {"max_steps": min(settings.training.max_steps, most_steps)}
    by_time = {"max_steps": most_steps or MOST_STEPS, "eval_interval": None}
    return {name: value for name, value in by_time.items() if name not in settings.given}
