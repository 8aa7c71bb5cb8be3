"""What a training on a text may come to: measured where that is quick, and a range where it is not.

Measured on the spot: the n-gram model's loss on the validation text, and how long a step takes. The loss of
the model that would be trained is a guess: where it ended beside its n-gram model on other texts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from charlm.backends.base import DeviceBackend
from charlm.backends.registry import get_backend
from charlm.cli.baseline import count_within, score_baseline
from charlm.cli.plan import Plan, plan_training
from charlm.cli.settings import gather
from charlm.cli.verdict import FEW_STEPS
from charlm.data.blocks import BlockDataset
from charlm.data.prepared import PreparedCorpus
from charlm.data.rows import StoredRow
from charlm.errors import CorpusError, quoted
from charlm.models.config import PresetName
from charlm.models.gpt import GPT
from charlm.text.tokenizer import CharTokenizer, Tokenizer
from charlm.training.budget import steps_within
from charlm.training.timing import evaluation_seconds

__all__ = ["Guess", "guess"]

_HOUR = 3600.0
_MINUTES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)  # to recommend
_MANY_STEPS = 0.75  # of those of the measured runs: with fewer, a training does not come to what they came to
_ALIKE = 3.5  # texts are of about the same length if neither is longer than this many of the other
_AS_MANY = 1.7  # and runs make about as many steps


@dataclass(frozen=True)
class _Measured:
    """A run of a preset, and how far its validation loss ended below its n-gram model's, in nats."""

    preset: PresetName
    train_chars: int
    steps: int
    ahead: float


# docs/experiments.md, "Presets and n-grams": prose in English and Chinese, documentation and source code.
_MEASURED: Sequence[_Measured] = (
    _Measured("cpu-10s", 9_000, 87, -0.2041),
    _Measured("cpu-10s", 18_000, 175, -0.1173),
    _Measured("cpu-10s", 27_000, 263, -0.1174),
    _Measured("cpu-10s", 90_000, 320, -0.0803),
    _Measured("cpu-10s", 418_543, 320, -0.2088),
    _Measured("cpu-10s", 1_003_854, 320, -0.3073),
    _Measured("cpu-10s", 1_350_000, 320, -0.3129),
    _Measured("cpu-1min", 90_000, 351, -0.0572),
    _Measured("cpu-1min", 90_000, 351, -0.0613),
    _Measured("cpu-1min", 270_000, 1_054, 0.0107),
    _Measured("cpu-1min", 418_543, 1_200, -0.0237),
    _Measured("cpu-1min", 453_004, 393, -0.2376),
    _Measured("cpu-1min", 453_004, 609, -0.1763),
    _Measured("cpu-1min", 1_003_854, 455, -0.1192),
    _Measured("cpu-1min", 1_003_854, 605, -0.0616),
    _Measured("cpu-1min", 1_003_854, 770, -0.0333),
    _Measured("cpu-1min", 1_003_854, 810, -0.0355),
    _Measured("cpu-1min", 1_003_854, 1_028, -0.0054),
    _Measured("cpu-1min", 1_003_854, 1_258, 0.0033),
    _Measured("cpu-1min", 1_003_854, 1_609, 0.0198),
    _Measured("cpu-1min", 1_350_000, 1_200, 0.0050),
    _Measured("cpu-1min", 3_963_970, 429, -0.1017),
    _Measured("cpu-1min", 3_963_970, 676, -0.0601),
    _Measured("cpu-1min", 4_230_000, 466, -0.0307),
    _Measured("cpu-1min", 4_230_000, 633, 0.0108),
    _Measured("cpu-5min", 1_003_854, 2_000, 0.0145),
    _Measured("cpu-5min", 1_003_854, 2_000, 0.0179),
)
_SPREAD = 0.02  # nats: what another seed changes


@dataclass(frozen=True, kw_only=True)
class Guess:
    """What `charlm train` would do with a text, and how that may end."""

    preset: PresetName
    """The preset that `recommend` chooses."""
    reasons: tuple[str, ...]
    """Why."""
    device: str
    """Where the steps were timed."""
    step_seconds: float
    """Of one step, the median of twelve."""
    evaluation_seconds: float
    """Of one evaluation over all of the validation text, from that of a part; 0 without one."""
    steps: int
    """How many would be made."""
    seconds: float
    """How long they and the evaluations take, with the start of the command."""
    text_is_short: bool
    """Whether the text, and not the time, limits the steps."""
    is_limited: bool
    """Whether a given max_steps limits the steps, and neither the text nor the time."""
    ngram_loss_nats: float | None
    """Measured on the validation text, or a part of it; None without one."""
    ngram_order: int
    """Characters in its longest n-grams."""
    ngram_counted: int
    """Characters of the training text, its last ones, that the n-gram model was counted from."""
    ngram_scored: int
    """Characters of the validation text that it was scored on."""
    ahead_nats: tuple[float, float] | None
    """How far the model may end below the n-gram model (above it, if negative): the least and the most that
    was measured, widened by what a seed changes. None where nothing comparable was measured."""
    usual_steps: int | None
    """The fewest steps of the runs that this comes from."""
    unlike: bool
    """Whether the end of the text is unlike its beginning, as in a sorted list: a loss on it misleads."""
    enough_minutes: float | None
    """In how many minutes the preset makes enough steps to come to something, those asked for if possible;
    None: not within an hour."""

    @property
    def loss_nats(self) -> tuple[float, float] | None:
        """The best and the worst validation loss to be expected; None without a ground for a guess."""
        if self.ngram_loss_nats is None or self.ahead_nats is None:
            return None
        least, most = self.ahead_nats
        return max(self.ngram_loss_nats - most, 0.0), max(self.ngram_loss_nats - least, 0.0)

    @property
    def too_few(self) -> bool:
        """Whether fewer steps would be made than those that the guess comes from."""
        return not self.text_is_short and self.steps < _MANY_STEPS * (self.usual_steps or 0)

    @property
    def loses(self) -> bool:
        """Whether the n-gram model should stay better."""
        expected = self.loss_nats
        return expected is not None and expected[0] > (self.ngram_loss_nats or 0.0)


def guess(text: str | PreparedCorpus, *, val_fraction: float, minutes: float, began: float) -> Guess:
    """Measure and guess what `charlm train --minutes` would do.

    Args:
        text: long enough for a split into two parts of two characters or more; or where it is on disk.
        val_fraction: the share of the end that is kept for validation; 0: none.
        minutes: what `--minutes` would be.
        began: `time.perf_counter()` at the start of the command; what was done since, a training does, too.
    """
    settings = gather(None, file=None, environment=os.environ, flags={"minutes": repr(minutes)})
    backend, tokenizer = get_backend("auto"), _tokenizer_of(text)
    n_chars = text.index.n_ids if isinstance(text, PreparedCorpus) else len(text)
    plan = plan_training(
        settings,
        n_chars,
        tokenizer.vocab_size,
        val_fraction=val_fraction,
        choose=True,
        on_gpu=not backend.is_host,
    )
    block_size = plan.model.block_size
    if isinstance(text, PreparedCorpus):
        data = BlockDataset(StoredRow(text), block_size, tokenizer=tokenizer)
    else:
        data = BlockDataset.from_text(text, tokenizer, block_size)
    train, val = data.split(1 - val_fraction) if val_fraction else (data, None)
    counted = count_within(train, tokenizer.vocab_size, plan.counting_seconds)
    baseline = score_baseline(counted, train, val, tokenizer)
    ngram = cast("dict[str, Any]", baseline.values)
    start_seconds = time.perf_counter() - began
    step_seconds, each = _timed(plan, train, val, backend)
    spent = start_seconds + plan.evaluating_seconds(each)
    fitting = max(1, int((60 * minutes - spent) / step_seconds))
    steps = min(fitting, plan.training.max_steps)
    runs = _alike(plan.preset, train.n_ids, steps)
    ahead = [run.ahead for run in runs]
    usual = min((run.steps for run in runs), default=None)
    least = max(FEW_STEPS, int(_MANY_STEPS * (usual or 0)))
    return Guess(
        preset=plan.preset,
        reasons=plan.reasons,
        device=backend.name,
        step_seconds=step_seconds,
        evaluation_seconds=each,
        steps=steps,
        seconds=spent + steps * step_seconds,
        text_is_short=plan.most_steps is not None and plan.most_steps < fitting,
        is_limited=plan.most_steps is None and steps < fitting,
        ngram_loss_nats=ngram["loss_nats"],
        ngram_order=ngram["order"],
        ngram_counted=ngram["counted"],
        ngram_scored=ngram["scored"],
        ahead_nats=(min(ahead) - _SPREAD, max(ahead) + _SPREAD) if ahead else None,
        usual_steps=usual,
        unlike=baseline.unlike,
        enough_minutes=minutes if steps < fitting else _enough_minutes(minutes, least, step_seconds, spent),
    )


def _tokenizer_of(text: str | PreparedCorpus) -> Tokenizer:
    if not isinstance(text, PreparedCorpus):
        return CharTokenizer.from_text(text)
    if text.tokenizer is None:
        raise CorpusError(f"{quoted(str(text.path))} does not know the characters of its ids")
    return text.tokenizer


def _timed(
    plan: Plan, train: BlockDataset, val: BlockDataset | None, backend: DeviceBackend
) -> tuple[float, float]:
    """Return how long a step of the planned training takes, and an evaluation over all of the text."""
    torch.manual_seed(plan.training.seed)
    model = GPT(plan.model)
    step = steps_within(_HOUR, model, train, plan.training, device=backend).step_seconds
    return step, 0.0 if val is None else evaluation_seconds(backend.prepare(model), val, backend=backend)


def _alike(preset: PresetName, train_chars: int, steps: int) -> Sequence[_Measured]:
    """Return a preset's runs on texts of about this length, those of about so many steps if there are any."""
    runs = [
        run
        for run in _MEASURED
        if run.preset == preset and 1 / _ALIKE <= run.train_chars / train_chars <= _ALIKE
    ]
    return [run for run in runs if 1 / _AS_MANY <= run.steps / steps <= _AS_MANY] or runs


def _enough_minutes(minutes: float, steps: int, step_seconds: float, spent: float) -> float | None:
    """Return the least of some times, from `minutes` on, in which so many steps fit."""
    times = [minutes, *(time for time in _MINUTES if time > minutes)]
    return next((time for time in times if spent + steps * step_seconds <= 60 * time), None)
