"""How an id is chosen: the kernel's way, the readable way, and Python's own loops must take the same one.

They add up probabilities in different orders and types, so where a uniform number or a limit is within 1e-6
of another choice, either may be taken. `oracles.plain_state.plain_choice` says how near it was.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from harness.drawn_models import needs_kernel, table_gpt
from harness.states import torch_state
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_state import plain_choice
from torch import Tensor

from charlm.errors import NonFiniteError
from charlm.generation import PredictionState, SamplingOptions, TorchEngine, next_ids, sample
from charlm.models.gpt import GPT
from charlm.native.gpt import NativeGPT
from charlm.randomness import uniforms

NEAR = 1e-6
INF, NAN = math.inf, math.nan

numbers = st.sampled_from([0.0, 0.0, 1.0, 1.0, -1.0, -3.0, 2.5, 30.0, -30.0]) | st.floats(-8, 8, width=32)


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    """Draw what follows each id (V, V), with equal numbers among them."""
    V = draw(st.sampled_from([1, 2, 3, 5, 13, 17, 40]))
    rows = draw(st.lists(st.lists(numbers, min_size=V, max_size=V), min_size=1, max_size=3))
    return torch.tensor([rows[i % len(rows)] for i in range(V)])


@st.composite
def ways(draw: st.DrawFn) -> SamplingOptions:
    """Draw any combination of the options, their ends included."""
    return SamplingOptions(
        temperature=draw(
            st.sampled_from([0, 1.0, 1.0, 0.7, 1.5, 1e-6, 1e6, 1]) | st.floats(0.05, 5.0)
        ),
        top_k=draw(st.none() | st.integers(1, 6) | st.sampled_from([13, 40, 10**9, 2**63, 2**64 + 1])),
        top_p=draw(st.none() | st.floats(0, 1, exclude_min=True) | st.sampled_from([1, 1.0, 5e-324, 0.999])),
        min_p=draw(st.none() | st.floats(0, 1) | st.sampled_from([0, 0.0, 1, 1.0, 5e-324])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )  # fmt: skip


def states_of(model: GPT, last: list[int]) -> list[PredictionState]:
    """Return both kinds of state, with rows that end with these ids."""
    states = [model.new_state(len(last)), torch_state(model, len(last))]
    for state in states:
        state.observe(torch.tensor([[0, i] for i in last]))
    assert [type(state.engine) for state in states] == [NativeGPT, TorchEngine]
    return states


@needs_kernel
@settings(deadline=None)
@given(
    table=tables(),
    options=ways(),
    removed=st.sets(st.integers(0, 39), max_size=5),
    first=st.integers(0, 2**40),
    data=st.data(),
)
def test_the_kernel_chooses_what_the_readable_filters_leave_and_the_number_points_at(
    table: Tensor, options: SamplingOptions, removed: set[int], first: int, data: st.DataObject
) -> None:
    V = len(table)
    model = table_gpt(table)
    if len(removed & set(range(V))) < V:
        with torch.no_grad():
            assert model.lm_head.bias is not None
            model.lm_head.bias[[i for i in removed if i < V]] = -INF
    last = data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=8))
    state, _ = states_of(model, last)
    logits = state.predict()
    addresses = range(first, first + len(last))
    greedy = options.temperature == 0
    drawn = uniforms(options.seed or 0, addresses, positions=2)
    readable = sample(options.filter(logits, logits.new_empty(0)), None if greedy else drawn)
    chosen = next_ids(state, options, addresses)
    for row, uniform in enumerate(drawn.tolist()):
        wanted, margin = plain_choice(logits[row].tolist(), None if greedy else uniform, options)
        if margin > NEAR:
            assert chosen[row] == readable[row] == wanted
        assert math.isfinite(logits[row, chosen[row]])


MANY = 4_000


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
@needs_kernel
def test_thousands_of_numbers_point_at_the_same_ids_on_both_paths(options: dict[str, Any]) -> None:
    """A share that is wrong by a thousandth would be seen in about forty of them."""
    model = table_gpt(torch.randn(13, 13, generator=torch.Generator().manual_seed(2)))
    how = SamplingOptions(seed=8, **options)
    one, _ = states_of(model, [4])
    state = one.fork([0] * MANY)
    logits = state.predict()
    drawn = uniforms(8, range(MANY), positions=2)
    readable = sample(how.filter(logits, logits.new_empty(0)), drawn)
    chosen = next_ids(state, how, range(MANY))
    for row in (chosen != readable).nonzero()[:, 0].tolist():
        _, margin = plain_choice(logits[row].tolist(), float(drawn[row]), how)
        assert margin < NEAR
    assert len(set(chosen.tolist())) > 3


EXACT: list[tuple[list[float], dict[str, Any], set[int]]] = [
    # Probabilities that are sums of powers of two, so that no computation rounds.
    ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.5}, {0, 1}),
    ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.25}, {0}),
    ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.2500001}, {0, 1}),
    ([0.0, 0.0, 0.0, 0.0], {"top_k": 3}, {0, 1, 2}),
    ([0.0, 0.0, 0.0, 0.0], {"top_k": 2, "top_p": 0.5}, {0}),  # of the two that top-k left
    ([0.0, 0.0, 0.0, 0.0], {"top_k": 4, "top_p": 1.0, "min_p": 1.0}, {0, 1, 2, 3}),
    ([1.0, 3.0, 3.0, 2.0], {"min_p": 1.0}, {1, 2}),
    ([1.0, 3.0, 3.0, 2.0], {"top_k": 1}, {1}),
    ([1.0, 3.0, 3.0, 2.0], {"top_p": 5e-324}, {1}),
    ([1.0, 3.0, 3.0, 2.0], {"top_p": 1e-9}, {1}),
    ([1.0, 3.0, 3.0, 2.0], {"temperature": 1e-6}, {1, 2}),
    ([1.0, 3.0, 3.0, 2.0], {"temperature": 0}, {1}),
    ([1.0, 3.0, 3.0, 2.0], {"temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.5}, {1}),
    ([1.0, 3.0, -INF, -INF], {"temperature": 1e6}, {0, 1}),
    ([1.0, 3.0, -INF, -INF], {"top_k": 3, "top_p": 1.0}, {0, 1}),
    ([-INF, -INF, 5.0, -INF], {}, {2}),
    ([-INF, -INF, 5.0, -INF], {"min_p": 0.0, "top_k": 10**30}, {2}),
    ([1.0, 3.0, 3.0, 2.0], {"top_k": 2**64 + 1}, {0, 1, 2, 3}),
    ([-1e30, -1e30, -2e30, -INF], {}, {0, 1}),
    ([50.0, -50.0, -50.0, -50.0], {}, {0}),
    ([2e30, 1e30, 0.0, 0.0], {"temperature": 100}, {0}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "options", "possible"), EXACT, ids=[str(case) for case in EXACT])
@needs_kernel
def test_exactly_these_ids_can_be_chosen(
    row: list[float], options: dict[str, Any], possible: set[int]
) -> None:
    """Of 64 numbers, some fall on each: all possible ids come, and no other."""
    model = table_gpt(torch.zeros(4, 4))
    with torch.no_grad():
        assert model.lm_head.bias is not None
        model.lm_head.bias.copy_(torch.tensor(row))
    for state in states_of(model, [0] * 64):
        assert state.predict().tolist() == [torch.tensor(row).tolist()] * 64
        assert set(next_ids(state, SamplingOptions(seed=1, **options), range(64)).tolist()) == possible


@needs_kernel
def test_logits_that_a_temperature_makes_equal_are_a_tie_on_both_paths() -> None:
    temperature = np.float32(1.9)
    larger = np.float32(2) - np.arange(1, 40, dtype=np.float32) * np.float32(2**-23)
    smaller = larger - np.float32(2**-23)
    tied = int((larger / temperature == smaller / temperature).nonzero()[0][0])
    model = table_gpt(torch.zeros(3, 3))
    with torch.no_grad():
        assert model.lm_head.bias is not None
        model.lm_head.bias.copy_(torch.tensor([0.0, smaller[tied], larger[tied]]))
    wants: list[tuple[dict[str, Any], int]] = [({"temperature": 1.9}, 1), ({}, 2)]
    for way, wanted in wants:
        for state in states_of(model, [0]):
            assert next_ids(state, SamplingOptions(seed=0, top_k=1, **way), [0]).tolist() == [wanted]


@settings(deadline=None)
@given(
    row=st.lists(numbers | st.just(-INF), min_size=1, max_size=20).filter(lambda row: max(row) > -INF),
    options=ways(),
    uniform=st.floats(0, 1 - 2**-53),
)
def test_filters_and_sample_together_are_the_choice_in_plain_loops(
    row: list[float], options: SamplingOptions, uniform: float
) -> None:
    logits = torch.tensor([row], dtype=torch.float64)
    greedy = options.temperature == 0
    got = int(sample(options.filter(logits, logits.new_empty(0)), None if greedy else np.array([uniform])))
    wanted, margin = plain_choice(row, None if greedy else uniform, options)
    assert got == wanted or margin < NEAR


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}])
@pytest.mark.parametrize("damage", ["nan", "one nan", "inf", "-inf"])
@needs_kernel
def test_a_row_in_which_nothing_can_be_chosen_is_named_and_none_moves_on(
    damage: str, options: dict[str, Any]
) -> None:
    model = table_gpt(torch.eye(5))
    with torch.no_grad():
        assert model.lm_head.bias is not None
        if damage == "nan":
            model.transformer.wte.weight[3] = NAN  # what follows the id 3 is unknown
        elif damage == "one nan":
            model.lm_head.bias[4] = NAN
        else:
            model.lm_head.bias.fill_(float(damage))
    row = 2 if damage == "nan" else 0
    for state in states_of(model, [1, 2, 3, 3]):
        for _ in range(2):  # it says so again
            largest = damage.removeprefix("one ")
            message = rf"no token can be drawn in row {row}: its largest logit is {largest}\. "
            with pytest.raises(NonFiniteError, match=message):
                next_ids(state, SamplingOptions(seed=0, **options), range(4))
            assert state.lengths == [2] * 4
    if damage == "nan":  # the other rows can go on without it
        for state in states_of(model, [1, 2, 3, 3]):
            assert next_ids(state.fork([0, 1]), SamplingOptions(temperature=0), range(2)).tolist() == [1, 2]


@needs_kernel
def test_logits_that_a_temperature_makes_infinite_are_an_error_on_both_paths() -> None:
    model = table_gpt(torch.zeros(4, 4))
    with torch.no_grad():
        assert model.lm_head.bias is not None
        model.lm_head.bias.copy_(torch.tensor([1e36, 2e36, 0.0, 0.0]))
    for state in states_of(model, [0]):
        with pytest.raises(NonFiniteError, match="no token can be drawn in row 0"):
            next_ids(state, SamplingOptions(seed=0, temperature=1e-6), [0])
        assert next_ids(state, SamplingOptions(seed=0), [0]).tolist() == [1]
