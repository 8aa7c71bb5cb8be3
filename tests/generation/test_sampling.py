"""`sample`: exact points of the inversion, and the distribution as a whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_generation import pick

from charlm.errors import NonFiniteError
from charlm.generation import sample
from charlm.randomness import uniforms

JUST_BELOW_ONE = 1 - 2.0**-53


def drawn(probs: list[float], uniform: float, dtype: torch.dtype = torch.float64) -> int:
    return int(sample(torch.tensor([probs], dtype=dtype).log(), np.array([uniform])))


@pytest.mark.parametrize(
    ("uniform", "id_"), [(0.0, 0), (0.2499, 0), (0.2501, 1), (0.7499, 1), (0.7501, 2), (JUST_BELOW_ONE, 2)]
)
def test_a_uniform_number_falls_into_its_characters_share(uniform: float, id_: int) -> None:
    assert drawn([0.25, 0.5, 0.25], uniform) == id_


@pytest.mark.parametrize("uniform", [0.0, 0.5, JUST_BELOW_ONE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_removed_character_is_never_drawn(uniform: float, dtype: torch.dtype) -> None:
    assert drawn([0.0, 0.0, 0.3, 0.0, 0.7, 0.0, 0.0], uniform, dtype) in (2, 4)
    assert drawn([0.0, 1.0, 0.0], uniform, dtype) == 1


def test_a_number_that_rounds_to_one_draws_the_last_possible_character() -> None:
    """The product with a total a little above 1 may round up to that total."""
    assert drawn([0.25, 0.75, 0.0, 0.0], 1.0) == 1


@settings(deadline=None)
@given(
    st.lists(st.floats(-30, 30) | st.just(-math.inf), min_size=1, max_size=20).filter(
        lambda row: max(row) > -math.inf
    ),
    st.floats(0, JUST_BELOW_ONE),
)
def test_it_agrees_with_plain_inversion_and_never_draws_what_is_impossible(
    row: list[float], uniform: float
) -> None:
    logits = torch.tensor([row], dtype=torch.float64)
    id_ = int(sample(logits, np.array([uniform])))
    assert math.isfinite(row[id_])
    near = {pick(logits[0], min(max(uniform + d, 0), JUST_BELOW_ONE)) for d in (-1e-12, 0.0, 1e-12)}
    assert id_ in near


def test_each_row_uses_its_own_number() -> None:
    logits = torch.zeros(4, 4)
    assert sample(logits, np.array([0.9, 0.1, 0.6, 0.3])).tolist() == [3, 0, 2, 1]
    assert sample(logits, np.array([0.9, 0.1, 0.6, 0.3])).dtype == torch.int64


@pytest.mark.parametrize("seed", range(3))
def test_frequencies_are_those_of_the_softmax(seed: int) -> None:
    """Pearson's chi-square over 20,000 draws from 12 characters.

    With 11 degrees of freedom a correct sampler exceeds 42.6 with a chance of 1.2e-5 for each seed. The
    seeds are fixed, so the outcome is too: this can fail only after a change of the code.
    """
    logits = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    n = 20_000
    ids = sample(logits.expand(n, 12), uniforms(seed, range(n), positions=0))
    observed = torch.bincount(ids, minlength=12).double()
    expected = n * logits.double().softmax(dim=-1)
    assert float(expected.min()) > 5
    assert float(((observed - expected) ** 2 / expected).sum()) < 42.6


def test_the_chi_square_bound_notices_a_slightly_wrong_temperature() -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    n = 20_000
    observed = torch.bincount(
        sample(1.1 * logits.expand(n, 12), uniforms(0, range(n), 0)), minlength=12
    ).double()
    expected = n * logits.double().softmax(dim=-1)
    assert float(((observed - expected) ** 2 / expected).sum()) > 42.6


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ([0.0, math.nan, 1.0], "nan"),
        ([-math.inf, -math.inf, -math.inf], "-inf"),
        ([0.0, math.inf, 1.0], "inf"),
        ([math.nan, math.inf, -math.inf], "nan"),
    ],
)
def test_a_row_without_a_finite_best_is_an_error_that_names_it(
    row: list[float], shown: str, greedy: bool
) -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, -math.inf, 0.0], row])
    with pytest.raises(NonFiniteError, match=f"in row 2: its largest logit is {shown}\\. ") as caught:
        sample(logits, None if greedy else np.array([0.1, 0.2, 0.3]))
    assert caught.value.step is None


def test_large_logits_do_not_overflow() -> None:
    assert drawn_from([1e4, 0.0, -1e4]) == 0
    assert drawn_from([-1e30, -2e30]) == 0


def drawn_from(row: list[float]) -> int:
    return int(sample(torch.tensor([row]), np.array([0.7])))
