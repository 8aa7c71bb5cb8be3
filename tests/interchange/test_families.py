"""Which class of transformers stands for which GPT, and what is refused by name."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
from harness.tiny_models import VARIANTS, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from charlm.errors import FileFormatError, InputError
from charlm.interchange.families import family_of, foreign_config, known_family, own_config
from charlm.models.config import PRESETS, GPTConfig

TEXTS = st.sampled_from(["", "a", "ab", "é", "\0", "type", "gelu"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70_000) | st.floats(0, 2) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
"""Values that JSON has."""
CLASSES = {
    "preset lecture": "GPT2LMHeadModel",
    "preset gpt2": "GPT2LMHeadModel",
    "preset cpu-1min": "ApertusForCausalLM",
    "learned layernorm relu2": "GPT2LMHeadModel",
    "rotary layernorm gelu": "GPTNeoXForCausalLM",
}
REFUSED = {
    "preset cpu-10s": "conv_width must be 1, got 5",
    "preset cpu-5min": "conv_width must be 1, got 5",
    "learned layernorm swiglu": "activation must not be 'swiglu' where norm is 'layernorm'",
    "learned rmsnorm relu": "norm must be 'layernorm' where position is 'learned'",
    "rotary rmsnorm relu": "head_bias must be False where norm is 'rmsnorm'",
    "qk_norm learned": "qk_norm must be False where norm is 'layernorm'",
    "convolution of 2": "conv_width must be 1, got 2",
}


@pytest.mark.parametrize(("name", "architecture"), CLASSES.items())
def test_each_kind_of_gpt_has_its_class(name: str, architecture: str) -> None:
    assert family_of(VARIANTS[name]).architecture == architecture


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_no_class_computes_is_refused_with_the_field_s_name(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=re.escape(reason)):
        family_of(VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_settings_come_back_as_they_went_out(name: str) -> None:
    config = VARIANTS[name].replace(head_bias=False)
    try:
        family = family_of(config)
    except InputError:
        return
    values = foreign_config(config, family)
    back = own_config(values, known_family(values, "config.json"), "config.json")
    told = {
        "bias": False,
        "qkv_bias": False,
        "tie_weights": False,
        "init": "normal",
    }  # by the weights, or not
    expected = config.replace(mlp_width=config.effective_mlp_width, attention_dropout=0.0, **told)
    assert back == expected


def test_every_field_that_matters_is_looked_at() -> None:
    """A field that is not spoken of in the table would be lost in silence."""
    fields = set(GPTConfig.from_dict({"vocab_size": 3}).to_dict())
    training = {"dropout", "attention_dropout", "init"}
    assert fields - training == {
        *("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp_width", "bias", "qkv_bias"),
        *("head_bias", "position", "conv_width", "norm", "qk_norm", "activation", "tie_weights"),
    }


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "another class": ("model_type", {"model_type": "mamba"}),
    "no class": ("model_type", {"model_type": None}),
    "another activation": ("hidden_act", {"hidden_act": "gelu"}),
    "another eps": ("rms_norm_eps", {"rms_norm_eps": 1e-5}),
    "no eps": ("rms_norm_eps", {"rms_norm_eps": None}),
    "shared keys": ("num_key_value_heads", {"num_key_value_heads": 1}),
    "wide heads": ("head_dim", {"head_dim": 32}),
    "another base": ("rope_theta", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "stretched": ("rope_type", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}),
    "stretched, version 4": ("rope_type", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}),
    "in part": ("partial_rotary_factor", {"rope_parameters": None, "rotary_pct": 0.25}),
    "no size": ("n_layer", {"num_hidden_layers": None}),
    "a size of text": ("n_embd", {"hidden_size": "32"}),
}


@pytest.mark.parametrize(("named", "changes"), CHANGES.values(), ids=CHANGES.keys())
def test_what_a_gpt_does_not_compute_is_refused_with_the_field_s_name(
    named: str, changes: dict[str, Any]
) -> None:
    config = tiny_config("cpu-1min", activation="swiglu", qk_norm=False)
    values = {**foreign_config(config, family_of(config)), **changes}
    with pytest.raises(FileFormatError, match=rf"'config\.json' .*{named}"):
        own_config(values, known_family(values, "config.json"), "config.json")


def test_a_base_of_rotary_positions_that_old_files_do_not_say_is_their_class_s() -> None:
    for config, base in ((tiny_config("cpu-1min", qk_norm=False), 1e4), (tiny_config("cpu-1min"), 1.2e7)):
        values = foreign_config(config, family_of(config))
        del values["rope_parameters"], values["rope_theta"], values["rope_scaling"]
        with contextlib.nullcontext() if base == 1e4 else pytest.raises(FileFormatError, match="rope_theta"):
            assert own_config(values, known_family(values, "config.json"), "config.json").position == "rotary"


@given(st.data())
def test_any_value_of_a_field_is_accepted_or_refused(data: st.DataObject) -> None:
    kinds = [config for name, config in VARIANTS.items() if name in CLASSES]
    config = data.draw(st.sampled_from(kinds))
    values = foreign_config(config, family_of(config))
    values[data.draw(st.sampled_from(sorted(values)))] = data.draw(ANYTHING)
    with contextlib.suppress(FileFormatError):
        own_config(values, known_family(values, "config.json"), "config.json")


def test_the_presets_that_are_refused_are_those_that_the_guide_names() -> None:
    refused = []
    for name, fields in PRESETS.items():
        try:
            family_of(GPTConfig.from_dict({**fields, "vocab_size": 65}))
        except InputError:
            refused.append(name)
    assert refused == ["cpu-10s", "cpu-5min"]
