"""Weights that change: generation says what the model computes with those of now.

The fast path keeps a copy of the weights. It has to notice every change at the next generation, and in the
middle of one those that torch counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from harness.changed_models import assert_says_what_it_computes, kind_of_state
from harness.drawn_models import needs_kernel, random_rows
from harness.states import torch_state
from harness.tiny_models import VARIANTS, prompt, tiny_config, tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from charlm.errors import InputError
from charlm.generation import SamplingOptions, next_ids
from charlm.models.gpt import GPT
from charlm.native.gpt import NativeGPT

pytestmark = needs_kernel

ROWS = random_rows([3, 9, 30])
OPTIONS = SamplingOptions(seed=1)


@pytest.fixture
def model() -> GPT:
    model = tiny_gpt(tiny_config(bias=True, tie_weights=False))
    model.generate(prompt(2, 3), 3, seed=0)  # the fast path has its copy of the weights
    assert kind_of_state(model) == "fast"
    return model


def train(model: GPT) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(prompt(4, 16), prompt(4, 16))[1].backward()
    optimizer.step()


def load_others(model: GPT) -> None:
    model.load_state_dict(tiny_gpt(model.config, seed=5).state_dict())


def assign_others(model: GPT) -> None:
    model.load_state_dict(tiny_gpt(model.config, seed=5).state_dict(), assign=True)


def write_in_place(model: GPT) -> None:
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_fc.weight").mul_(1.5)


def write_through_data(model: GPT) -> None:
    model.transformer.wte.weight.data[:, 3] += 1.0


def write_through_numpy(model: GPT) -> None:
    model.transformer.wte.weight.detach().numpy()[:, 3] += 1.0


def exchange_data(model: GPT) -> None:
    model.lm_head.weight.data = 2 * model.lm_head.weight.data


def replace_a_parameter(model: GPT) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))


def replace_a_layer(model: GPT) -> None:
    model.lm_head = nn.Linear(model.config.n_embd, model.vocab_size)


def exchange_two_parameters(model: GPT) -> None:
    first, second = (model.get_parameter(f"transformer.h.{i}.mlp.c_fc.weight") for i in range(2))
    with torch.no_grad():
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)


CHANGES = (
    *(train, load_others, assign_others, write_in_place, write_through_data, write_through_numpy),
    *(exchange_data, replace_a_parameter, replace_a_layer, exchange_two_parameters),
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_noticed_at_the_next_generation(
    model: GPT, change: Callable[[GPT], None]
) -> None:
    before = model.log_probs(prompt(2, 9))
    change(model)
    assert kind_of_state(model) == "fast"
    assert_says_what_it_computes(model)
    assert not torch.allclose(model.log_probs(prompt(2, 9)), before, atol=1e-3)


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(VARIANTS)),
    which=st.integers(0, 10**6),
    at=st.integers(0, 10**6),
    through_data=st.booleans(),
)
def test_a_change_of_any_single_number_of_any_parameter_is_noticed(
    name: str, which: int, at: int, through_data: bool
) -> None:
    model = tiny_gpt(VARIANTS[name])
    source = model.new_state()
    parameters = list(model.parameters())
    parameter = parameters[which % len(parameters)]
    with torch.no_grad():
        numbers = parameter.data if through_data else parameter
        numbers.view(-1)[at % parameter.numel()] += 4.0
    assert isinstance(source.engine, NativeGPT)
    state = model.new_state(3)
    twin = tiny_gpt(VARIANTS[name])
    twin.load_state_dict(model.state_dict())
    fresh = twin.new_state(3)
    for one in (state, fresh):
        one.observe(ROWS)
    assert torch.equal(state.predict(), fresh.predict())
    assert_says_what_it_computes(model, 1e-3)


@pytest.mark.parametrize(
    "change", [train, load_others, write_in_place, exchange_two_parameters], ids=lambda f: f.__name__
)
def test_a_write_in_the_middle_of_a_generation_counts_from_the_next_id_on(
    model: GPT, change: Callable[[GPT], None]
) -> None:
    """What was read before stays read, on both paths: keys and values are not computed anew."""
    states = [model.new_state(2), torch_state(model, 2)]
    assert isinstance(states[0].engine, NativeGPT)
    for state in states:
        state.observe(prompt(2, 3))
    for _ in range(4):
        chosen = [next_ids(state, OPTIONS, range(2)) for state in states]
        assert torch.equal(*chosen)
    untouched = states[0].fork()
    kept = untouched.predict()
    change(model)
    torch.testing.assert_close(states[0].predict(), states[1].predict(), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(states[0].predict(), kept, atol=1e-3)
    for _ in range(6):
        new = next_ids(states[0], OPTIONS, range(2))
        states[1].observe(new[:, None])
        torch.testing.assert_close(states[0].predict(), states[1].predict(), rtol=1e-5, atol=1e-4)
    over_the_window = prompt(2, 20)
    for state in states:
        state.observe(over_the_window)
    torch.testing.assert_close(states[0].predict(), states[1].predict(), rtol=1e-5, atol=1e-4)


def test_training_and_generating_by_turns_gives_each_time_the_text_of_the_weights_of_then(
    model: GPT,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(5):
        optimizer.zero_grad()
        model(prompt(4, 16), prompt(4, 16))[1].backward()
        optimizer.step()
        fresh = copy.deepcopy(model)
        idx = model.generate(prompt(2, 3), 30, seed=step)
        assert torch.equal(idx, fresh.generate(prompt(2, 3), 30, seed=step))
        assert_says_what_it_computes(model)


def test_copies_and_deleted_models_have_weights_of_their_own(model: GPT) -> None:
    twin = copy.deepcopy(model)
    before = model.log_probs(prompt(2, 9))
    write_in_place(twin)
    assert torch.equal(model.log_probs(prompt(2, 9)), before)
    assert not torch.allclose(twin.log_probs(prompt(2, 9)), before, atol=1e-3)
    stream = twin.stream(prompt(1, 3), 5, seed=0)
    expected = [int(ids) for ids in twin.stream(prompt(1, 3), 5, seed=0)]
    del twin  # the stream keeps what it needs
    assert [int(ids) for ids in stream] == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_type_of_weights_counts_from_the_next_generation_on(model: GPT, dtype: torch.dtype) -> None:
    model.to(dtype)
    assert kind_of_state(model) == ("fast" if dtype == torch.bfloat16 else "readable")
    if dtype == torch.float64:
        assert_says_what_it_computes(model, 1e-9)
    widened = copy.deepcopy(model).float()
    rounding = {torch.float64: 1e-5, torch.float16: 0.05, torch.bfloat16: 1e-5}[dtype]
    got, wanted = (m.log_probs(prompt(2, 9)) for m in (model, widened))
    torch.testing.assert_close(got, wanted, rtol=0, atol=rounding)
    model.float()
    assert kind_of_state(model) == "fast"
    assert torch.equal(model.log_probs(prompt(2, 9)), widened.log_probs(prompt(2, 9)))


def to_double(model: GPT) -> None:
    model.double()
    write_in_place(model)


def to_half(model: GPT) -> None:
    model.half()
    write_in_place(model)


def widen_a_layer(model: GPT) -> None:
    write_in_place(model)
    model.lm_head = nn.Linear(model.config.n_embd, 500)


def transpose(model: GPT) -> None:
    weight = model.get_parameter("transformer.h.0.attn.c_proj.weight")
    weight.data = weight.data.t()
    write_in_place(model)


@pytest.mark.parametrize("change", [to_double, to_half, widen_a_layer, transpose], ids=lambda f: f.__name__)
def test_weights_of_another_form_end_a_generation_that_goes_on(
    model: GPT, change: Callable[[GPT], None]
) -> None:
    stream = model.stream(prompt(2, 3), 20, seed=0)
    for _ in range(3):
        next(stream)
    change(model)
    with pytest.raises(InputError, match="must keep their type and shape"):
        next(stream)
    if change not in {widen_a_layer}:
        assert_says_what_it_computes(model, 0.1)  # the next one begins with them
