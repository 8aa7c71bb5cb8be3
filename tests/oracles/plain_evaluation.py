"""The loss of a model on a text, one window and one character at a time, in float64 and plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Place", "plain_evaluation", "plain_surprisal"]


@dataclass
class Place:
    """What a model held of one place in a text."""

    bits: float
    entropy: float
    rank: int
    context: int
    likeliest: list[int]
    probs: list[float]


def plain_evaluation(model: nn.Module, ids: Sequence[int], block_size: int) -> tuple[float, float, int]:
    """Return the mean loss in nats, the share of right guesses and the number of targets."""
    losses, hits = [], 0
    for row, target, _ in _predictions(model, ids, block_size):
        largest = max(row)
        total = math.fsum(math.exp(value - largest) for value in row)
        losses.append(math.log(total) + largest - row[target])
        hits += row.index(largest) == target
    return math.fsum(losses) / len(losses), hits / len(losses), len(losses)


def plain_surprisal(model: nn.Module, ids: Sequence[int], block_size: int) -> list[Place]:
    """Return what the model held of each id but the first."""
    places = []
    for row, target, context in _predictions(model, ids, block_size):
        largest = max(row)
        total = math.fsum(math.exp(value - largest) for value in row)
        probs = [math.exp(value - largest) / total for value in row]
        likeliest = sorted(range(len(row)), key=lambda i: (-row[i], i))
        places.append(
            Place(
                bits=-math.log2(probs[target]),
                entropy=-math.fsum(p * math.log2(p) for p in probs),
                rank=likeliest.index(target) + 1,
                context=context,
                likeliest=likeliest,
                probs=[probs[i] for i in likeliest],
            )
        )
    return places


def _predictions(
    model: nn.Module, ids: Sequence[int], block_size: int
) -> Iterator[tuple[list[float], int, int]]:
    """Yield logits, target and the number of ids that they were predicted from."""
    for start in range(0, len(ids) - 1, block_size):
        context = ids[start : min(start + block_size, len(ids) - 1)]
        targets = ids[start + 1 : start + 1 + len(context)]
        x = torch.tensor([context])
        with torch.no_grad():
            logits: Tensor = model(x, torch.tensor([targets]))[0].reshape(len(context), -1).double()
        for i, (row, target) in enumerate(zip(logits.tolist(), targets, strict=True)):
            yield row, target, i + 1
