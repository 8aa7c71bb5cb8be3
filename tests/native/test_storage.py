"""Weights of 16 and 8 bits: what a model says follows from its values alone, and fewer bits are read."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from harness.drawn_models import needs_kernel, random_rows
from harness.states import keys_and_values_in_bfloat16, torch_state
from harness.tiny_models import VARIANTS, prompt, tiny_config, tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from charlm import BigramLM, CharLM, CharTokenizer, load
from charlm.errors import InputError
from charlm.models.gpt import GPT
from charlm.native.gpt import NativeGPT
from charlm.native.library import ModelStruct
from charlm.native.storage import STORAGES, Storage, round_weights, rounded, storage_of, to_int8

VOCAB = "\nabcdefghijkl"


def packed(model: GPT) -> ModelStruct:
    engine = model.new_state().engine
    assert isinstance(engine, NativeGPT)
    return engine._weights.packed.struct


def stored(model: GPT) -> Storage:
    return STORAGES[int(packed(model).storage)]


@settings(deadline=None)
@given(
    N=st.integers(1, 20),
    K=st.integers(1, 70),
    size=st.sampled_from([1e-44, 1e-38, 1e-31, 1e-29, 1e-3, 1.0, 1e4, 1e36]),
    seed=st.integers(0, 100),
)
def test_what_was_rounded_is_rounded_to_itself_and_is_near(N: int, K: int, size: float, seed: int) -> None:
    weights = size * torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    weights[0] = 0
    for storage in STORAGES:
        once = rounded(weights, storage)
        assert once.dtype == torch.float32
        assert torch.equal(rounded(once, storage), once)
        assert STORAGES.index(storage_of([once])) >= STORAGES.index(storage)
        step = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 1 / 250}[storage]
        assert ((once - weights).abs() <= step * weights.abs().amax(dim=1, keepdim=True) + 1e-30).all()
    integers, scales = to_int8(weights)
    assert int(integers.abs().max()) <= 127
    assert torch.equal(integers.double() * scales.double()[:, None], rounded(weights, "int8").double())


@needs_kernel
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_rounded_model_is_stored_in_so_many_bits_and_says_what_its_values_say(
    name: str, storage: Storage
) -> None:
    model = tiny_gpt(VARIANTS[name])
    round_weights(model, storage)
    assert stored(model) == storage
    rows = random_rows([1, 5, 16, 40])
    states = [model.new_state(4), torch_state(model, 4)]
    for state in states:
        state.observe(rows)
    with nullcontext() if storage == "float32" else keys_and_values_in_bfloat16():
        ours, theirs = (state.predict() for state in states)
    rtol, atol = (2e-4, 1e-4) if storage == "float32" else (1e-2, 3e-2)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@needs_kernel
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_a_write_to_a_weight_leaves_the_grid(storage: Storage) -> None:
    model = tiny_gpt(tiny_config())
    round_weights(model, storage)
    model.generate(prompt(1, 3), 3, seed=0)
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_fc.weight")[3, 4] += 1e-5
    assert stored(model) == "float32"
    states = [model.new_state(2), torch_state(model, 2)]
    for state in states:
        state.observe(prompt(2, 9))
    torch.testing.assert_close(states[0].predict(), states[1].predict(), rtol=1e-5, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_among_integers(bad: float) -> None:
    """In the input of a product, of which integers are made."""
    model = tiny_gpt(tiny_config())
    round_weights(model, "int8")
    with torch.no_grad():
        model.transformer.wte.weight[5, 2] = bad
    assert stored(model) == "int8"
    state = model.new_state(2)
    state.observe(torch.tensor([[1, 5], [1, 2]]))
    predicted = state.predict()
    assert not predicted[0].isfinite().any()
    assert predicted[1].isfinite().all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_rounds_and_what_is_saved_then_is_the_same_model(
    storage: Storage, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_gpt(tiny_config("cpu-1min"), dtype=dtype)
    CharLM(model, CharTokenizer(VOCAB)).save(tmp_path / "saved")
    lm = load(tmp_path / "saved", device="cpu", weights=storage)
    kept = {name: value.float() for name, value in model.state_dict().items()}
    for name, value in lm.model.state_dict().items():
        assert value.dtype == torch.float32
        matrix = any(part in name for part in ("lm_head", "attn", "mlp")) and name.endswith("weight")
        assert torch.equal(value, rounded(kept[name], storage) if matrix else kept[name])
    lm.save(tmp_path / "again")
    again = load(tmp_path / "again", device="cpu")
    assert again.evaluate(VOCAB * 5).loss_nats == lm.evaluate(VOCAB * 5).loss_nats
    assert again.generate("abc", 50, seed=1) == lm.generate("abc", 50, seed=1)
    assert isinstance(again.model, GPT)
    if again.model.why_not_native() is None:
        assert stored(again.model) == (
            "bfloat16" if (dtype, storage) == (torch.bfloat16, "float32") else storage
        )


def test_an_embedding_that_is_the_output_s_matrix_is_rounded_with_it() -> None:
    model = tiny_gpt(tiny_config("gpt2"))
    before = model.lm_head.weight.detach().clone()
    round_weights(model, "int8")
    assert model.transformer.wte.weight is model.lm_head.weight
    assert torch.equal(model.transformer.wte.weight, rounded(before, "int8"))


def test_other_names_and_models_without_matrices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="float32, bfloat16, int8, or None, got 'int4'"):
        round_weights(tiny_gpt(tiny_config()), "int4")  # type: ignore[arg-type]
    CharLM(BigramLM(3), CharTokenizer("abc")).save(tmp_path / "bigram")
    with pytest.raises(InputError, match="a BigramLM has no linear layers"):
        load(tmp_path / "bigram", weights="int8")


def test_a_sum_too_long_for_integers_is_one_of_floats() -> None:
    kept = [storage_of([torch.full((1, K), 0.5 * 127)]) for K in (65_000, 65_001)]
    assert kept == ["int8", "bfloat16"]


def test_any_module_with_linear_layers_can_be_rounded() -> None:
    layers = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    round_weights(layers, "int8")
    assert storage_of([layers.get_parameter("0.weight")]) == "int8"


@needs_kernel
@pytest.mark.parametrize("storage", STORAGES)
def test_beside_narrow_weights_keys_and_values_take_half_the_memory_and_say_the_same(
    storage: Storage,
) -> None:
    model = tiny_gpt(tiny_config("cpu-1min", block_size=100))
    round_weights(model, storage)
    text = prompt(1, 90)[0]
    states = [model.new_state(), torch_state(model)]
    for state in states:
        state.observe([text[:1]])
    ours, theirs = (float(state.score([text[1:]])[0].mean()) for state in states)
    assert abs(ours - theirs) < (1e-5 if storage == "float32" else 1e-3)
    engine = states[0].engine
    assert isinstance(engine, NativeGPT)
    kept = engine._caches.keys.nbytes + engine._caches.values.nbytes
    config = model.config
    D = config.n_embd // config.n_head
    places = 2 * config.n_layer * config.n_head * 128  # in panels of 64
    assert places * D * 2 <= kept / (2 if storage == "float32" else 1) <= places * (D + 15) * 2
