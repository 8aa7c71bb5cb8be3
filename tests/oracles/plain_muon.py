"""Muon on one matrix in float64, from its description: no batches, no shared code.

m <- mu m + (1 - mu) g
u <- (1 - mu) g + mu m                       (Nesterov)
x <- u / (|u| + 1e-7), five times x <- a x + b (x x') x + c (x x')^2 x
w <- w - lr decay w - lr 0.2 sqrt(max(rows, columns)) x
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["PlainMuon", "newton_schulz"]

Matrix = NDArray[np.float64]


def newton_schulz(matrix: Matrix, steps: int = 5) -> Matrix:
    """Return a matrix with the same singular vectors and singular values near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Matrix = matrix / (np.sqrt((matrix**2).sum()) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


class PlainMuon:
    """The state of one matrix."""

    def __init__(self, weight: Matrix, lr: float, momentum: float, weight_decay: float) -> None:
        self.weight = weight.copy()
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.average = np.zeros_like(weight)

    def step(self, gradient: Matrix) -> None:
        """Move the weight."""
        self.average = self.momentum * self.average + (1 - self.momentum) * gradient
        ahead = (1 - self.momentum) * gradient + self.momentum * self.average
        scale = 0.2 * max(self.weight.shape) ** 0.5
        decayed = self.weight - self.lr * self.weight_decay * self.weight
        self.weight = decayed - self.lr * scale * newton_schulz(ahead)
