"""How many steps fit into a time: plausible numbers, and nothing changed by the measurement."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from reference.tiny_models import tiny_config, tiny_gpt
from reference.tiny_training import TOKENIZER, global_generators, quick_config, tiny_split
from torch import Tensor
from typing_extensions import override

from charlm import BigramLM, BlockDataset
from charlm.backends.base import DeviceBackend
from charlm.errors import InputError
from charlm.models.gpt import GPT
from charlm.training import steps_within

V = TOKENIZER.vocab_size


def model() -> GPT:
    return tiny_gpt(tiny_config("gpt2", vocab_size=V, n_embd=16, n_layer=1, block_size=8, dropout=0.1))


def test_the_measurement_changes_nothing() -> None:
    train, val = tiny_split()
    subject = model().eval()
    weights = {name: t.clone() for name, t in subject.state_dict().items()}
    config = quick_config(sample_interval=None, max_seconds=1e-9, patience=1)
    before = global_generators()
    assert steps_within(5, subject, train, config, val_data=val, evaluations=2, device="cpu") >= 1
    assert global_generators() == before
    assert not subject.training
    assert all(torch.equal(weights[name], t) for name, t in subject.state_dict().items())
    assert all(p.grad is None for p in subject.parameters())


class Clockwork(DeviceBackend):
    """A device on which moving a batch takes a second, by a clock of its own."""

    now = 0.0

    @override
    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.now += 1
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
    assert got == max(1, steps - extra)


def test_without_validation_data_evaluations_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clockwork("cpu")
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    assert steps_within(115, model(), tiny_split()[0], quick_config(), evaluations=50, device=clock) == 100


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
    assert steps_within(1e-9, BigramLM(V), tiny_split()[0], quick_config(), device="cpu") == 1


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
    assert steps_within(1.0, Exploding(V), tiny_split()[0], config, device="cpu") >= 1


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, 1e10, True, "60", None])
def test_a_time_must_be_a_positive_number(seconds: Any) -> None:
    with pytest.raises(InputError, match="seconds must be above 0 and at most 1e"):
        steps_within(seconds, BigramLM(V), tiny_split()[0], quick_config(), device="cpu")
