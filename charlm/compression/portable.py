"""Functions in numpy with the same results on every machine.

IEEE 754 defines the rounding of +, -, * and / of array elements. It does not define that of a library's exp,
log, sine and cosine, nor the order of a sum. So these functions use only the four operations, and sums of
integers. `exp` and `log` are those of `charlm/native/portable.h`, operation by operation.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from charlm.errors import NonFiniteError

__all__ = [
    "ARITHMETIC",
    "MOST_FREQUENCY",
    "exp",
    "frequencies",
    "gate_weights",
    "log",
    "not_finite",
    "rotary_tables",
]

Floats = NDArray[np.float64]

ARITHMETIC = 1
"""Increased when a bit of a logit or frequency changes. Files of another version are refused."""
MOST_FREQUENCY = 2**30
"""The frequency of a certain character."""

_EXP = [1 / math.factorial(k) for k in range(13, -1, -1)]
_LOG = [1 / k for k in range(23, 0, -2)]
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(8, -1, -1)]
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(8, -1, -1)]
# pi / 2 in parts with exact multiples up to 2 ** 17.
_QUARTER = (1.570796326734125614166259765625, 6.07710050650619224932e-11)


def exp(x: Floats) -> Floats:
    """Return the exponential, within a few units of the last place; 0 below -700 and for NaN."""
    inside = x > -700
    x = np.where(inside, x, 0.0)
    n = np.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 0.693145751953125 - n * 1.4286068203094173e-06
    found: Floats = np.where(inside, np.ldexp(_polynomial(_EXP, r), n.astype(np.int32)), 0.0)
    return found


def log(x: Floats) -> Floats:
    """Return the natural logarithm of numbers above 0."""
    m, e = np.frexp(x)
    small = m < 0.7071067811865476
    m, e = np.where(small, m * 2, m), e - small
    s = (m - 1) / (m + 1)
    found: Floats = 2 * s * _polynomial(_LOG, s * s) + e * 0.6931471805599453
    return found


def _polynomial(parts: list[float], x: Floats) -> Floats:
    y = np.full_like(x, parts[0])
    for part in parts[1:]:
        y = y * x + part
    return y


def frequencies(logits: Floats) -> NDArray[np.int64]:
    """Return integer frequencies (n, V), 1 or more, in proportion to the probabilities of logits.

    Both directions use them between model and coder. Their sum is about `MOST_FREQUENCY`, at most V more.

    Args:
        logits: (n, V).

    Raises:
        NonFiniteError: the logits of a row give no probabilities.
    """
    top = logits.max(axis=1, keepdims=True)
    if not np.isfinite(top).all():
        raise not_finite()
    shares = (exp(logits - top) * 2**32).astype(np.int64)
    found: NDArray[np.int64] = 1 + shares * MOST_FREQUENCY // shares.sum(axis=1, keepdims=True)
    return found


def not_finite() -> NonFiniteError:
    """Return the error for a model that predicts no probabilities."""
    return NonFiniteError("the model's logits are no finite numbers, so it cannot compress")


def gate_weights(gate: NDArray[np.float32]) -> Tensor:
    """Return a mixture's weights (J, K + 1), the softmax of its gate, in float32."""
    wide = gate.astype(np.float64)
    parts = exp(wide - wide.max(axis=1, keepdims=True))
    total = parts[:, :1].copy()
    for k in range(1, parts.shape[1]):
        total += parts[:, k : k + 1]
    return torch.from_numpy((parts / total).astype(np.float32))


def rotary_tables(positions: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles of a `GPT` at all positions, (positions, D / 2) float32 each."""
    speeds = exp(np.arange(0, head_size, 2, dtype=np.float64) * (-9.210340371976184 / head_size))
    angles = np.arange(positions, dtype=np.float64)[:, None] * speeds
    n = np.floor(angles * 0.6366197723675814 + 0.5)
    r = angles - n * _QUARTER[0] - n * _QUARTER[1]
    z = r * r
    sine, cosine = r * _polynomial(_SIN, z), _polynomial(_COS, z)
    odd, two, three = n % 2 == 1, n % 4 >= 2, (n + 1) % 4 >= 2
    sines, cosines = np.where(odd, cosine, sine), np.where(odd, sine, cosine)
    tables = np.where(three, -cosines, cosines), np.where(two, -sines, sines)
    return tuple(torch.from_numpy(table.astype(np.float32)) for table in tables)  # type: ignore[return-value]
