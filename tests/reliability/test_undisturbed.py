"""What goes on around the steps of a training changes none of them: 0 bits differ.

18 runs, three sets of intervals (evaluation, log, save, sample) with six callbacks (none, and five that draw
from the global generators, seed them, evaluate, generate text, save), are compared with one plain run: every
step's loss, learning rate and gradient norm, and all weights and moments. And the caller's own generators
end where the callbacks alone would have left them: the training draws nothing from them. The short form has
a third of the pairs for each kind of training, each of the intervals and of the callbacks among them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.campaign import Campaign
from harness.stopped_runs import FOUR_KINDS, digests, kind_trainer, seed_generators
from harness.tiny_training import Numbers, global_generators, tensors_of
from typing_extensions import override

from charlm import LanguageModel, Trainer
from charlm.training import Callback, EvalRecord, SampleRecord, StepRecord, TrainResult

pytestmark = pytest.mark.slow

STEPS = 8

INTERVALS: dict[str, dict[str, object]] = {
    "everything in each step": {
        "eval_interval": 1,
        "log_interval": 1,
        "save_interval": 1,
        "sample_interval": 1,
    },
    "now and then": {"eval_interval": 5, "log_interval": 3, "save_interval": 2, "sample_interval": 4},
    "only at the end": {
        "eval_interval": 100,
        "log_interval": 7,
        "save_interval": 100,
        "sample_interval": None,
    },
}


def draw(number: int) -> None:
    """Draw from every global generator, more often at later turns."""
    for _ in range(1 + number % 3):
        torch.rand(3)
        np.random.normal()  # noqa: NPY002 - the global generator is the point
        random.gauss(0, 1)


def seed(number: int) -> None:
    """Do what a program must not do in the middle of a training, but may."""
    seed_generators(number)
    draw(number)


class Noise(Callback):
    """Makes noise at every turning point of a run, and counts them."""

    def __init__(self, noise: Callable[[int], None], act: Callable[[Trainer], object]) -> None:
        self.turns = 0
        self.noise, self.act = noise, act

    def turn(self, trainer: Trainer) -> None:
        self.turns += 1
        self.noise(self.turns)
        self.act(trainer)

    @override
    def on_train_start(self, trainer: Trainer) -> None:
        self.turn(trainer)

    @override
    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.turn(trainer)

    @override
    def on_evaluate(self, trainer: Trainer, evaluation: EvalRecord) -> None:
        self.turn(trainer)

    @override
    def on_sample(self, trainer: Trainer, sample: SampleRecord) -> None:
        self.turn(trainer)

    @override
    def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
        self.turns += 1
        self.noise(self.turns)  # and no act, which may be a save

    @override
    def on_train_end(self, trainer: Trainer, result: TrainResult) -> None:
        self.turn(trainer)


def nothing(of: object) -> None:
    """Make no noise."""


def generate(trainer: Trainer) -> None:
    """Generate with a seed of its own, in the mode in which the model happens to be."""
    assert isinstance(trainer.model, LanguageModel)
    trainer.model.generate(torch.zeros((2, 1), dtype=torch.int64), 3, seed=trainer.step)


NOISES: dict[str, tuple[Callable[[int], None], Callable[[Trainer], object]]] = {
    "nothing": (nothing, nothing),
    "draws": (draw, nothing),
    "seeds": (seed, nothing),
    "evaluations": (draw, Trainer.evaluate),
    "texts": (draw, generate),
    "saves": (seed, Trainer.save),
}


@pytest.mark.parametrize("kind", FOUR_KINDS)
def test_neither_intervals_nor_callbacks_change_the_training(
    tmp_path: Path, kind: str, campaign: Campaign
) -> None:
    settings: dict[str, object] = {"max_steps": STEPS, "restore_best": False}
    plain = Numbers()
    reference = kind_trainer(kind, None, [plain], **settings)
    reference.fit()
    wanted = digests(tensors_of(reference))
    pairs = list(itertools.product(INTERVALS.items(), NOISES.items()))
    if campaign.asked is None:
        turn = FOUR_KINDS.index(kind)
        pairs = [pair for i, pair in enumerate(pairs) if (i // len(NOISES) + i + turn) % len(INTERVALS) == 0]
    for (often, intervals), (what, (noise, act)) in pairs:
        where = f"{kind}, {often}, {what}"
        numbers, listener = Numbers(), Noise(noise, act)
        trainer = kind_trainer(kind, tmp_path / where, [listener, numbers], **{**settings, **intervals})
        seed_generators(campaign.seed)
        trainer.fit()
        left = global_generators()
        assert numbers.steps == plain.steps, where
        assert digests(tensors_of(trainer)) == wanted, where
        seed_generators(campaign.seed)
        for turn in range(listener.turns):
            noise(turn + 1)
        assert left == global_generators(), f"{where}: the training has drawn from the caller's generators"
        assert listener.turns >= STEPS + 3
        campaign.counted("runs")
        campaign.counted("turns of callbacks", listener.turns)
