"""The loop of generation: look at the context, choose the next id, append it, repeat.

It is the lecture's `generate`. What the model has read, and what it predicts, is a `PredictionState`'s
business; nothing here knows models, characters or tokenizers. On it stand streams (`stream.py`), drafts
(`drafting.py`), and the stop strings of `charlm.lm`, where a row that has met one leaves the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from charlm.generation.engine import Engine
from charlm.generation.options import SamplingOptions
from charlm.generation.sampling import sample
from charlm.generation.state import PredictionState

__all__ = ["filter_and_draw", "next_ids", "one_turn", "some_turns", "stream_ids"]


def stream_ids(
    state: PredictionState,
    max_new_tokens: int,
    options: SamplingOptions,
    *,
    addresses: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Yield `max_new_tokens` times the next id of each row.

    Args:
        state: has observed the prompts, at least one id each. It moves on with the texts.
        max_new_tokens: how many steps.
        options: how to choose.
        addresses: (B,) address of each row's random numbers, by default 0 ... B-1.

    Yields:
        (B,) int64. Nothing stays open between steps: no gradient mode, no training flag, no generator.

    Raises:
        NonFiniteError: a row's logits hold NaN, or a filter removed every id.

    Example:
        >>> from charlm import BigramLM
        >>> state = BigramLM(65).new_state(rows=2)
        >>> state.observe(torch.tensor([[24], [43]]))
        >>> steps = list(stream_ids(state, 5, SamplingOptions(seed=1337)))
        >>> len(steps), steps[0].shape, state.lengths
        (5, torch.Size([2]), [6, 6])
    """
    options = options.seeded()
    for _ in range(max_new_tokens):
        yield next_ids(state, options, addresses)


def next_ids(
    state: PredictionState, options: SamplingOptions, addresses: Sequence[int] | None = None
) -> Tensor:
    """Choose the next id of each row and append it: one turn of the loop.

    Args:
        state: as for `stream_ids`.
        options: as for `stream_ids`.
        addresses: as for `stream_ids`.

    Returns:
        (B,) int64.

    Raises:
        NonFiniteError: a row's logits hold NaN, or a filter removed every id. The texts stay as they are.

    Example:
        >>> from charlm import BigramLM
        >>> state = BigramLM(65).new_state()
        >>> state.observe(torch.tensor([[24]]))
        >>> next_ids(state, SamplingOptions(seed=1337)).shape, state.lengths
        (torch.Size([1]), [2])
    """
    return some_turns(state, options, range(state.rows) if addresses is None else addresses, 1)


def some_turns(
    state: PredictionState, options: SamplingOptions, addresses: Sequence[int], most: int
) -> Tensor:
    """Do one turn or more, as many as the engine likes at once; return their ids, (t B,) int64."""
    ids = state.engine.turns(state, options, addresses, most)  # a compiled engine does all in one call
    return one_turn(state, options, addresses) if ids is None else ids


def one_turn(state: PredictionState, options: SamplingOptions, addresses: Sequence[int]) -> Tensor:
    """Predict, filter, draw, append: the body of the lecture's loop, in PyTorch."""
    texts = [state.text(row) for row in range(state.rows)] if options.filters_by_itself else None
    logits = state.predict()  # (B, V)
    uniforms = options.uniforms(addresses, state.lengths)  # (B,)
    ids = filter_and_draw(state.engine, logits, options, uniforms, texts)  # (B,): filter, draw
    state.observe(ids)  # append
    return ids


@torch.no_grad()
def filter_and_draw(
    engine: Engine,
    logits: Tensor,
    options: SamplingOptions,
    uniforms: NDArray[np.float64] | None,
    texts: Sequence[Tensor] | None,
) -> Tensor:
    """Filter, and draw: an id for each row of logits.

    Args:
        engine: which predicted.
        logits: (n, V).
        options: how to choose.
        uniforms: (n,) where in the summed probabilities each row's id lies; None: the likeliest.
        texts: (n,) what stands before each id, (t,); needed where the caller has filters.

    Returns:
        (n,) int64.

    Raises:
        NonFiniteError: a row's logits hold NaN, or a filter removed every id.
    """
    if texts is None:
        return engine.choose(logits, options, uniforms)
    filtered = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    for length in dict.fromkeys(map(len, texts)):  # filters are shown texts of one length
        rows = [row for row, text in enumerate(texts) if len(text) == length]
        filtered[rows] = options.filter(logits[rows], torch.stack([texts[row] for row in rows])).to(filtered)
    return sample(filtered, uniforms)
