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

from charlm.errors import InputError
from charlm.generation.constraints import Walk
from charlm.generation.engine import Engine
from charlm.generation.options import SamplingOptions
from charlm.generation.sampling import sample
from charlm.generation.state import PredictionState

__all__ = ["begin_walk", "filter_and_draw", "next_ids", "some_turns", "stream_ids", "turns_to_the_ends"]


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
        (B,) int64. Nothing stays open between steps: no gradient mode, no training flag, no generator. With a
        constraint there are fewer steps if all texts end before; ids of a text that has ended are -1; and the
        state is used up, as the rows that have ended leave it.

    Raises:
        NonFiniteError: a row's logits hold NaN, or a filter removed every id.
        InputError: the constraint allows no text.

    Example:
        >>> from charlm import BigramLM
        >>> state = BigramLM(65).new_state(rows=2)
        >>> state.observe(torch.tensor([[24], [43]]))
        >>> steps = list(stream_ids(state, 5, SamplingOptions(seed=1337)))
        >>> len(steps), steps[0].shape, state.lengths
        (5, torch.Size([2]), [6, 6])
    """
    options = options.seeded()
    begin_walk(state, max_new_tokens, options)
    if state.walk is not None:
        for turns in turns_to_the_ends(state, state.walk, options, addresses, at_once=1):
            yield turns[0]
        return
    for _ in range(max_new_tokens):
        yield next_ids(state, options, addresses)


def begin_walk(state: PredictionState, max_new_tokens: int, options: SamplingOptions) -> None:
    """Let a constraint begin here, if there is one; refuse what is impossible."""
    state.walk = None
    if options.constraint is not None:
        state.walk = Walk(options.constraint, state.rows, max_new_tokens, state.vocab_size)


def turns_to_the_ends(
    state: PredictionState,
    walk: Walk,
    options: SamplingOptions,
    addresses: Sequence[int] | None = None,
    *,
    at_once: int,
) -> Iterator[Tensor]:
    """Yield the ids of texts that obey a constraint, (t, B), -1 behind ends, of at most `at_once` turns.

    Arguments and errors are those of `stream_ids`; `walk` is the state's.
    """
    B = state.rows
    going = list(range(B))
    addresses = list(going if addresses is None else addresses)
    while walk.none_ends or (left := [at for at in range(len(going)) if not walk.ended(at)]):
        if not walk.none_ends and len(left) < len(going):  # the others need not wait for those that are done
            state, walk = state.fork(left), walk.fork(left)
            state.walk = walk
            going, addresses = [going[at] for at in left], [addresses[at] for at in left]
        turns = some_turns(state, options, addresses, min(at_once, walk.left)).view(-1, len(going))
        if len(going) < B or not walk.none_ends:
            spread = turns.new_full((len(turns), B), -1)
            spread[:, going] = turns
            turns = spread[(spread >= 0).any(dim=1)]  # not the last one, if it has but ended texts
        if len(turns):
            yield turns


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
        InputError: there is a constraint, which has to know how many ids may come: `stream_ids` tells it.

    Example:
        >>> from charlm import BigramLM
        >>> state = BigramLM(65).new_state()
        >>> state.observe(torch.tensor([[24]]))
        >>> next_ids(state, SamplingOptions(seed=1337)).shape, state.lengths
        (torch.Size([1]), [2])
    """
    if options.constraint is not None and state.walk is None:
        raise InputError("constraint must know how many ids may come: use stream_ids")
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
    if state.walk is not None:
        logits = state.walk.mask(logits)
    uniforms = options.uniforms(addresses, state.lengths)  # (B,)
    ids = filter_and_draw(state.engine, logits, options, uniforms, texts)  # (B,): filter, draw
    state.observe(ids)  # append
    return ids if state.walk is None else state.walk.move(ids)


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
