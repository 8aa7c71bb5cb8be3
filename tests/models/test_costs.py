"""What the config foretells of a model, against the model that is built: parameters, operations, memory."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from harness.tiny_models import ACTIVATIONS, VARIANTS, random_ids, tiny_config, tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from charlm.models.config import PRESETS, GPTConfig, PresetName
from charlm.models.gpt import GPT
from charlm.training.memory import activation_bytes

PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)


configs = st.builds(
    lambda heads, width, **fields: GPTConfig(n_head=heads, n_embd=2 * heads * width, **fields),
    heads=st.integers(1, 4),
    width=st.integers(1, 6),
    vocab_size=st.integers(1, 40),
    block_size=st.integers(1, 20),
    n_layer=st.integers(1, 3),
    mlp_width=st.none() | st.integers(1, 50),
    bias=st.booleans(),
    qkv_bias=st.booleans(),
    head_bias=st.booleans(),
    position=st.sampled_from(["learned", "rotary"]),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    qk_norm=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    tie_weights=st.booleans(),
    init=st.sampled_from(["normal", "gpt2", "zero"]),
)


@settings(max_examples=25, deadline=None)
@given(configs)
def test_the_config_knows_the_number_of_parameters_before_the_model_is_built(config: GPTConfig) -> None:
    with torch.device("meta"):
        model = GPT(config)
    assert config.num_parameters() == model.num_parameters()
    assert model.num_parameters() == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def test_parameter_counts_are_those_of_the_lecture() -> None:
    small = GPTConfig(vocab_size=65, n_embd=64, n_head=4, n_layer=4, block_size=32)
    assert small.num_parameters() == 209_729
    assert GPTConfig.from_dict({**PRESETS["lecture"], "vocab_size": 65}).num_parameters() == 10_788_929


def test_gpt2_small_has_its_published_number_of_parameters() -> None:
    assert GPTConfig.from_dict({**PRESETS["gpt2"], "vocab_size": 50_257}).num_parameters() == 124_439_808


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_flops_per_char_are_those_that_torch_counts(config: GPTConfig) -> None:
    model = tiny_gpt(config)
    B, T = 3, config.block_size
    idx = random_ids(config, B, T)
    with FlopCounterMode(display=False) as counter:
        _, loss = model(idx, idx)
    # torch counts every pair of characters in the attention, the config those that a causal model needs.
    unneeded = config.n_layer * 4 * config.n_embd * (T - T // 2)
    assert counter.get_total_flops() / (B * T) == config.flops_per_char() + unneeded
    with counter:
        loss.backward()
    assert config.flops_per_char(training=True) == 3 * config.flops_per_char()
    measured = counter.get_total_flops() / (B * T)
    assert measured == pytest.approx(2 * (config.flops_per_char() + unneeded), rel=0.01)


def saved_bytes(model: GPT, idx: Tensor) -> int:
    """Return the bytes of the tensors that autograd keeps for the backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    own |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, loss = model(idx, idx)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize(
    ("B", "shape"),
    [
        (1, {"block_size": 16}),
        (4, {"block_size": 64, "n_head": 8}),
        (16, {"block_size": 8, "n_layer": 3}),
        (2, {"block_size": 128, "n_embd": 64, "vocab_size": 500}),
        (8, {"block_size": 32, "dropout": 0.2}),
        (8, {"block_size": 32, "activation": "swiglu"}),
        (8, {"block_size": 32, "activation": "gelu", "norm": "rmsnorm"}),
    ],
)
def test_the_memory_estimate_is_near_what_is_kept_for_the_backward_pass(
    preset: PresetName, B: int, shape: dict[str, object]
) -> None:
    config = tiny_config(preset, **shape)
    with torch.random.fork_rng(devices=[]):
        measured = saved_bytes(tiny_gpt(config), random_ids(config, B, config.block_size))
    state = 16 * config.num_parameters()  # weights, gradients, two moments
    estimate = state + activation_bytes(config, B, fused_attention=False, half_precision=False)
    # It is more, as a rule: the backward pass makes gradients of what was kept, with V logits the most.
    assert 0.6 < (estimate - state) / measured < 2.5
    assert 0.6 < estimate / (measured + state) < 2.2


def test_fused_attention_and_half_precision_take_less_memory() -> None:
    config = GPTConfig(vocab_size=65)
    whole = activation_bytes(config, 8, fused_attention=False, half_precision=False)
    weights = 4 * 1.1 * 8 * 256 * 6 * 6 * 256 * 3  # B T, layers, heads, T, and three tensors
    fused = activation_bytes(config, 8, fused_attention=True, half_precision=False)
    assert whole - fused == pytest.approx(weights, rel=1e-6)
    half = activation_bytes(config, 8, fused_attention=True, half_precision=True)
    assert 0.7 < half / fused < 0.9
