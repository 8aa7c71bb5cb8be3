"""Generation written from its documented meaning: no cache, one row at a time, everything recomputed."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from charlm.randomness import uniforms

__all__ = ["lecture_slide", "pick", "plain_restart", "stopped_text"]

Model = Callable[[Tensor], Tensor]
"""Logits (T, V) of one row of ids (T,)."""


def pick(logits: Tensor, uniform: float | None) -> int:
    """Return the id where the uniform number falls in the cumulated probabilities, or the likeliest."""
    if uniform is None:
        return int(logits.argmax())
    probabilities = logits.double().softmax(dim=-1).tolist()
    cumulated = list(accumulate(probabilities))
    return bisect.bisect_right(cumulated, uniform * cumulated[-1])


def lecture_slide(
    model: nn.Module, idx: Tensor, max_new_tokens: int, block_size: int | None, seed: int | None
) -> Tensor:
    """The lecture's `generate`, with its draw by our uniform numbers; `seed` None is greedy."""
    for _ in range(max_new_tokens):
        idx_cond = idx if block_size is None else idx[:, -block_size:]
        logits, _ = model(idx_cond)
        logits = logits[:, -1, :]
        numbers = [None] * len(idx) if seed is None else uniforms(seed, range(len(idx)), idx.size(1)).tolist()
        idx_next = torch.tensor([[pick(row, u)] for row, u in zip(logits, numbers, strict=True)])
        idx = torch.cat((idx, idx_next), dim=1)
    return idx


def plain_restart(
    model: nn.Module, idx: Tensor, max_new_tokens: int, block_size: int, seed: int | None
) -> Tensor:
    """Keep the last half of the window whenever it is full, as if the text had been read from its start."""
    rows = []
    for number, row in enumerate(idx.tolist()):
        ids = list(row)
        for _ in range(max_new_tokens):
            window: list[int] = []
            for i in ids:
                if len(window) == block_size:
                    # No room: with this character it is to be half a window again.
                    kept = max(block_size // 2, 1) - 1
                    window = window[len(window) - kept :]
                window.append(i)
            logits = model(torch.tensor([window]))[0][0, -1]
            ids.append(pick(logits, None if seed is None else float(uniforms(seed, [number], len(ids))[0])))
        rows.append(ids)
    return torch.tensor(rows)


def stopped_text(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the stop string that is complete first (then: began first); is there one?"""
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return (text[: min(found)[1]], True) if found else (text, False)
