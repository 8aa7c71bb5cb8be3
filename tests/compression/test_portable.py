"""The mathematics that is the same on every machine is right, and stays what it is."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm.compression.portable import (
    ARITHMETIC,
    MOST_FREQUENCY,
    exp,
    frequencies,
    gate_weights,
    log,
    rotary_tables,
)
from charlm.errors import NonFiniteError
from charlm.models.ops import rotary_tables as torch_s_tables


def test_exp_and_log_are_those_of_a_library_within_rounding() -> None:
    x = np.linspace(-690, 690, 100_001)
    np.testing.assert_allclose(exp(x), np.exp(x), rtol=1e-15)
    np.testing.assert_allclose(log(np.exp(x)), np.log(np.exp(x)), rtol=1e-15, atol=1e-15)
    assert exp(np.array([0.0, -701.0, -np.inf, np.nan])).tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("head_size", [2, 32, 34])
def test_angles_are_those_of_the_readable_path_within_rounding(head_size: int) -> None:
    wanted = torch_s_tables(0, 5_000, head_size, torch.device("cpu"))
    for own, table in zip(rotary_tables(5_000, head_size), wanted, strict=True):
        torch.testing.assert_close(own, table.float(), rtol=0, atol=1e-7)


def test_a_gate_s_weights_are_its_softmax() -> None:
    gate = torch.tensor([[0.0, 1.0, -2.0], [-30.0, 0.5, 0.25]])
    torch.testing.assert_close(gate_weights(gate.numpy()), gate.softmax(dim=-1))


@given(st.lists(st.floats(-80, 80, width=32) | st.just(-np.inf), min_size=1, max_size=40))
def test_frequencies_are_in_proportion_and_never_zero(values: list[float]) -> None:
    logits = np.array([values])
    if logits.max() == -np.inf:
        with pytest.raises(NonFiniteError, match="no finite numbers"):
            frequencies(logits)
        return
    found = frequencies(logits)[0]
    p = torch.from_numpy(logits).softmax(dim=-1).numpy()[0]
    assert found.min() >= 1
    assert MOST_FREQUENCY - len(values) <= found.sum() <= MOST_FREQUENCY + len(values)
    np.testing.assert_allclose(found, p * MOST_FREQUENCY, rtol=1e-7, atol=3)


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_what_is_no_number_is_refused(odd: float) -> None:
    with pytest.raises(NonFiniteError):
        frequencies(np.array([[0.0, odd, 1.0]]))


def test_these_bits_are_pinned_to_the_version_of_the_arithmetic() -> None:
    """If this fails, files of before would decode to something else: make `ARITHMETIC` one more."""
    digest = hashlib.sha256()
    steps = (np.arange(40_000, dtype=np.float64) - 20_000) / 64
    digest.update(exp(steps).tobytes())
    digest.update(log(np.abs(steps) + 2.0**-40).tobytes())
    for table in rotary_tables(700, 34):
        digest.update(table.numpy().tobytes())
    digest.update(gate_weights((steps[:300] / 64).reshape(-1, 3).astype(np.float32)).numpy().tobytes())
    digest.update(frequencies((steps * 37 % 29).reshape(-1, 50)).astype("<i8").tobytes())
    assert (ARITHMETIC, digest.hexdigest()[:16]) == (1, "98d24a01754760bd")
