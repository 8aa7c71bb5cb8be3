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
_PRIOR = 16.0  # as many observations weigh against leaving where a discount begins


@dataclass(frozen=True)
class Evidence:
    """What the contexts of one length say about H positions."""

    count: NDArray[Any]
    """(H,) of the id that follows; 0 if it never did."""
    total: NDArray[Any]
    """(H,) of all ids that follow; 0 if the context never occurred."""
    kinds: NDArray[Any]
    """(H, 3) how many ids follow with a count of 1, of 2, of more; for shares: the sums of these counts."""
    shares: bool = False
    """Whether shares of the counts are taken from them, instead of numbers."""


def fit_discounts(evidence: Sequence[Evidence], vocab_size: int) -> Floats:
    """Return the discounts (K, 3), or shares, with which the positions are likeliest.

    What there is no evidence for stays at half its count, or at a share of 0.9.

    Args:
        evidence: one for each kind of context, in the order in which they are mixed in.
        vocab_size: V.
    """
    x = np.array([[0.9 if seen.shares else 0.5] * 3 for seen in evidence])  # as shares of the counts 1, 2, 3
    prior = x
    value, slope, curvature = _objective(x, prior, evidence, vocab_size)
    for _ in range(30):
        flat = x.ravel()
        free = ~(((flat <= _LOW) & (slope > 0)) | ((flat >= _HIGH) & (slope < 0)))
        step = np.zeros_like(flat)
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)], slope[free])
        for halvings in range(8):
            candidate = np.clip(x - step.reshape(x.shape) / 2**halvings, _LOW, _HIGH)
            found = _objective(candidate, prior, evidence, vocab_size)
            if found[0] < value:
                break
        else:
            break
        gained = value - found[0]
        x, (value, slope, curvature) = candidate, found
        if gained < 1e-6 * value:
            break
    return x * [_limits(seen) for seen in evidence]


def _limits(seen: Evidence) -> list[float]:
    return [1.0, 1.0, 1.0] if seen.shares else [1.0, 2.0, 3.0]


def _objective(
    x: Floats, prior: Floats, evidence: Sequence[Evidence], vocab_size: int
) -> tuple[float, Floats, Floats]:
    """Return the negative log likelihood with its prior, its slope (3 K,) and second derivative."""
    H = len(evidence[0].count)
    p = np.full(H, 1 / vocab_size)
    slopes = np.zeros((H, len(evidence), 3))  # of p
    passed = []
    for k, seen in enumerate(evidence):
        limits = _limits(seen)
        discounts = x[k] * limits  # (3,)
        known = seen.total > 0
        weight = known / np.maximum(seen.total, 1)  # (H,)
        taken = np.minimum(seen.count, 3)[:, None] == [1, 2, 3]  # (H, 3), from the count, by discounts of one
        if seen.shares:
            taken = taken * seen.count[:, None]
        shared = np.where(known, weight * (seen.kinds @ discounts), 1.0)  # (H,)
        slopes[:, k] = weight[:, None] * (seen.kinds * p[:, None] - taken) * limits
        p = shared * p + weight * (seen.count - taken @ discounts)
        passed.append(shared)
    after = np.ones(H)  # what is left of a change, when all that comes later has been mixed in
    for k in reversed(range(len(evidence))):
        slopes[:, k] *= (after / p)[:, None]
        after *= passed[k]
    relative = slopes.reshape(H, -1)
    away = (x - prior).ravel()
    value = float(_PRIOR / 2 * (away @ away) - np.log(p).sum())
    curvature = relative.T @ relative + _PRIOR * np.eye(len(away))
    return value, _PRIOR * away - relative.sum(axis=0), curvature
