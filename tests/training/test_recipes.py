"""Which preset a time, a text and a device get, and that recipes and presets belong together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm import GPT, BigramLM, BlockDataset, CharTokenizer, Trainer
from charlm.errors import ConfigError
from charlm.evaluation import evaluate
from charlm.models.config import PRESETS, GPTConfig, PresetName
from charlm.testing import tiny_corpus
from charlm.training import RECIPES, TrainerConfig, recommend
from charlm.training.config import saved_config

EARLIER_DEFAULTS: dict[str, object] = {
    "max_steps": 2000,
    "minutes": None,
    "batch_size": 32,
    "accumulate": 1,
    "reduce": "exact",
    "seed": 1337,
    "replacement": True,
    "optimizer": "adamw",
    "learning_rate": 0.001,
    "weight_decay": 0.1,
    "betas": [0.9, 0.99],
    "momentum": 0.95,
    "grad_clip": 1.0,
    "nonfinite": "raise",
    "schedule": "wsd",
    "warmup_steps": 50,
    "cooldown": 0.6,
    "min_lr_ratio": 0.0,
    "precision": "auto",
    "compile": False,
    "eval_interval": 250,
    "eval_chars": None,
    "log_interval": 10,
    "save_interval": None,
    "sample_interval": None,
    "sample_chars": 200,
    "keep_last": 1,
    "keep_best": 1,
    "patience": None,
    "restore_best": True,
    "max_seconds": None,
}
"""What a file means that lacks a field: the defaults of the time when format version 1 was frozen."""

RECIPES_IN_FULL: dict[str, dict[str, object]] = {
    "lecture": {
        "max_steps": 5000,
        "minutes": None,
        "batch_size": 64,
        "accumulate": 1,
        "reduce": "exact",
        "seed": 1337,
        "replacement": True,
        "optimizer": "adamw",
        "learning_rate": 0.0003,
        "weight_decay": 0.01,
        "betas": [0.9, 0.999],
        "momentum": 0.95,
        "grad_clip": None,
        "nonfinite": "raise",
        "schedule": "constant",
        "warmup_steps": 0,
        "cooldown": 0.6,
        "min_lr_ratio": 0.0,
        "precision": "auto",
        "compile": False,
        "eval_interval": 500,
        "eval_chars": None,
        "log_interval": 10,
        "save_interval": None,
        "sample_interval": None,
        "sample_chars": 200,
        "keep_last": 1,
        "keep_best": 1,
        "patience": None,
        "restore_best": True,
        "max_seconds": None,
    },
    "gpt2": {
        "max_steps": 5000,
        "minutes": None,
        "batch_size": 12,
        "accumulate": 1,
        "reduce": "exact",
        "seed": 1337,
        "replacement": True,
        "optimizer": "adamw",
        "learning_rate": 0.0006,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
        "momentum": 0.95,
        "grad_clip": 1.0,
        "nonfinite": "raise",
        "schedule": "cosine",
        "warmup_steps": 100,
        "cooldown": 0.6,
        "min_lr_ratio": 0.1,
        "precision": "auto",
        "compile": False,
        "eval_interval": 250,
        "eval_chars": None,
        "log_interval": 10,
        "save_interval": None,
        "sample_interval": None,
        "sample_chars": 200,
        "keep_last": 1,
        "keep_best": 1,
        "patience": None,
        "restore_best": True,
        "max_seconds": None,
    },
    "cpu-10s": {
        "max_steps": 500,
        "minutes": None,
        "batch_size": 16,
        "accumulate": 1,
        "reduce": "exact",
        "seed": 1337,
        "replacement": False,
        "optimizer": "muon",
        "learning_rate": 0.015,
        "weight_decay": 0.1,
        "betas": [0.8, 0.95],
        "momentum": 0.85,
        "grad_clip": None,
        "nonfinite": "raise",
        "schedule": "wsd",
        "warmup_steps": 20,
        "cooldown": 0.6,
        "min_lr_ratio": 0.0,
        "precision": "auto",
        "compile": False,
        "eval_interval": 250,
        "eval_chars": None,
        "log_interval": 10,
        "save_interval": None,
        "sample_interval": None,
        "sample_chars": 200,
        "keep_last": 1,
        "keep_best": 1,
        "patience": None,
        "restore_best": True,
        "max_seconds": None,
    },
    "cpu-1min": {
        "max_steps": 1200,
        "minutes": None,
        "batch_size": 16,
        "accumulate": 1,
        "reduce": "exact",
        "seed": 1337,
        "replacement": False,
        "optimizer": "muon",
        "learning_rate": 0.007,
        "weight_decay": 0.1,
        "betas": [0.8, 0.95],
        "momentum": 0.85,
        "grad_clip": None,
        "nonfinite": "raise",
        "schedule": "wsd",
        "warmup_steps": 20,
        "cooldown": 0.6,
        "min_lr_ratio": 0.0,
        "precision": "auto",
        "compile": False,
        "eval_interval": 250,
        "eval_chars": None,
        "log_interval": 10,
        "save_interval": None,
        "sample_interval": None,
        "sample_chars": 200,
        "keep_last": 1,
        "keep_best": 1,
        "patience": None,
        "restore_best": True,
        "max_seconds": None,
    },
    "cpu-5min": {
        "max_steps": 1500,
        "minutes": None,
        "batch_size": 8,
        "accumulate": 1,
        "reduce": "exact",
        "seed": 1337,
        "replacement": False,
        "optimizer": "muon",
        "learning_rate": 0.006,
        "weight_decay": 0.1,
        "betas": [0.8, 0.95],
        "momentum": 0.85,
        "grad_clip": None,
        "nonfinite": "raise",
        "schedule": "wsd",
        "warmup_steps": 20,
        "cooldown": 0.6,
        "min_lr_ratio": 0.0,
        "precision": "auto",
        "compile": False,
        "eval_interval": 250,
        "eval_chars": None,
        "log_interval": 10,
        "save_interval": None,
        "sample_interval": None,
        "sample_chars": 200,
        "keep_last": 1,
        "keep_best": 1,
        "patience": None,
        "restore_best": True,
        "max_seconds": None,
    },
}


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
    changes = {"conv_width": 5} if preset == "cpu-1min" else {}
    assert (found.preset, found.changes) == (preset, changes)
    assert found.reasons[0] == f"for {minutes or 1:g} min on a CPU"
    assert len(found.reasons) == 1 + len(changes)


@pytest.mark.parametrize(
    ("chars", "minutes", "epochs"),
    [(3_000, 5, 5), (49_999, 60, 5), (50_000, 1, 3), (200_000, 2.4, 3), (200_000, 2.5, 3), (10**9, 60, 3)],
)
def test_a_model_with_a_convolution_reads_a_text_a_few_times(chars: int, minutes: float, epochs: int) -> None:
    found = recommend(chars, chars // 9, minutes=minutes)
    model = {**PRESETS[found.preset], **found.changes}
    assert (model["conv_width"], model["dropout"], found.most_chars) == (5, 0, epochs * chars)


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
    assert found.most_chars >= 3 * train


def test_every_preset_has_a_recipe_and_the_recipes_are_whole() -> None:
    assert tuple(RECIPES) == tuple(PRESETS)
    for name, config in RECIPES.items():
        model = GPTConfig.from_dict({**PRESETS[name], "vocab_size": 65})
        assert config.max_steps > config.warmup_steps
        assert model.num_parameters() > 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_it_always_was_in_every_field(name: PresetName) -> None:
    assert RECIPES[name].to_dict() == RECIPES_IN_FULL[name]


def test_the_defaults_are_the_recipe_for_a_minute() -> None:
    assert TrainerConfig() == RECIPES["cpu-1min"]
    assert TrainerConfig() == RECIPES[recommend(10**7, 10**6, minutes=1).preset]


def test_a_field_that_a_file_lacks_is_what_it_was_when_the_file_was_written() -> None:
    assert saved_config({}).to_dict() == EARLIER_DEFAULTS
    full = RECIPES_IN_FULL["cpu-5min"]
    for name, then in EARLIER_DEFAULTS.items():
        others = {field: value for field, value in full.items() if field != name}
        assert saved_config(others).to_dict() == {**full, name: then}


def test_every_field_has_a_value_for_files_that_lack_it() -> None:
    assert [field.name for field in dataclasses.fields(TrainerConfig)] == list(EARLIER_DEFAULTS)


def test_what_a_file_holds_is_checked() -> None:
    with pytest.raises(ConfigError, match="unknown field 'lr'; did you mean 'learning_rate'"):
        saved_config({"lr": 1})


@pytest.mark.parametrize("block_size", [8, 128])
def test_the_defaults_bring_a_bigram_model_close_to_its_counts(shakespeare: str, block_size: int) -> None:
    """It has no matrix for Muon: AdamW moves all of it."""
    tokenizer = CharTokenizer.from_text(shakespeare)
    train, val = BlockDataset.from_text(shakespeare, tokenizer, block_size).split()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1337)
        model = BigramLM(tokenizer.vocab_size)
    best = Trainer(model, train, val_data=val, device="cpu").fit().best
    assert best is not None
    assert best.loss_nats < 2.482 + 0.1  # what counting reaches, see test_lecture.py


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bigram", "gpt"])
def test_the_defaults_train_on_a_text_that_is_shorter_than_one_batch(kind: str) -> None:
    text = tiny_corpus(300)
    tokenizer = CharTokenizer.from_text(text)
    data = BlockDataset.from_text(text, tokenizer, block_size=64)
    assert len(text) < TrainerConfig().batch_size * data.block_size
    V = tokenizer.vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1337)
        model = BigramLM(V) if kind == "bigram" else GPT.from_config("cpu-10s", vocab_size=V)
    before = evaluate(model, data).loss_nats
    Trainer(model, data, TrainerConfig(max_steps=50), device="cpu").fit()
    assert evaluate(model, data).loss_nats < before - 0.1
