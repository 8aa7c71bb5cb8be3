"""The loss of a model on a text, one window at a time, in float64 and plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["plain_evaluation"]


def plain_evaluation(model: nn.Module, ids: Sequence[int], block_size: int) -> tuple[float, float, int]:
    """Return the mean loss in nats, the share of right guesses and the number of targets."""
    losses, hits = [], 0
    for start in range(0, len(ids) - 1, block_size):
        context = ids[start : min(start + block_size, len(ids) - 1)]
        targets = ids[start + 1 : start + 1 + len(context)]
        x = torch.tensor([context])
        with torch.no_grad():
            logits: Tensor = model(x, torch.tensor([targets]))[0].reshape(len(context), -1).double()
        for row, target in zip(logits.tolist(), targets, strict=True):
            largest = max(row)
            total = math.fsum(math.exp(value - largest) for value in row)
            losses.append(math.log(total) + largest - row[target])
            hits += row.index(largest) == target
    return math.fsum(losses) / len(losses), hits / len(losses), len(losses)
