"""The readable path of generation: look at the context, choose a character, append it, repeat.

It is the lecture's `generate` with a cache. It knows a model only as something that maps ids to logits
(`Predictor`), and nothing of characters or tokenizers. Two rules hold for every model: the cache never
changes a result, and which characters the model sees is a function of the absolute position alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from charlm.generation.cache import KVCache
from charlm.generation.options import Overflow, SamplingOptions
from charlm.generation.sampling import sample
from charlm.randomness import uniforms

__all__ = ["Predictor", "context_start", "evaluation_mode", "stream_ids"]


class Predictor(Protocol):
    """What generation asks of a model. Every `charlm.LanguageModel` is one."""

    @property
    def block_size(self) -> int | None:
        """The most characters that it can see at once; None: no limit."""

    def new_cache(self) -> KVCache | None:
        """Return an empty cache for one generation, or None if the model keeps none."""

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the model and its parts, as `nn.Module.modules` does."""

    def __call__(
        self, idx: Tensor, targets: None = None, *, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits (B, t, V) after each of the ids (B, t), which follow those in the cache."""


def context_start(position: int, block_size: int | None, overflow: Overflow) -> int:
    """Return where the context begins from which the character at `position` is predicted.

    Up to `block_size` characters the model sees all of them. Past that, "slide" shows it exactly the
    last `block_size`, as the lecture does: every step then costs a whole window, since all positions
    shift. "restart" goes on from the last half of the window whenever the window is full, and lets it
    fill again: all but one step in half a window then cost one character.

    Args:
        position: absolute position of the character to be predicted, from 0; what came before counts.
        block_size: the model's window; None: no limit.
        overflow: "slide" or "restart".

    Example:
        >>> [position - context_start(position, 4, "slide") for position in range(1, 10)]
        [1, 2, 3, 4, 4, 4, 4, 4, 4]
        >>> [position - context_start(position, 4, "restart") for position in range(1, 10)]
        [1, 2, 3, 4, 2, 3, 4, 2, 3]
    """
    if block_size is None or position <= block_size:
        return 0
    if overflow == "slide":
        return position - block_size
    dropped = block_size + 1 - max(block_size // 2, 1)  # characters that each restart leaves behind
    return (
        -((block_size - position) // dropped) * dropped
    )  # ceil((position - block_size) / dropped) * dropped


def stream_ids(
    model: Predictor,
    idx: Tensor,
    max_new_tokens: int,
    options: SamplingOptions,
    *,
    rows: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Yield `max_new_tokens` times the next id of each row.

    Args:
        model: gives logits. It is put into evaluation mode for each step, and back after it.
        idx: (B, T0) int64, T0 at least 1, on the model's device. Not checked here.
        max_new_tokens: how many steps.
        options: how to choose; `options.seed` must be an int unless the temperature is 0.
        rows: (B,) address of each row's random numbers, by default 0 ... B-1.

    Yields:
        (B,) int64. Nothing stays open between steps: no gradient mode, no training flag, no generator.

    Raises:
        NonFiniteError: a row's logits hold NaN, or a filter removed every character.
    """
    B, T0 = idx.shape
    addresses = range(B) if rows is None else rows
    ids = torch.empty(B, T0 + min(max_new_tokens, 1024), dtype=torch.int64, device=idx.device)
    ids[:, :T0] = idx
    cache: KVCache | None = None
    cached_from = -1  # where the cache's context begins
    for position in range(T0, T0 + max_new_tokens):
        start = context_start(position, model.block_size, options.overflow)
        with torch.no_grad(), evaluation_mode(model):
            if cache is not None and cached_from == start:
                logits = _decode_one(model, ids[:, position - 1 : position], cache)
            else:
                # A cache pays only if the next step sees the same context and one character more.
                lasting = context_start(position + 1, model.block_size, options.overflow) == start
                cache = model.new_cache() if options.use_cache and lasting else None
                cached_from = start
                logits = _prefill(model, ids[:, start:position], cache)
            logits = options.filter(logits, ids[:, :position])
            greedy = options.temperature == 0
            chosen = sample(logits, None if greedy else uniforms(options.seed or 0, addresses, position))
        if position == ids.size(1):
            ids = torch.cat([ids, torch.empty_like(ids)], dim=1)  # doubling keeps the copying small
        ids[:, position] = chosen
        yield chosen


def _prefill(model: Predictor, context: Tensor, cache: KVCache | None) -> Tensor:
    """Read a whole context (B, t), into the cache if there is one, and return the last logits (B, V)."""
    logits, _ = model(context, cache=cache)  # (B, t, V)
    return logits[:, -1]


def _decode_one(model: Predictor, newest: Tensor, cache: KVCache) -> Tensor:
    """Read one more character (B, 1) and return the logits after it (B, V)."""
    logits, _ = model(newest, cache=cache)  # (B, 1, V)
    return logits[:, -1]


_evaluating: WeakKeyDictionary[object, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_evaluating_lock = Lock()


@contextmanager
def evaluation_mode(model: Predictor | nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block; each submodule then gets back the flag that it had.

    The flags belong to the model, so of several threads that use it at once the last one out restores them.
    """
    with _evaluating_lock:
        users, training = _evaluating.get(model, (0, []))
        if users == 0:
            training = [module for module in model.modules() if module.training]
            for module in training:
                module.training = False
        _evaluating[model] = users + 1, training
    try:
        yield
    finally:
        with _evaluating_lock:
            users, training = _evaluating.pop(model)
            if users > 1:
                _evaluating[model] = users - 1, training
            else:
                for module in training:
                    module.training = True
