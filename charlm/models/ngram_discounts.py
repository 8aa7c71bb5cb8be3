"""Fitting the discounts of an n-gram model to a text that was not counted: Newton's method in numpy.

With one length's discounts free and the others fixed, a probability is linear in them; so the outer product
of its slope is the exact second derivative of its negative logarithm there, and across lengths a stand-in.
Knows nothing of tables or texts, only what the contexts of some positions say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Evidence", "fit_discounts"]

Floats = NDArray[np.float64]

_LOW, _HIGH = 0.01, 0.99  # bounds of a discount, as a share of its count
_PRIOR = 4.0  # as many observations weigh against leaving one half


@dataclass(frozen=True)
class Evidence:
    """What the contexts of one length say about H positions."""

    count: NDArray[Any]
    """(H,) of the id that follows; 0 if it never did."""
    total: NDArray[Any]
    """(H,) of all ids that follow; 0 if the context never occurred."""
    kinds: NDArray[Any]
    """(H, 3) how many ids follow with a count of 1, of 2, of more."""


def fit_discounts(evidence: Sequence[Evidence], vocab_size: int) -> Floats:
    """Return the discounts (order, 3) with which the positions are likeliest.

    What there is no evidence for stays at half its count.

    Args:
        evidence: one for each length of context, from 0 to order - 1.
        vocab_size: V.
    """
    x = np.full((len(evidence), 3), 0.5)  # shares of the counts 1, 2, 3
    value, slope, curvature = _objective(x, evidence, vocab_size)
    for _ in range(30):
        flat = x.ravel()
        free = ~(((flat <= _LOW) & (slope > 0)) | ((flat >= _HIGH) & (slope < 0)))
        step = np.zeros_like(flat)
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)], slope[free])
        for halvings in range(8):
            candidate = np.clip(x - step.reshape(x.shape) / 2**halvings, _LOW, _HIGH)
            found = _objective(candidate, evidence, vocab_size)
            if found[0] < value:
                break
        else:
            break
        gained = value - found[0]
        x, (value, slope, curvature) = candidate, found
        if gained < 1e-6 * value:
            break
    return x * [1.0, 2.0, 3.0]


def _objective(x: Floats, evidence: Sequence[Evidence], vocab_size: int) -> tuple[float, Floats, Floats]:
    """Return the negative log likelihood with its prior, its slope (3 order,) and second derivative."""
    discounts = x * [1.0, 2.0, 3.0]  # (order, 3)
    H = len(evidence[0].count)
    p = np.full(H, 1 / vocab_size)
    slopes = np.zeros((H, len(evidence), 3))  # of p
    for length, seen in enumerate(evidence):
        known = seen.total > 0
        weight = known / np.maximum(seen.total, 1)  # (H,)
        is_kind = np.minimum(seen.count, 3)[:, None] == [1, 2, 3]  # (H, 3)
        shared = np.where(known, weight * (seen.kinds @ discounts[length]), 1.0)  # (H,)
        slopes *= shared[:, None, None]
        slopes[:, length] = weight[:, None] * (seen.kinds * p[:, None] - is_kind) * [1.0, 2.0, 3.0]
        p = shared * p + weight * (seen.count - is_kind @ discounts[length])
    relative = slopes.reshape(H, -1) / p[:, None]  # (H, 3 order)
    away = x.ravel() - 0.5
    value = float(_PRIOR / 2 * (away @ away) - np.log(p).sum())
    curvature = relative.T @ relative + _PRIOR * np.eye(len(away))
    return value, _PRIOR * away - relative.sum(axis=0), curvature
