"""Generation from a model and prompts: as a stream of ids, or as whole texts, with or without a draft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from charlm.errors import InputError
from charlm.generation.decode import begin_walk, some_turns, stream_ids, turns_to_the_ends
from charlm.generation.drafting import stream_drafted
from charlm.generation.options import Draft, SamplingOptions
from charlm.generation.state import PredictionState

__all__ = ["continue_ids", "continued"]


def continue_ids(
    model: Draft, contexts: Tensor | Sequence[Tensor], max_new_tokens: int, options: SamplingOptions
) -> Iterator[Tensor]:
    """Return an iterator over the next ids of each context, (B,) int64, as in `stream_ids`.

    Args:
        model: makes the state.
        contexts: (B, T0) int64, or B tensors (t,) of any lengths, at least 1.
        max_new_tokens: the number of steps.
        options: how to choose. A draft is used if there is one context.

    Raises:
        InputError: the draft has another vocabulary, or no text obeys the constraint.
    """
    state = _begun(model, contexts, max_new_tokens, options)
    return _steps(state, model, contexts, max_new_tokens, options)


def continued(
    model: Draft, contexts: Tensor | Sequence[Tensor], max_new_tokens: int, options: SamplingOptions
) -> list[Tensor]:
    """Return each context with its new ids, (t + max_new_tokens,) int64, or fewer with a constraint.

    Arguments and errors are those of `continue_ids`. A compiled engine chooses many ids in one call.
    """
    state, options = _begun(model, contexts, max_new_tokens, options), options.seeded()
    if state.walk is not None:
        texts = [state.text(row) for row in range(state.rows)]
        if options.draft is not None and state.rows == 1:
            turns = [ids[None] for ids in _steps(state, model, contexts, max_new_tokens, options)]
        else:
            turns = list(turns_to_the_ends(state, state.walk, options, at_once=max_new_tokens))
        new = torch.cat([texts[0].new_empty(0, len(texts)), *turns])  # (n, B), -1 after an end
        return [torch.cat([text, ids[ids >= 0]]) for text, ids in zip(texts, new.T, strict=True)]
    if options.draft is not None and state.rows == 1:
        for _ in _steps(state, model, contexts, max_new_tokens, options):
            pass
    else:
        while max_new_tokens > 0:
            ids = some_turns(state, options, range(state.rows), max_new_tokens)
            max_new_tokens -= len(ids) // state.rows
    return [state.text(row) for row in range(state.rows)]


def _begun(
    model: Draft, contexts: Tensor | Sequence[Tensor], max_new_tokens: int, options: SamplingOptions
) -> PredictionState:
    state: PredictionState = model.new_state(
        len(contexts), overflow=options.overflow, use_cache=options.use_cache
    )
    begin_walk(state, max_new_tokens, options)
    state.observe(contexts)
    return state


def _steps(
    state: PredictionState,
    model: Draft,
    contexts: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    options: SamplingOptions,
) -> Iterator[Tensor]:
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
