"""The loop of generation: look at the context, choose the next id, append it, repeat.

It is the lecture's `generate`. What the model has read, and what it predicts, is a `PredictionState`'s
business; nothing here knows models, characters or tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from charlm.generation.options import SamplingOptions
from charlm.generation.state import PredictionState

__all__ = ["stream_ids"]


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
        options: how to choose; `options.seed` must be an int unless the temperature is 0.
        addresses: (B,) address of each row's random numbers, by default 0 ... B-1.

    Yields:
        (B,) int64. Nothing stays open between steps: no gradient mode, no training flag, no generator.

    Raises:
        NonFiniteError: a row's logits hold NaN, or a filter removed every id.
    """
    rows = range(state.rows) if addresses is None else addresses
    for _ in range(max_new_tokens):
        yield state.advance(options, rows)
