"""Which preset a time, a text and a device get, and that recipes and presets belong together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.models.config import PRESETS, GPTConfig
from charlm.training import RECIPES, recommend


@pytest.mark.parametrize(
    ("minutes", "preset"),
    [
        (None, "cpu-1min"),
        (0.01, "cpu-10s"),
        (0.49, "cpu-10s"),
        (0.5, "cpu-1min"),
        (2.4, "cpu-1min"),
        (2.5, "cpu-5min"),
        (1e6, "cpu-5min"),
    ],
)
def test_the_time_decides_for_a_long_text(minutes: float | None, preset: str) -> None:
    found = recommend(10**7, 10**6, minutes=minutes)
    assert (found.preset, found.changes) == (preset, {})
    assert found.reasons == (f"for {minutes or 1:g} min on a CPU",)


def test_a_minute_on_a_gpu_goes_further() -> None:
    assert recommend(10**7, 10**6, on_gpu=True).preset == "cpu-5min"
    assert recommend(10**7, 10**6, minutes=0.02, on_gpu=True).preset == "cpu-10s"


@pytest.mark.parametrize(
    ("chars", "preset"),
    [(49_999, "cpu-10s"), (50_000, "cpu-1min"), (200_000, "cpu-5min")],
)
def test_a_short_text_gets_a_smaller_model_however_long_it_may_take(chars: int, preset: str) -> None:
    found = recommend(chars, chars // 9, minutes=60)
    assert found.preset == preset
    assert ("the text is short" in found.reasons[0]) == (preset != "cpu-5min")


@given(
    train=st.integers(2, 10**6),
    val=st.none() | st.integers(2, 10**6),
    minutes=st.none() | st.floats(0.001, 1e5),
    on_gpu=st.booleans(),
)
def test_what_is_recommended_can_be_built_and_fits_the_text(
    train: int, val: int | None, minutes: float | None, on_gpu: bool
) -> None:
    found = recommend(train, val, minutes=minutes, on_gpu=on_gpu)
    config = GPTConfig.from_dict({**PRESETS[found.preset], **found.changes, "vocab_size": 65})
    shorter = train if val is None else min(train, val)
    assert config.block_size < shorter
    assert 2 * config.block_size >= min(PRESETS[found.preset]["block_size"], shorter)
    assert found.most_chars >= 8 * train


def test_every_preset_has_a_recipe_and_the_recipes_are_whole() -> None:
    assert tuple(RECIPES) == tuple(PRESETS)
    for name, config in RECIPES.items():
        model = GPTConfig.from_dict({**PRESETS[name], "vocab_size": 65})
        assert config.max_steps > config.warmup_steps
        assert model.num_parameters() > 0
