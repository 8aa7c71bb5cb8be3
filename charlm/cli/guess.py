"""Estimates the result of a training on a text.

The loss of the n-gram model on the validation text and the time of a step are measured. The loss of the
trained model is a guess: other trainings of the preset have ended so far below or above their n-gram models.
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
from charlm.cli.encoded import characters_of
from charlm.cli.plan import Plan, plan_training
from charlm.cli.settings import gather
from charlm.cli.verdict import FEW_STEPS
from charlm.data.blocks import BlockDataset
from charlm.data.prepared import PreparedCorpus
from charlm.data.rows import StoredRow
from charlm.models.config import PresetName
from charlm.models.gpt import GPT
from charlm.text.tokenizer import CharTokenizer
from charlm.training.budget import steps_within
from charlm.training.timing import evaluation_seconds

__all__ = ["Guess", "guess"]

_HOUR = 3600.0
_MINUTES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)  # candidates of a recommendation
_MANY_STEPS = 0.75  # a training with a smaller share of the measured runs' steps does not reach their results
_ALIKE = 3.5  # texts are alike if their lengths differ by at most this factor
_AS_MANY = 1.7  # runs are alike if their steps differ by at most this factor


@dataclass(frozen=True)
class _Measured:
    """A run of a preset, with the nats by which its validation loss ended below that of its n-gram model."""

    preset: PresetName
    train_chars: int
    steps: int
    ahead: float


# docs/experiments.md, "Presets and n-grams": prose in English and Chinese, documentation and source code.
_MEASURED: Sequence[_Measured] = (
    _Measured("cpu-10s", 9_000, 43, -0.1916),
    _Measured("cpu-10s", 18_000, 88, -0.0198),
    _Measured("cpu-10s", 45_000, 220, -0.4055),
    _Measured("cpu-10s", 90_000, 439, 0.0010),
    _Measured("cpu-10s", 418_543, 320, -0.1196),
    _Measured("cpu-10s", 1_003_854, 320, -0.2260),
    _Measured("cpu-1min", 90_000, 132, -0.0491),
    _Measured("cpu-1min", 179_554, 263, -0.1068),
    _Measured("cpu-1min", 270_000, 395, 0.0146),
    _Measured("cpu-1min", 418_543, 612, 0.0203),
    _Measured("cpu-1min", 453_004, 393, -0.2376),
    _Measured("cpu-1min", 453_004, 609, -0.1763),
    _Measured("cpu-1min", 1_003_854, 600, -0.0285),
    _Measured("cpu-1min", 1_003_854, 649, -0.0214),
    _Measured("cpu-1min", 1_003_854, 677, -0.0166),
    _Measured("cpu-1min", 1_003_854, 829, 0.0093),
    _Measured("cpu-1min", 1_003_854, 1_327, 0.0389),
    _Measured("cpu-1min", 1_003_854, 1_440, 0.0494),
    _Measured("cpu-1min", 1_003_854, 1_515, 0.0369),
    _Measured("cpu-1min", 3_963_970, 429, -0.1017),
    _Measured("cpu-1min", 3_963_970, 676, -0.0601),
    _Measured("cpu-1min", 4_230_000, 466, -0.0307),
    _Measured("cpu-1min", 4_230_000, 633, 0.0108),
    _Measured("cpu-5min", 418_543, 613, 0.0082),
    _Measured("cpu-5min", 1_003_854, 1_500, 0.0635),
    _Measured("cpu-5min", 1_003_854, 1_500, 0.0479),
    _Measured("cpu-5min", 1_003_854, 1_500, 0.0538),
    _Measured("cpu-5min", 3_963_970, 1_638, 0.0106),
    _Measured("cpu-5min", 4_230_000, 1_767, 0.2462),
)
_SPREAD = 0.02  # nats: the effect of another seed


@dataclass(frozen=True, kw_only=True)
class Guess:
    """The training that `charlm train` would do with a text, and its estimated result."""

    preset: PresetName
    """The preset that `recommend` chooses."""
    reasons: tuple[str, ...]
    """The reasons for it."""
    device: str
    """The device on which steps were timed."""
    step_seconds: float
    """Time of a step, the median of twelve."""
    evaluation_seconds: float
    """Time of an evaluation on the whole validation text, estimated from a part; 0 without one."""
    steps: int
    """Number of steps."""
    seconds: float
    """Time of the steps and the evaluations, with the start of the command."""
    text_is_short: bool
    """Whether the text, and not the time, limits the steps."""
    is_limited: bool
    """Whether a given max_steps limits the steps, and neither the text nor the time."""
    ngram_loss_nats: float | None
    """Measured on the validation text or a part of it; None without one."""
    ngram_order: int
    """Length of its longest n-grams."""
    ngram_counted: int
    """Number of characters at the end of the training text from which it was counted."""
    ngram_scored: int
    """Number of characters of the validation text on which it was scored."""
    ahead_nats: tuple[float, float] | None
    """The least and the most by which the model may end below the n-gram model (above it, if negative): the
    range of the measured runs, widened by the effect of a seed. None: no run is comparable."""
    usual_steps: int | None
    """The fewest steps of these runs."""
    unlike: bool
    """Whether the end of the text is unlike its beginning, as in a sorted list: then its loss misleads."""
    enough_minutes: float | None
    """Minutes in which the preset makes enough steps: the given ones if possible; None: more than an hour."""

    @property
    def loss_nats(self) -> tuple[float, float] | None:
        """The best and the worst expected validation loss; None: unknown."""
        if self.ngram_loss_nats is None or self.ahead_nats is None:
            return None
        least, most = self.ahead_nats
        return max(self.ngram_loss_nats - most, 0.0), max(self.ngram_loss_nats - least, 0.0)

    @property
    def too_few(self) -> bool:
        """Whether there are fewer steps than in the runs of the guess."""
        return not self.text_is_short and self.steps < _MANY_STEPS * (self.usual_steps or 0)

    @property
    def loses(self) -> bool:
        """Whether the n-gram model is expected to stay better."""
        expected = self.loss_nats
        return expected is not None and expected[0] > (self.ngram_loss_nats or 0.0)


def guess(text: str | PreparedCorpus, *, val_fraction: float, minutes: float, began: float) -> Guess:
    """Measure and estimate the training of `charlm train --minutes`.

    Args:
        text: long enough for a split into two parts of two characters or more; or the corpus on disk.
        val_fraction: share of the text, at its end, for validation; 0: none.
        minutes: the value of `--minutes`.
        began: `time.perf_counter()` at the start of the command; a training needs the time since then, too.
    """
    settings = gather(None, file=None, environment=os.environ, flags={"minutes": repr(minutes)})
    backend = get_backend("auto")
    tokenizer = characters_of(text) if isinstance(text, PreparedCorpus) else CharTokenizer.from_text(text)
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


def _timed(
    plan: Plan, train: BlockDataset, val: BlockDataset | None, backend: DeviceBackend
) -> tuple[float, float]:
    """Return the time of a step of the planned training, and that of an evaluation on the whole text."""
    torch.manual_seed(plan.training.seed)
    model = GPT(plan.model)
    step = steps_within(_HOUR, model, train, plan.training, device=backend).step_seconds
    return step, 0.0 if val is None else evaluation_seconds(backend.prepare(model), val, backend=backend)


def _alike(preset: PresetName, train_chars: int, steps: int) -> Sequence[_Measured]:
    """Return a preset's runs on texts of about this length, if possible those with about as many steps."""
    runs = [
        run
        for run in _MEASURED
        if run.preset == preset and 1 / _ALIKE <= run.train_chars / train_chars <= _ALIKE
    ]
    return [run for run in runs if 1 / _AS_MANY <= run.steps / steps <= _AS_MANY] or runs


def _enough_minutes(minutes: float, steps: int, step_seconds: float, spent: float) -> float | None:
    """Return the first candidate of at least `minutes` in which so many steps fit."""
    times = [minutes, *(time for time in _MINUTES if time > minutes)]
    return next((time for time in times if spent + steps * step_seconds <= 60 * time), None)
