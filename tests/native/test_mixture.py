"""The compiled mixture: used where all members are compiled, and equal to what PyTorch says."""

from __future__ import annotations

import pytest
import torch
from harness.drawn_models import mixed, needs_kernel, overflows, ragged
from harness.states import state_of, tensors, torch_state
from harness.tiny_models import tiny_config, tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm import BigramLM, BlockDataset, MixtureLM, NGramLM
from charlm.errors import NonFiniteError
from charlm.generation import Overflow, SamplingOptions, next_ids
from charlm.generation.decode import some_turns
from charlm.native.mixture import NativeMixture

pytestmark = needs_kernel
V = 13


def compiled(seed: int = 0, block_size: int = 8, conv_width: int = 5) -> MixtureLM:
    ids = torch.randint(V, (300,), generator=torch.Generator().manual_seed(seed))
    return mixed(
        [
            tiny_gpt(tiny_config("cpu-1min", block_size=block_size, conv_width=conv_width)),
            NGramLM(V, 4).fit(BlockDataset(ids, 4)),
        ],
        seed,
    )


@settings(max_examples=30, deadline=None)
@given(rows=ragged(20), overflow=overflows, seed=st.integers(0, 9), block_size=st.sampled_from([1, 2, 8]))
def test_it_says_what_pytorch_says_alone_and_in_a_batch(
    rows: list[list[int]], overflow: Overflow, seed: int, block_size: int
) -> None:
    model = compiled(seed, block_size)
    state = state_of(model, [ids[:1] for ids in rows], overflow=overflow)
    assert isinstance(state.engine, NativeMixture)
    slow = torch_state(model, len(rows), overflow=overflow)
    slow.observe(tensors(rows))
    state.predict()
    state.observe([torch.tensor(ids[1:], dtype=torch.int64) for ids in rows])
    found = state.predict()
    torch.testing.assert_close(found, slow.predict(), rtol=0, atol=1e-5)
    torch.testing.assert_close(state.fork().predict(), found, rtol=0, atol=0)
    for row, ids in enumerate(rows):
        assert torch.equal(state_of(model, [ids], overflow=overflow).predict()[0], found[row])


def test_a_mixture_of_what_is_not_compiled_is_asked_in_pytorch() -> None:
    assert compiled().why_not_native() is None
    model = MixtureLM([compiled().members[0], BigramLM(V)])  # type: ignore[list-item]
    assert model.why_not_native() == "there is no compiled engine for a BigramLM"
    assert not isinstance(model.new_state().engine, NativeMixture)


def test_a_hook_means_pytorch_and_a_gate_that_changes_is_seen() -> None:
    model = compiled()
    state = state_of(model, [[1, 2, 3]])
    first = state.predict()
    with torch.no_grad():
        model.gate.mul_(-1)
    assert not torch.equal(state_of(model, [[1, 2, 3]]).predict(), first)
    with model.register_forward_hook(lambda *_: None):
        assert model.why_not_native() == "a part of the model was changed: the model itself"


def test_what_is_impossible_for_all_members_stays_finite() -> None:
    model = compiled()
    ngram = model.members[1]
    assert isinstance(ngram, NGramLM)
    found = state_of(model, [[1, 2, 3]]).predict()
    assert torch.isfinite(found).all()


@settings(max_examples=25, deadline=None)
@given(
    rows=ragged(20),
    block_size=st.sampled_from([1, 2, 8, 70]),
    seed=st.integers(0, 9),
    temperature=st.sampled_from([0.0, 1.0]),
    conv_width=st.sampled_from([1, 3]),
)
def test_many_ids_in_one_call_are_those_of_one_by_one(
    rows: list[list[int]], block_size: int, seed: int, temperature: float, conv_width: int
) -> None:
    """Whether the loop is in C, in Python, or in Python with a filter that asks for logits each time."""
    model = compiled(seed, block_size, conv_width)
    options = SamplingOptions(seed=seed, temperature=temperature)
    plain = SamplingOptions(seed=seed, temperature=temperature, filters=[lambda logits, _: logits])
    states = [state_of(model, rows) for _ in range(3)]
    count = 30
    made = 0
    while made < count:
        made += len(some_turns(states[0], options, range(len(rows)), count - made)) // len(rows)
    for _ in range(count):
        next_ids(states[1], options)
        next_ids(states[2], plain)
    for row in range(len(rows)):
        assert torch.equal(states[0].text(row), states[1].text(row))
        assert torch.equal(states[0].text(row), states[2].text(row))
    assert torch.equal(states[0].predict(), states[2].predict())


def test_nothing_is_taken_where_nothing_can_be_drawn() -> None:
    model = compiled()
    state = state_of(model, [[1, 2, 3]])
    next_ids(state, SamplingOptions(seed=1))
    next_ids(state, SamplingOptions(seed=1))
    before = state.text(0)
    with torch.no_grad():
        next(model.members[0].parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="row 0"):
        next_ids(state, SamplingOptions(seed=1))
    assert torch.equal(state.text(0), before)
