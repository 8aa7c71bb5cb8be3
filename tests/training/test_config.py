"""TrainerConfig: what it accepts, and how it says what it does not."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from harness.tiny_training import quick_config

from charlm.errors import ConfigError
from charlm.models.config import PRESETS
from charlm.training import RECIPES, TrainerConfig

FIELDS = [field.name for field in dataclasses.fields(TrainerConfig)]
SWITCHES = ("compile", "replacement", "restore_best")
FLOATS = (
    *("minutes", "learning_rate", "weight_decay", "momentum", "grad_clip", "cooldown", "min_lr_ratio"),
    "max_seconds",
)
ZERO_IS_FINE = ("warmup_steps", "keep_best", "learning_rate", "weight_decay", "momentum", "cooldown", "seed")
NONE_IS_FINE = (
    *("minutes", "grad_clip", "eval_interval", "eval_chars", "save_interval", "sample_interval", "patience"),
    "max_seconds",
)

BAD_VALUES: dict[str, object] = {
    "negative": -1,
    "zero": 0,
    "huge": 10**19,
    "beyond any repr": 10**5000,
    "huge negative": -(10**400),
    "nan": math.nan,
    "infinite": math.inf,
    "True": True,
    "a float": 2.5,
    "text": "0.1",
    "a numpy array": np.array(4),
    "a decimal": Decimal("0.5"),
    "None": None,
    "a list": [4],
    "bytes": b"4",
    "a dict": {},
    "three numbers": (0.1, 0.2, 0.3),
}


def is_right(name: str, value: object) -> bool:
    """Say which of the bad values are good ones for a field, after its documentation."""
    if name in SWITCHES:
        return value is True
    if value is None:
        return name in NONE_IS_FINE
    if type(value) is float and value == 2.5:
        return name in {"minutes", "learning_rate", "weight_decay", "grad_clip", "max_seconds"}
    if type(value) is int and value == 0:
        return name in {*ZERO_IS_FINE, "min_lr_ratio"}
    return name == "seed" and type(value) is int and value == -1


@pytest.mark.parametrize("name", FIELDS)
def test_a_bad_value_is_one_config_error_that_names_the_field(name: str) -> None:
    bad = [value for value in BAD_VALUES.values() if not is_right(name, value)]
    assert len(bad) >= 12
    for value in bad:
        refuse(name, value)


def refuse(name: str, value: object) -> None:
    """Give a bad value to a field in each way in which it can be given."""
    fields = {**quick_config().to_dict(), name: value}
    makers: tuple[Callable[[], TrainerConfig], ...] = (
        lambda: TrainerConfig.from_dict(fields),
        lambda: TrainerConfig(**typing.cast("Any", fields)),
        lambda: quick_config().replace(**{name: value}),
    )
    for make in makers:
        with pytest.raises(ConfigError, match=rf"^TrainerConfig: {name} must be .*, got ") as caught:
            make()
        assert len(caught.value.problems) == 1
        assert len(str(caught.value)) < 300
        assert str(caught.value).isprintable()


def test_every_right_value_of_the_table_is_accepted() -> None:
    for name in FIELDS:
        for value in BAD_VALUES.values():
            if is_right(name, value):
                kept = getattr(quick_config().replace(**{name: value}), name)
                assert kept == value
                assert type(kept) is (float if name in FLOATS and value is not None else type(value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("betas", (True, 0.5)),
        ("momentum", 1.0),
        ("cooldown", 1.1),
        ("min_lr_ratio", 1.1),
        ("optimizer", "sgd"),
        ("schedule", "step"),
        ("precision", "fp8"),
        ("seed", 2**63),
        ("max_steps", 10**12),
        ("minutes", 1_000_001),
        ("minutes", -0.1),
        ("eval_interval", 10**12),
        ("eval_chars", 10**12),
    ],
)
def test_values_past_a_bound_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^TrainerConfig: {name} must be"):
        quick_config().replace(**{name: value})


def test_all_bad_fields_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainerConfig.from_dict({"max_iters": 5, "batch_size": 0, "schedule": "step", "compile": 1})
    assert [p.split()[0] for p in caught.value.problems] == ["unknown", "batch_size", "schedule", "compile"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_iters", "max_steps"),
        ("max_time", "minutes"),
        ("lr", "learning_rate"),
        ("beta2", "betas"),
        ("lr_decay_iters", "max_steps"),
        ("bf16", "precision"),
        ("warmup_step", "warmup_steps"),
    ],
)
def test_names_of_other_libraries_lead_to_ours(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown field '{wrong}'; did you mean '{right}'\\?"):
        TrainerConfig.from_dict({wrong: 1})
    with pytest.raises(ConfigError, match=f"unknown field '{wrong}'; did you mean '{right}'\\?"):
        TrainerConfig(**typing.cast("Any", {wrong: 1}))


def test_other_names_point_to_real_fields() -> None:
    assert set(TrainerConfig._other_names.values()) <= set(FIELDS)
    assert not set(TrainerConfig._other_names) & set(FIELDS)


def test_a_config_survives_its_dictionary() -> None:
    config = quick_config(
        betas=[0.5, 0.75], grad_clip=None, max_seconds=3, minutes=2, eval_interval=None, eval_chars=64
    )
    assert config.betas == (0.5, 0.75)
    assert (config.minutes, config.eval_interval, config.eval_chars) == (2.0, None, 64)
    assert TrainerConfig.from_dict(config.to_dict()) == config


def test_there_is_a_recipe_for_each_preset_which_nobody_can_change() -> None:
    assert tuple(RECIPES) == tuple(PRESETS)
    assert all(type(recipe) is TrainerConfig for recipe in RECIPES.values())
    with pytest.raises(TypeError):
        RECIPES["lecture"] = TrainerConfig()  # type: ignore[index]  # that it cannot be changed is the point
    assert RECIPES["cpu-1min"].replace(max_steps=3) != RECIPES["cpu-1min"]


def test_every_field_has_its_documentation_below_it() -> None:
    import ast
    import inspect

    (cls,) = (
        node for node in ast.parse(inspect.getsource(TrainerConfig)).body if isinstance(node, ast.ClassDef)
    )
    for before, after in zip(cls.body, cls.body[1:], strict=False):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and before.target.id in FIELDS
        ):
            assert isinstance(after, ast.Expr)
            assert isinstance(after.value, ast.Constant)
