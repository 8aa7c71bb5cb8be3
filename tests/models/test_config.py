"""GPTConfig: what it accepts, and how it says what it does not."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import typing
from decimal import Decimal
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from harness.tiny_models import tiny_config

from charlm.errors import ConfigError
from charlm.models.bigram import BigramLM
from charlm.models.config import PRESETS, BigramConfig, GPTConfig, GPTConfigFields, PresetName
from charlm.models.gpt import GPT

FIELDS = [field.name for field in dataclasses.fields(GPTConfig)]
COUNTS = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp_width")
SWITCHES = ("bias", "qkv_bias", "head_bias", "qk_norm", "tie_weights")

BAD_VALUES: dict[str, object] = {
    "negative": -1,
    "zero": 0,
    "huge": 10**12,
    "beyond any repr": 10**5000,
    "huge negative": -(10**400),
    "nan": math.nan,
    "infinite": math.inf,
    "True": True,
    "a float": 2.0,
    "text": "0.1",
    "a numpy array": np.array(4),
    "a decimal": Decimal("0.5"),
    "None": None,
    "a list": [4],
    "bytes": b"4",
    "a dict": {},
}


def is_right(name: str, value: object) -> bool:
    """Say which of the bad values are good ones for a field, after its documentation."""
    if name in SWITCHES:
        return value is True
    if name in {"dropout", "attention_dropout"} and type(value) is int and value == 0:
        return True
    return name in {"mlp_width", "attention_dropout"} and value is None


@pytest.mark.parametrize("name", FIELDS)
def test_a_bad_value_is_one_config_error_that_names_the_field(name: str) -> None:
    bad = [value for value in BAD_VALUES.values() if not is_right(name, value)]
    assert len(bad) >= 12
    for value in bad:
        refuse(name, value)


def refuse(name: str, value: object) -> None:
    """Give a bad value to a field in each way in which it can be given."""
    fields = {**tiny_config().to_dict(), name: value}
    for make in (
        lambda: GPTConfig.from_dict(fields),
        lambda: GPTConfig(**typing.cast("Any", fields)),
        lambda: GPT.from_config(fields),
        lambda: tiny_config().replace(**{name: value}),
    ):
        with pytest.raises(ConfigError, match=rf"^GPTConfig: {name} must be .*, got ") as caught:
            make()
        assert len(caught.value.problems) == 1
        assert len(str(caught.value)) < 250
        assert str(caught.value).isprintable()


def test_every_right_value_of_the_table_is_accepted() -> None:
    for name in FIELDS:
        for value in BAD_VALUES.values():
            if is_right(name, value):
                kept = getattr(tiny_config().replace(**{name: value}), name)
                assert kept == value
                assert type(kept) is (float if value == 0 else type(value))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_layer", 0, "n_layer must be an int at least 1 and at most 256, got 0"),
        ("n_layer", "4", "n_layer must be an int at least 1 and at most 256, got '4'"),
        ("dropout", 1.0, "dropout must be a finite number at least 0 and below 1, got 1.0"),
        ("mlp_width", 0, "mlp_width must be an int at least 1 and at most 1048576, or None, got 0"),
        ("bias", 1, "bias must be True or False, got 1"),
        ("position", "alibi", "position must be one of 'learned', 'rotary', got 'alibi'"),
        ("n_head", np.array(2), "n_head must be an int at least 1 and at most 1024, got array(2) (ndarray)"),
        ("norm", "\x1b[31m", r"norm must be one of 'layernorm', 'rmsnorm', got '\x1b[31m'"),
    ],
)
def test_the_message_says_what_must_be_and_what_was_found(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config().replace(**{name: value})
    assert caught.value.problems == (message,)


def test_all_bad_fields_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        GPTConfig.from_dict({"n_layer": -1, "dropout": "x", "n_heads": 4, "bias": None})
    problems = caught.value.problems
    assert [p.split()[0] for p in problems] == ["unknown", "n_layer", "dropout", "bias", "vocab_size"]
    assert str(caught.value).startswith(
        "GPTConfig: 5 problems: unknown field 'n_heads'; did you mean 'n_head'?"
    )


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("n_layers", "n_layer"),
        ("num_heads", "n_head"),
        ("d_model", "n_embd"),
        ("context_length", "block_size"),
        ("drop_out", "dropout"),
        ("vocab_sise", "vocab_size"),
        ("tie_word_embeddings", "tie_weights"),
    ],
)
def test_an_unknown_field_comes_with_the_likely_right_one(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown field '{wrong}'; did you mean '{right}'\\?"):
        GPTConfig.from_dict({"vocab_size": 5, wrong: 1})
    with pytest.raises(ConfigError, match=f"unknown field '{wrong}'; did you mean '{right}'\\?"):
        GPTConfig(vocab_size=5, **typing.cast("Any", {wrong: 1}))


def test_an_unknown_field_without_a_likely_one_lists_the_fields() -> None:
    with pytest.raises(ConfigError, match="unknown field 'zzz'; the fields are vocab_size, block_size"):
        GPTConfig.from_dict({"vocab_size": 5, "zzz": 1})


def test_other_names_point_to_real_fields() -> None:
    assert set(GPTConfig._other_names.values()) <= set(FIELDS)
    assert not set(GPTConfig._other_names) & set(FIELDS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 10, "n_head": 3}, "n_embd must be a multiple of n_head, got n_embd 10 and n_head 3"),
        (
            {"n_embd": 9, "n_head": 3, "position": "rotary"},
            "rotary positions need an even n_embd / n_head, got 9 / 3",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_an_error(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^GPTConfig: {message}$"):
        tiny_config().replace(**fields)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lectur", "did you mean 'lecture'?"),
        ("gpt-2", "did you mean 'gpt2'?"),
        ("zzz", "there are 'lecture'"),
        ("runs/best", "charlm.load(path)"),
    ],
)
def test_an_unknown_preset_says_which_there_are(name: Any, hint: str) -> None:
    with pytest.raises(ConfigError, match="unknown preset") as caught:
        GPT.from_config(name, vocab_size=65)
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", get_args(PresetName))
def test_a_preset_needs_the_size_of_the_vocabulary(name: PresetName) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=tokenizer\.vocab_size") as caught:
        GPT.from_config(name)
    assert caught.value.problems == (str(caught.value),)
    fields: dict[str, Any] = {"n_layer": 0, "n_embd": 10, "n_head": 3}
    with pytest.raises(ConfigError, match=r"vocab_size=tokenizer\.vocab_size") as caught:
        GPT.from_config(name, **fields)
    assert [problem.split()[0] for problem in caught.value.problems] == ["preset", "n_layer", "n_embd"]
    with pytest.raises(ConfigError, match="unknown preset") as caught:
        GPT.from_config("x", **fields)  # type: ignore[arg-type]  # the point of the test
    assert [problem.split()[0] for problem in caught.value.problems] == ["unknown", "n_layer", "n_embd"]


@pytest.mark.parametrize("config", [5, None, ["vocab_size"], 2.0])
def test_from_config_refuses_what_is_no_config(config: Any) -> None:
    with pytest.raises(ConfigError, match="config must be a GPTConfig, a mapping or a preset's name, got"):
        GPT.from_config(config)
    with pytest.raises(ConfigError, match="BigramConfig: the fields must be a mapping, got"):
        BigramLM.from_config(config)


@pytest.mark.parametrize("config", [{"vocab_size": 65}, "lecture", 65, BigramConfig(vocab_size=65)])
def test_the_constructor_points_to_from_config(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"config must be a GPTConfig, got \w+\. GPT.from_config takes"):
        GPT(config)


def test_from_config_reports_bad_overrides() -> None:
    with pytest.raises(ConfigError, match="n_layer must be an int at least 1 and at most 256, got -1"):
        GPT.from_config("lecture", vocab_size=65, n_layer=-1)


@pytest.mark.parametrize("vocab_size", [0, -1, True, 2.0, "65", None, 10**7, np.float64(65)])
def test_a_bigram_model_checks_its_vocabulary(vocab_size: int) -> None:
    with pytest.raises(ConfigError, match="BigramConfig: vocab_size must be an int at least 1"):
        BigramLM(vocab_size)


def plain_type(hint: Any) -> Any:
    """Return an annotation without its bounds, also inside a union."""
    if get_origin(hint) is Annotated:
        return get_args(hint)[0]
    if type(None) in get_args(hint):
        return next(plain_type(part) for part in get_args(hint) if part is not type(None)) | None
    return hint


def test_the_typed_dict_has_exactly_the_fields_and_types_of_the_config() -> None:
    config_types = {
        name: plain_type(hint)
        for name, hint in get_type_hints(GPTConfig, include_extras=True).items()
        if name in FIELDS
    }
    assert get_type_hints(GPTConfigFields) == config_types
    assert list(get_type_hints(GPTConfigFields)) == FIELDS
    assert not GPTConfigFields.__required_keys__


@pytest.mark.parametrize("name", get_args(PresetName))
def test_a_preset_sets_every_field_but_the_vocabulary(name: PresetName) -> None:
    assert set(PRESETS[name]) == set(FIELDS) - {"vocab_size"}
    GPTConfig.from_dict({**PRESETS[name], "vocab_size": 65})


def test_there_is_a_preset_for_each_name() -> None:
    assert tuple(PRESETS) == get_args(PresetName)


def test_nobody_can_change_a_preset() -> None:
    with pytest.raises(TypeError):
        PRESETS["lecture"] = {}  # type: ignore[index]  # that it cannot be changed is the point
    with pytest.raises(TypeError):
        PRESETS["lecture"]["n_layer"] = 1  # type: ignore[index]  # the same
    assert dict(PRESETS["lecture"])["n_layer"] == 6


def test_the_defaults_are_the_lecture_model() -> None:
    assert GPTConfig(vocab_size=65) == GPTConfig.from_dict({**PRESETS["lecture"], "vocab_size": 65})


@pytest.mark.parametrize(
    ("fields", "width"),
    [
        ({"n_embd": 48, "n_head": 2}, 192),
        ({"n_embd": 48, "n_head": 2, "activation": "swiglu"}, 128),
        ({"mlp_width": 7}, 7),
    ],
)
def test_the_network_width_follows_the_embedding_unless_given(fields: dict[str, object], width: int) -> None:
    assert tiny_config().replace(**fields).effective_mlp_width == width


def test_every_field_has_its_documentation_below_it() -> None:
    (tree,) = ast.parse(inspect.getsource(GPTConfig)).body
    assert isinstance(tree, ast.ClassDef)
    documented = {
        field.target.id
        for field, text in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    assert set(FIELDS) - {"vocab_size"} <= documented
