"""Filters: pure functions on logits (B, V) that make tokens likelier, less likely or impossible.

Each returns new logits in which a removed token has -inf. `SamplingOptions` fixes their order: repetition
penalty, banned ids, temperature, top-k, top-p, min-p, then the caller's own. `SamplingOptions` also checks
the range of their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from charlm.errors import InputError

__all__ = [
    "Filter",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalise_repetition",
    "remove_ids",
    "scale_temperature",
]

_REMEMBERED = 64  # of the last ids: a longer text has nearly every character of its language

Filter = Callable[[Tensor, Tensor], Tensor]
"""A caller's filter: (logits (B, V), ids so far (B, t)) -> logits (B, V). The ids are whole texts with their
prompts. Prompts of different lengths come in several calls."""


def penalise_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Make the tokens among the last 64 less likely: positive logits are divided, others multiplied.

    Args:
        logits: (B, V).
        ids: (B, t), all ids so far.
        penalty: above 1 repeats become less likely, below 1 more; 1 changes nothing.

    Returns:
        (B, V).

    Source:
        CTRL, Keskar et al. 2019, arXiv:1909.05858; the window is llama.cpp's.

    Example:
        >>> penalise_repetition(torch.tensor([[2.0, -1.0, 3.0]]), torch.tensor([[0, 1]]), 2.0)
        tensor([[ 1., -2.,  3.]])
    """
    if penalty == 1:
        return logits
    recent = ids[:, -_REMEMBERED:]  # (B, t')
    seen = logits.gather(-1, recent)  # (B, t')
    return logits.scatter(-1, recent, torch.where(seen > 0, seen / penalty, seen * penalty))


def remove_ids(logits: Tensor, ids: Collection[int]) -> Tensor:
    """Remove some ids.

    Args:
        logits: (B, V).
        ids: each below V.

    Returns:
        (B, V), -inf for removed tokens.

    Raises:
        InputError: an id is V or more.

    Example:
        >>> remove_ids(torch.tensor([[1.0, 3.0, 2.0]]), [1])
        tensor([[1., -inf, 2.]])
    """
    if not ids:
        return logits
    if max(ids) >= logits.size(-1):
        raise InputError(f"banned ids must be below the vocabulary's size {logits.size(-1)}, got {max(ids)}")
    return logits.index_fill(-1, torch.tensor([*ids], device=logits.device), -torch.inf)


def scale_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature: below 1, likely tokens gain; above 1, unlikely ones.

    A temperature of 0 means greedy choice, which `sample` makes; the logits do not change.

    Args:
        logits: (B, V).
        temperature: 0 or more.

    Returns:
        (B, V).

    Example:
        >>> scale_temperature(torch.tensor([[1.0, 2.0]]), 0.5)
        tensor([[2., 4.]])
    """
    return logits if temperature == 0 else logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly the k largest logits of each row; of equals, those with the smaller id.

    Args:
        logits: (B, V).
        k: at least 1; V or more keeps all.

    Returns:
        (B, V), -inf for removed tokens.

    Example:
        >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 2)
        tensor([[-inf, 3., -inf, 3.]])
    """
    if k >= logits.size(-1):
        return logits
    order = logits.argsort(dim=-1, descending=True, stable=True)  # (B, V)
    return logits.scatter(-1, order[:, k:], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least p.

    Args:
        logits: (B, V).
        p: in (0, 1]; 1 keeps all.

    Returns:
        (B, V), -inf for removed tokens.

    Source:
        Nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751.

    Example:
        >>> keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.7).exp()
        tensor([[0.5000, 0.3000, 0.0000]])
    """
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # (B, V)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # (B, V) probability of all likelier tokens
    removed = before >= p
    removed[:, 0] = False  # keeps one token in spite of rounding
    return logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens whose probability is at least p times the largest one.

    Args:
        logits: (B, V).
        p: in [0, 1]; 0 keeps all.

    Returns:
        (B, V), -inf for removed tokens.

    Source:
        Nguyen et al. 2024, arXiv:2407.01082.

    Example:
        >>> keep_min_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.5).exp()
        tensor([[0.5000, 0.3000, 0.0000]])
    """
    if p <= 0:
        return logits
    probs = logits.softmax(dim=-1)  # (B, V)
    return logits.masked_fill(probs < p * probs.amax(dim=-1, keepdim=True), -torch.inf)
