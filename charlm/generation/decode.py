"""The loop of generation: look at the context, choose the next id, append it, repeat.

It is the lecture's `generate`. What the model has read, and what it predicts, is a `PredictionState`'s
business; nothing here knows models, characters or tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from charlm.errors import InputError
from charlm.generation.drafting import stream_drafted
from charlm.generation.options import Draft, SamplingOptions
from charlm.generation.state import PredictionState

__all__ = ["start", "stream_ids"]


def start(
    model: Draft, contexts: Tensor | Sequence[Tensor], max_new_tokens: int, options: SamplingOptions
) -> Iterator[Tensor]:
    """Yield `max_new_tokens` times the next id of each context, with or without a draft.

    Args:
        model: gives the states.
        contexts: (B, T0) int64, or B tensors (t,) of any lengths, at least 1.
        max_new_tokens: how many steps.
        options: how to choose; `options.seed` must be an int unless the temperature is 0.

    Yields:
        (B,) int64.

    Raises:
        InputError: the draft has another vocabulary.
    """
    state: PredictionState = model.new_state(
        len(contexts), overflow=options.overflow, use_cache=options.use_cache
    )
    state.observe(contexts)
    draft = options.draft
    if draft is None or len(contexts) > 1:
        return stream_ids(state, max_new_tokens, options)
    if draft.vocab_size != model.vocab_size:
        raise InputError(
            f"draft must have the model's vocabulary of {model.vocab_size} ids, got {draft.vocab_size}"
        )
    ahead: PredictionState = draft.new_state(overflow=options.overflow)
    ahead.observe([contexts[0].to(ahead.device)])
    return stream_drafted(state, ahead, max_new_tokens, options)


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

    Example:
        >>> import torch
        >>> from charlm import BigramLM
        >>> state = BigramLM(65).new_state(rows=2)
        >>> state.observe(torch.tensor([[24], [43]]))
        >>> steps = list(stream_ids(state, 5, SamplingOptions(seed=1337)))
        >>> len(steps), steps[0].shape, state.lengths
        (5, torch.Size([2]), [6, 6])
    """
    for _ in range(max_new_tokens):
        yield state.advance(options, addresses)
