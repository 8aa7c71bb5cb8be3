"""How many steps fit into a time: plausible numbers, and nothing changed by the measurement."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness.tiny_models import tiny_config, tiny_gpt
from harness.tiny_training import TOKENIZER, global_generators, quick_config, tiny_split
from torch import Tensor
from typing_extensions import override

from charlm import BigramLM, BlockDataset
from charlm.backends.base import DeviceBackend
from charlm.errors import InputError
from charlm.models.gpt import GPT
from charlm.training import StepsEstimate, steps_within

V = TOKENIZER.vocab_size


def model() -> GPT:
    return tiny_gpt(tiny_config("gpt2", vocab_size=V, n_embd=16, n_layer=1, block_size=8, dropout=0.1))


def test_the_measurement_changes_nothing() -> None:
    train, val = tiny_split()
    subject = model().eval()
    weights = {name: t.clone() for name, t in subject.state_dict().items()}
    config = quick_config(
        sample_interval=None, max_seconds=1e-9, minutes=1e-9, eval_interval=None, patience=1
    )
    before = global_generators()
    got = steps_within(5, subject, train, config, val_data=val, evaluations=2, device="cpu")
    assert 1 <= got.fewest <= got.steps <= got.most
    assert got.step_seconds > 0
    assert global_generators() == before
    assert not subject.training
    assert all(torch.equal(weights[name], t) for name, t in subject.state_dict().items())
    assert all(p.grad is None for p in subject.parameters())


class Clockwork(DeviceBackend):
    """A device on which moving a batch takes a second, or what it is told to, by a clock of its own."""

    now = 0.0
    seconds: Iterator[float] = itertools.repeat(1.0)

    @override
    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.now += next(self.seconds)
        return super().to_device(*tensors)


@pytest.mark.parametrize(
    ("seconds", "accumulate", "evaluations", "steps"),
    [
        (115, 1, 0, 100),  # the measurement took 15 steps of a second each
        (15.9, 1, 0, 1),
        (1015, 2, 0, 492),  # 15 steps of two seconds
        (116, 1, 1, 99),  # one evaluation is measured and one is left aside
        (116, 1, 90, 10),
        (116, 1, 1000, 1),
        (1e9, 1, 0, 1e9 - 15),
    ],
)
def test_the_number_is_what_is_left_of_the_time_in_steps(
    monkeypatch: pytest.MonkeyPatch, seconds: float, accumulate: int, evaluations: int, steps: float
) -> None:
    clock = Clockwork("cpu")
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    train, _ = tiny_split()
    val = BlockDataset(train.ids[:100], 8)  # two batches in an evaluation: the full blocks and the rest
    config = quick_config(accumulate=accumulate)
    got = steps_within(seconds, model(), train, config, val_data=val, evaluations=evaluations, device=clock)
    extra = 0 if evaluations == 0 else 1 + evaluations  # seconds that the second batches take
    number = max(1, int(steps) - extra)
    assert got == StepsEstimate(number, number, number, accumulate)  # all measurements agree


def test_without_validation_data_evaluations_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clockwork("cpu")
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    got = steps_within(115, model(), tiny_split()[0], quick_config(), evaluations=50, device=clock)
    assert got == StepsEstimate(100, 100, 100, 1.0)


WARM_UP = (1.0, 9.0, 5.0)  # seconds of steps that are no measure


def estimate_on(monkeypatch: pytest.MonkeyPatch, steps: list[float], seconds: float) -> StepsEstimate:
    """Return what is estimated on a machine whose steps of the measurement take what they take."""
    clock = Clockwork("cpu")
    clock.seconds = iter([*WARM_UP, *steps])  # and no more than these steps are made
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return steps_within(seconds, model(), tiny_split()[0], quick_config(), device=clock)


@pytest.mark.parametrize("speeds", list(itertools.permutations([1.0, 2.0, 4.0])))
def test_measurements_that_differ_give_the_range_of_what_is_to_be_expected(
    monkeypatch: pytest.MonkeyPatch, speeds: tuple[float, ...]
) -> None:
    """In whatever order they come: a machine may have got slower or faster."""
    steps = [each for each in speeds for _ in range(4)]
    got = estimate_on(monkeypatch, steps, sum(WARM_UP) + sum(steps) + 400)
    assert got == StepsEstimate(steps=200, fewest=100, most=400, step_seconds=2.0)


def test_a_step_that_is_held_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [1.0, 1.0, 30.0, 1.0] * 3
    got = estimate_on(monkeypatch, steps, sum(WARM_UP) + sum(steps) + 50)
    assert got == StepsEstimate(50, 50, 50, 1.0)


@pytest.mark.parametrize("seed", range(10))
def test_the_estimate_lies_within_its_range(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    draw = random.Random(seed)
    steps = [draw.choice([0.01, 0.5, 1.0, 3.0]) * draw.uniform(1, 2) for _ in range(12)]
    got = estimate_on(monkeypatch, steps, draw.choice([1.0, 30.0, 100.0, 1e6]))
    assert 1 <= got.fewest <= got.steps <= got.most
    assert min(steps) <= got.step_seconds * (1 + 1e-9)
    assert got.step_seconds <= max(steps) * (1 + 1e-9)


def test_no_number_is_more_than_the_settings_take(monkeypatch: pytest.MonkeyPatch) -> None:
    got = estimate_on(monkeypatch, [2e-4] * 12, 1e9)
    assert got.most == got.steps == got.fewest == 999_999_999_999
    assert quick_config(max_steps=got.most).max_steps == got.most


def test_only_a_copy_of_the_model_runs() -> None:
    class Counting(BigramLM):
        calls = 0

        @override
        def forward(
            self, idx: Tensor, targets: Tensor | None = None, **options: Any
        ) -> tuple[Tensor, Tensor | None]:
            self.calls += 1
            return super().forward(idx, targets, **options)

    subject = Counting(V)
    steps_within(5, subject, tiny_split()[0], quick_config(), device="cpu")
    assert subject.calls == 0


def test_a_time_that_is_already_over_leaves_one_step() -> None:
    got = steps_within(1e-9, BigramLM(V), tiny_split()[0], quick_config(), device="cpu")
    assert (got.fewest, got.steps, got.most) == (1, 1, 1)
    assert got.step_seconds > 0


def test_a_learning_rate_that_diverges_is_no_matter_for_the_measurement() -> None:
    class Exploding(BigramLM):
        @override
        def forward(
            self, idx: Tensor, targets: Tensor | None = None, **options: Any
        ) -> tuple[Tensor, Tensor | None]:
            if float(self.token_embedding_table.weight.detach().abs().max()) > 100:
                raise AssertionError("the weights moved")
            return super().forward(idx, targets, **options)

    config = quick_config(learning_rate=1000.0)
    assert steps_within(1.0, Exploding(V), tiny_split()[0], config, device="cpu").steps >= 1


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, 1e10, True, "60", None])
def test_a_time_must_be_a_positive_number(seconds: Any) -> None:
    with pytest.raises(InputError, match="seconds must be above 0 and at most 1e"):
        steps_within(seconds, BigramLM(V), tiny_split()[0], quick_config(), device="cpu")
