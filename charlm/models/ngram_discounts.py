"""Fits the discounts of an n-gram model to a text that was not counted, by Newton's method in numpy.

A probability is linear in the discounts of one length if the others are fixed. So the outer product of its
slope is the exact second derivative of its negative logarithm within a length, and an approximation across
lengths. This module knows no tables and no texts, only counts at some positions.
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
_PRIOR = 16.0  # strength of the prior that holds a discount near its initial value, in observations


@dataclass(frozen=True)
class Evidence:
    """The counts behind the contexts of one length at H positions."""

    count: NDArray[Any]
    """(H,) count of the id that follows; 0 if it never followed."""
    total: NDArray[Any]
    """(H,) sum of the counts of all ids; 0 if the context never occurred."""
    kinds: NDArray[Any]
    """(H, 3) number of ids with a count of 1, of 2, of more; with `shares`, the sums of these counts."""
    shares: bool = False
    """Whether a discount is a share of a count instead of a number."""


def fit_discounts(evidence: Sequence[Evidence], vocab_size: int) -> Floats:
    """Return the discounts (K, 3), numbers or shares, that make the positions likeliest.

    A discount without evidence stays at half its count, or at a share of 0.9.

    Args:
        evidence: one for each kind of context, in the order of mixing.
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
            new = _objective(candidate, prior, evidence, vocab_size)
            if new[0] < value:
                break
        else:
            break
        gained = value - new[0]
        x, (value, slope, curvature) = candidate, new
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
        occurs = seen.total > 0
        weight = occurs / np.maximum(seen.total, 1)  # (H,)
        taken = np.minimum(seen.count, 3)[:, None] == [1, 2, 3]  # (H, 3), taken by a discount of 1
        if seen.shares:
            taken = taken * seen.count[:, None]
        shared = np.where(occurs, weight * (seen.kinds @ discounts), 1.0)  # (H,)
        slopes[:, k] = weight[:, None] * (seen.kinds * p[:, None] - taken) * limits
        p = shared * p + weight * (seen.count - taken @ discounts)
        passed.append(shared)
    after = np.ones(H)  # the part of a change that remains after mixing in all later lengths
    for k in reversed(range(len(evidence))):
        slopes[:, k] *= (after / p)[:, None]
        after *= passed[k]
    relative = slopes.reshape(H, -1)
    away = (x - prior).ravel()
    value = float(_PRIOR / 2 * (away @ away) - np.log(p).sum())
    curvature = relative.T @ relative + _PRIOR * np.eye(len(away))
    return value, _PRIOR * away - relative.sum(axis=0), curvature
