"""Small models with random parameters for tests: every switch of the presets, no part of them zero."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from charlm.data.blocks import BlockDataset
from charlm.models.base import LanguageModel
from charlm.models.bigram import BigramLM
from charlm.models.config import PRESETS, GPTConfig, PresetName
from charlm.models.gpt import GPT

__all__ = [
    "ACTIVATIONS",
    "MODELS",
    "PRESET_NAMES",
    "TINY",
    "VARIANTS",
    "prompt",
    "random_ids",
    "tiny_config",
    "tiny_gpt",
]

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 13, "mlp_width": None}


def tiny_config(preset: PresetName = "lecture", **changes: object) -> GPTConfig:
    """Return a preset's switches at 2 layers, width 32 and block 16, without dropout unless asked for."""
    return GPTConfig.from_dict({**PRESETS[preset], **TINY, "dropout": 0.0, **changes})


def tiny_gpt(config: GPTConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """Build the model and fill every parameter with random numbers of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = GPT(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise + (1.0 if ".ln_" in name and name.endswith("weight") else 0.0))
            elif "wte" in name or "wpe" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter.size(1) ** -0.5)
    return model


def random_ids(config: GPTConfig, B: int, T: int, seed: int = 0) -> torch.Tensor:
    """Return (B, T) ids."""
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "relu2", "swiglu")
PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)


def variants() -> dict[str, GPTConfig]:
    """Every preset's switches, each position x norm x activation, and the remaining switches by turns."""
    found = {f"preset {name}": tiny_config(name) for name in PRESET_NAMES}
    for position, norm, activation in itertools.product(
        ("learned", "rotary"), ("layernorm", "rmsnorm"), ACTIVATIONS
    ):
        found[f"{position} {norm} {activation}"] = tiny_config(
            position=position, norm=norm, activation=activation
        )
    for position in ("learned", "rotary"):
        found[f"qk_norm {position}"] = tiny_config(qk_norm=True, position=position, n_head=4)
    for tie, head_bias in itertools.product((False, True), (False, True)):
        found[f"tie {tie} head_bias {head_bias}"] = tiny_config(tie_weights=tie, head_bias=head_bias)
    for bias, qkv_bias in itertools.product((False, True), (False, True)):
        found[f"bias {bias} qkv_bias {qkv_bias}"] = tiny_config(bias=bias, qkv_bias=qkv_bias)
    for width in (2, 20):
        found[f"convolution of {width}"] = tiny_config(conv_width=width)
    found["one head, narrow network"] = tiny_config(n_head=1, mlp_width=5)
    found["narrow swiglu"] = tiny_config(activation="swiglu", mlp_width=7, bias=False)
    return found


VARIANTS = variants()
"""Configs that together use every switch in every way."""


def bigram(dtype: torch.dtype) -> BigramLM:
    """Return a fitted bigram model of the same vocabulary."""
    model = BigramLM(13).to(dtype)
    ids = torch.randint(13, (60,), generator=torch.Generator().manual_seed(0))
    return model.fit(BlockDataset(ids, 2), smoothing=0.1)


def preset_model(name: PresetName, dtype: torch.dtype) -> GPT:
    """Return a tiny GPT with a preset's switches."""
    return tiny_gpt(tiny_config(name), dtype=dtype)


MODELS: dict[str, Callable[[torch.dtype], LanguageModel]] = {
    **{name: functools.partial(preset_model, name) for name in get_args(PresetName)},
    "swiglu": lambda d: tiny_gpt(tiny_config("cpu-1min", activation="swiglu", qk_norm=False), dtype=d),
    "odd window": lambda d: tiny_gpt(tiny_config(block_size=7), dtype=d),
    "window of one": lambda d: tiny_gpt(tiny_config(block_size=1), dtype=d),
    "window of two": lambda d: tiny_gpt(tiny_config("cpu-1min", block_size=2), dtype=d),
    "bigram": bigram,
}


def prompt(B: int, T: int) -> Tensor:
    """Return ids (B, T) for any of `MODELS`."""
    return random_ids(tiny_config(), B, T, seed=B + T)
