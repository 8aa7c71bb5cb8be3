"""The loop of generation: look at the context, choose the next id, append it, repeat.

It is the lecture's `generate`. A `PredictionState` holds the texts and gives the predictions; this module
knows no models, characters or tokenizers. It is used by streams (`stream.py`), by drafts (`drafting.py`), and
by `charlm.lm` for stop strings, which remove a row from the loop.
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
    """Yield the next id of each row, `max_new_tokens` times.

    Args:
        state: has observed the prompts, at least one id each. The new ids are appended to it.
        max_new_tokens: the number of steps.
        options: how to choose.
        addresses: (B,) address of each row's random numbers, by default 0 ... B-1.

    Yields:
        (B,) int64. No gradient mode, training flag or generator stays changed between steps. With a
        constraint, the steps end when all texts have ended, and the id of a text that has ended is -1. Do not
        use the state afterwards then: rows that end leave it.

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
    """Begin a constraint here, if there is one, or raise if it is impossible."""
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
    """Yield the ids (t, B) of at most `at_once` turns of texts that obey a constraint; -1 follows an end.

    Arguments and errors are those of `stream_ids`; `walk` is that of the state.
    """
    B = state.rows
    going = list(range(B))
    addresses = list(going if addresses is None else addresses)
    while walk.none_ends or (left := [at for at in range(len(going)) if not walk.ended(at)]):
        if not walk.none_ends and len(left) < len(going):  # rows that have ended leave the loop
            state, walk = state.fork(left), walk.fork(left)
            state.walk = walk
            going, addresses = [going[at] for at in left], [addresses[at] for at in left]
        turns = some_turns(state, options, addresses, min(at_once, walk.left)).view(-1, len(going))
        if len(going) < B or not walk.none_ends:
            spread = turns.new_full((len(turns), B), -1)
            spread[:, going] = turns
            turns = spread[(spread >= 0).any(dim=1)]  # without a last turn in which all texts end
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
        InputError: there is a constraint, which needs the number of ids to come: use `stream_ids`.

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
    """Do one or more turns, as many as the engine does at once, and return their ids, (t B,) int64."""
    ids = state.engine.turns(state, options, addresses, most)  # one call of a compiled engine
    return one_turn(state, options, addresses) if ids is None else ids


def one_turn(state: PredictionState, options: SamplingOptions, addresses: Sequence[int]) -> Tensor:
    """Predict, filter, draw, append: the body of the lecture's loop, in PyTorch."""
    texts = [state.text(row) for row in range(state.rows)] if options.filters_by_itself else None
    logits = state.predict()  # (B, V)
    if state.walk is not None:
        logits = state.walk.mask(logits)
    uniforms = options.uniforms(addresses, state.lengths)  # (B,)
    ids = filter_and_draw(state.engine, logits, options, uniforms, texts)  # (B,)
    state.observe(ids)
    return ids if state.walk is None else state.walk.move(ids)


@torch.no_grad()
def filter_and_draw(
    engine: Engine,
    logits: Tensor,
    options: SamplingOptions,
    uniforms: NDArray[np.float64] | None,
    texts: Sequence[Tensor] | None,
) -> Tensor:
    """Filter, and draw an id for each row of logits.

    Args:
        engine: has computed the logits.
        logits: (n, V).
        options: how to choose.
        uniforms: (n,) uniform numbers; None: take the likeliest id.
        texts: (n,) the ids before each, (t,); needed if the caller has filters.

    Returns:
        (n,) int64.

    Raises:
        NonFiniteError: a row's logits hold NaN, or a filter removed every id.
    """
    if texts is None:
        return engine.choose(logits, options, uniforms)
    filtered = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    for length in dict.fromkeys(map(len, texts)):  # a filter takes texts of one length
        rows = [row for row, text in enumerate(texts) if len(text) == length]
        filtered[rows] = options.filter(logits[rows], torch.stack([texts[row] for row in rows])).to(filtered)
    return sample(filtered, uniforms)
