"""What a prediction state must say, written from its documented meaning: one row, one position at a time.

No cache, no batch, nothing kept: for every position the model reads the context that it may see, anew.
`plain_choice` is how an id is chosen from logits, in float64 and with Python's own loops; it also says how
near the choice was to another one, because two computations of a probability differ in their last bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from charlm.generation import Overflow, SamplingOptions
from charlm.models.base import LanguageModel
from charlm.modes import evaluation_mode
from charlm.randomness import uniforms

__all__ = ["plain_choice", "plain_log_probs", "plain_logits", "plain_text", "plain_window"]


def plain_window(position: int, block_size: int | None, overflow: Overflow) -> int:
    """Return how many of the ids before a position the model sees there, by counting from the start."""
    seen = 0
    for _ in range(position):
        if seen == block_size:  # one more has no room
            seen = block_size - 1 if overflow == "slide" else max(block_size // 2, 1) - 1
        seen += 1
    return seen


def plain_logits(model: LanguageModel, ids: Sequence[int], overflow: Overflow) -> Tensor:
    """Return the logits (V,) of the id that follows."""
    seen = plain_window(len(ids), model.block_size, overflow)
    with torch.no_grad(), evaluation_mode(model):
        logits, _ = model(torch.tensor([ids[len(ids) - seen :]]))
    return logits[0, -1]


def plain_log_probs(model: LanguageModel, ids: Sequence[int], overflow: Overflow) -> list[float]:
    """Return the natural logarithm of the probability of every id but the first."""
    scores = []
    for t in range(1, len(ids)):
        logits = plain_logits(model, ids[:t], overflow).double()  # (V,)
        top = float(logits.max())
        scores.append(float(logits[ids[t]]) - top - math.log(float((logits - top).exp().sum())))
    return scores


def plain_text(
    model: LanguageModel, ids: Sequence[int], count: int, options: SamplingOptions, address: int = 0
) -> list[int]:
    """Return the ids with `count` more; the seed None is greedy."""
    ids = list(ids)
    for _ in range(count):
        logits = plain_logits(model, ids, options.overflow)
        uniform = None
        if options.temperature:
            uniform = float(uniforms(options.seed or 0, [address], len(ids))[0])
        ids.append(plain_choice(logits.tolist(), uniform, options)[0])
    return ids


def plain_choice(
    logits: Sequence[float], uniform: float | None, options: SamplingOptions
) -> tuple[int, float]:
    """Choose an id: temperature, top-k, top-p, min-p, then where the uniform number falls.

    Returns:
        The id, and the distance to the nearest limit at which another one would have been chosen: between a
        cumulated probability and the uniform number or top_p, between a probability relative to the largest
        and min_p, or between the logits at the edge of top_k or top_p where they differ at all.
    """
    if uniform is None:
        return max(range(len(logits)), key=lambda i: (logits[i], -i)), math.inf
    scaled = [z / options.temperature for z in logits]
    top = max(scaled)
    weights = [math.exp(z - top) for z in scaled]  # of the likeliest: 1
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    margin = math.inf
    if options.top_k is not None and options.top_k < len(order):
        inside, outside = (scaled[order[at]] for at in (options.top_k - 1, options.top_k))
        if inside != outside:
            margin = min(margin, _apart(inside, outside))
        order = order[: options.top_k]
    if options.top_p is not None:
        total, before = math.fsum(weights[i] for i in order), 0.0
        kept: list[int] = []
        for i in order:
            if kept:
                margin = min(margin, abs(before / total - options.top_p))
                if before / total >= options.top_p:
                    if scaled[i] != scaled[kept[-1]]:
                        margin = min(margin, _apart(scaled[kept[-1]], scaled[i]))
                    break
            kept.append(i)
            before += weights[i]
        order = kept
    if options.min_p is not None:
        margin = min([margin, *(abs(weights[i] - options.min_p) for i in order[1:])])
        order = [i for at, i in enumerate(order) if at == 0 or weights[i] >= options.min_p]
    total, below = math.fsum(weights[i] for i in order), 0.0
    chosen = -1
    for i in sorted(i for i in order if weights[i] > 0):
        if chosen < 0 or below / total <= uniform:
            chosen = i
        margin = min(margin, abs(below / total - uniform)) if below else margin
        below += weights[i]
    return chosen, margin


def _apart(larger: float, smaller: float) -> float:
    return (larger - smaller) / max(1.0, abs(larger))
