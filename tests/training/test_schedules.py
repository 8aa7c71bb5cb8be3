"""The learning rate of each step, at exact points and against a plain oracle."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_schedules import plain_learning_rate

from charlm.training import TrainerConfig, learning_rate_at

SCHEDULES = get_args(get_type_hints(TrainerConfig)["schedule"])


def config_of(**fields: object) -> TrainerConfig:
    base: dict[str, object] = {"max_steps": 10, "warmup_steps": 0, "learning_rate": 1.0, "cooldown": 0.5}
    return TrainerConfig.from_dict({**base, **fields})


def rates(**fields: object) -> list[float]:
    config = config_of(**fields)
    return [round(learning_rate_at(step, config), 12) for step in range(config.max_steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rise_is_linear_and_ends_at_the_top(schedule: str) -> None:
    first = rates(schedule=schedule, warmup_steps=4, learning_rate=0.4)[:5]
    assert first == [0.1, 0.2, 0.3, 0.4, 0.4]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_is_at_the_top(schedule: str) -> None:
    assert rates(schedule=schedule)[0] == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [4, 5, 10, 1_000_000])
def test_the_rise_takes_at_most_half_of_a_short_run(schedule: str, warmup_steps: int) -> None:
    first = rates(schedule=schedule, warmup_steps=warmup_steps, max_steps=8)[:5]
    assert first == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_step_is_at_the_top(schedule: str) -> None:
    assert rates(schedule=schedule, max_steps=1) == [1.0]
    assert rates(schedule=schedule, max_steps=1, warmup_steps=1) == [1.0]


def test_constant_stays_at_the_top() -> None:
    assert rates(schedule="constant", warmup_steps=1, min_lr_ratio=0.5) == [1.0] * 10


def test_linear_falls_from_the_end_of_the_rise_towards_the_minimum() -> None:
    assert rates(schedule="linear", warmup_steps=2, max_steps=6) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(schedule="linear", max_steps=4, min_lr_ratio=0.2) == [1.0, 0.8, 0.6, 0.4]


def test_cosine_is_halfway_down_in_the_middle() -> None:
    falling = rates(schedule="cosine", max_steps=8, min_lr_ratio=0.5)
    assert falling[0] == 1.0
    assert falling[4] == 0.75
    assert falling[2] + falling[6] == pytest.approx(1.5)


def test_wsd_stays_at_the_top_until_its_cooldown() -> None:
    assert rates() == [1.0] * 6 + [0.8, 0.6, 0.4, 0.2]
    assert rates(min_lr_ratio=0.5)[5:] == [1.0, 0.9, 0.8, 0.7, 0.6]


def test_wsd_without_a_cooldown_never_falls() -> None:
    assert rates(cooldown=0.0, warmup_steps=1) == [1.0] * 10


def test_wsd_that_only_cools_down_is_linear() -> None:
    assert rates(cooldown=1.0) == rates(schedule="linear")
    assert rates(cooldown=1.0, warmup_steps=4) == rates(schedule="linear", warmup_steps=4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_minimum_of_one_is_flat_after_the_rise(schedule: str) -> None:
    assert rates(schedule=schedule, min_lr_ratio=1.0, warmup_steps=2) == [0.5] + [1.0] * 9


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_minimum_is_reached_one_step_after_the_last(schedule: str) -> None:
    config = config_of(schedule=schedule, min_lr_ratio=0.25)
    assert learning_rate_at(9, config) > 0.25
    assert learning_rate_at(10, config) == pytest.approx(0.25, abs=1e-15)


configs = st.builds(
    lambda steps, warm, **fields: TrainerConfig(max_steps=steps, warmup_steps=int(warm * steps), **fields),
    st.integers(1, 300),
    st.floats(0, 1.2),
    schedule=st.sampled_from(SCHEDULES),
    learning_rate=st.floats(1e-6, 100),
    cooldown=st.floats(0, 1),
    min_lr_ratio=st.floats(0, 1),
)


@settings(deadline=None, max_examples=100)
@given(configs)
def test_every_step_agrees_with_the_plain_formula(config: TrainerConfig) -> None:
    for step in range(config.max_steps):
        got = learning_rate_at(step, config)
        assert got == pytest.approx(plain_learning_rate(step, config), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(configs)
def test_the_rate_never_leaves_its_bounds_and_falls_only_after_the_rise(config: TrainerConfig) -> None:
    top = config.learning_rate
    values = [learning_rate_at(step, config) for step in range(config.max_steps)]
    assert max(values) <= top
    assert min(values) > 0 or config.min_lr_ratio == 0
    risen = min(config.warmup_steps, config.max_steps // 2)
    rise, fall = values[:risen], values[risen:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert not rise or rise[-1] == top
    assert all(value >= config.min_lr_ratio * top * (1 - 1e-12) for value in fall)


@settings(deadline=None, max_examples=30)
@given(configs)
def test_the_rate_is_a_function_of_the_step_alone(config: TrainerConfig) -> None:
    steps = list(range(config.max_steps))
    forwards = {step: learning_rate_at(step, config) for step in steps}
    assert {step: learning_rate_at(step, config) for step in reversed(steps)} == forwards
