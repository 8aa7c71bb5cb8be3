"""Speculative sampling: a quick model guesses some ids ahead, the model reads all of them in one pass.

Reading five ids costs a large model little more than reading one (Leviathan et al. 2022, arXiv:2211.17192;
Chen et al. 2023, arXiv:2302.01318). There a guess is kept or not by a coin, so that the distribution is
right. Here model and draft are asked with the same uniform number, and a guess is kept where the model would
have chosen it: fewer are, but the text is the one that the model writes by itself, as far as its logits do
not depend on how many ids a pass reads (to the bit in the compiled engine, within rounding in PyTorch).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from charlm.errors import NonFiniteError
from charlm.generation.decode import filter_and_draw, next_ids
from charlm.generation.options import SamplingOptions
from charlm.generation.passes import context_start
from charlm.generation.state import PredictionState

__all__ = ["stream_drafted"]

_MOST = 8  # guesses at once
_WORTH = 0.15  # chance to be of use from which on a guess is made
_SELDOM = 8  # of a draft that is nearly always wrong, one in so many ids is asked


def stream_drafted(
    state: PredictionState, draft: PredictionState, max_new_tokens: int, options: SamplingOptions
) -> Iterator[Tensor]:
    """Yield what `stream_ids(state, max_new_tokens, options)` yields.

    Args:
        state: has one row, which has observed the prompt; and the walk, if there is a constraint.
        draft: of another model; has observed the same. How far it guesses ahead depends on how often it was
            right lately.
        max_new_tokens: how many ids.
        options: how to choose; the draft's choice is made so, too.

    Yields:
        (1,) int64.

    Raises:
        NonFiniteError: as `stream_ids`.
    """
    options = options.seeded()
    right = 0.6  # share of the guesses that were right, of late
    left, turn = max_new_tokens, 0
    while left and not _ended(state):
        position = state.lengths[0]
        room = left - 1
        if state.block_size is not None:  # all guesses must be seen from one context
            begin = context_start(position, state.block_size, state.overflow)
            room = min(room, begin + state.block_size - position)
        turn += 1
        far = min(int(math.log(_WORTH) / math.log(right)), _MOST)
        if far == 0 and turn % _SELDOM == 0:  # perhaps it does better again
            far = 1
        draft.walk = None if state.walk is None else state.walk.fork([0])
        guesses = _guesses(draft, options, min(far, room))
        chosen = _agreed(state, guesses.tolist(), options) if far else next_ids(state, options).tolist()
        chosen = [i for i in chosen if i >= 0]  # -1 is the end that a constraint allows
        agreed = sum(1 for guess, i in zip(guesses.tolist(), chosen, strict=False) if guess == i)
        if agreed < len(guesses):
            draft.retract(len(guesses) - agreed)
        draft.observe(torch.tensor([chosen[agreed:]], dtype=torch.int64, device=draft.device))
        for was_right in [1.0] * agreed + [0.0] * (agreed < len(guesses)):
            right = min(max(right + 0.05 * (was_right - right), 0.01), 0.99)
        left -= len(chosen)
        for i in chosen:
            yield torch.tensor([i], device=state.device)


def _guesses(draft: PredictionState, options: SamplingOptions, count: int) -> Tensor:
    """Let the draft go ahead, and return its ids, (count,) or fewer."""
    guesses = [torch.empty(0, dtype=torch.int64, device=draft.device)]
    with suppress(NonFiniteError):  # there is nothing that it could choose
        while len(guesses) <= count and not _ended(draft):
            guess = next_ids(draft, options)
            if guess < 0:
                draft.retract(1)  # what ended it is no part of it
            else:
                guesses.append(guess)
    return torch.cat(guesses)


def _ended(state: PredictionState) -> bool:
    return state.walk is not None and state.walk.ended(0)


def _agreed(state: PredictionState, guesses: list[int], options: SamplingOptions) -> list[int]:
    """Do what `next_ids` does for the only row, as often as a guess turns out right, and once more.

    Returns:
        From 1 to t + 1 ids, now observed; none where a constraint lets the text end at once.
    """
    position, t = state.lengths[0], len(guesses)
    logits = state.verify(torch.tensor(guesses, dtype=torch.int64, device=state.device))  # (t + 1, V)
    chosen: list[int] = []
    if not options.filters_by_itself and state.walk is None:
        with suppress(NonFiniteError):  # which matters only where the guesses before it are right: see below
            uniforms = options.uniforms([0] * (t + 1), range(position, position + t + 1))
            chosen = state.engine.choose(logits, options, uniforms).tolist()
            right = next((i for i in range(t) if chosen[i] != guesses[i]), t)
            del chosen[right + 1 :]
    while len(chosen) <= t and chosen == guesses[: len(chosen)] and not _ended(state):  # one by one
        text = [torch.cat([state.text(0), logits.new_tensor(chosen, dtype=torch.int64)])]
        uniform = options.uniforms([0], [position + len(chosen)])
        try:
            z = logits[len(chosen)][None]  # (1, V)
            if state.walk is not None:
                z = state.walk.mask(z)
            ids = filter_and_draw(state.engine, z, options, uniform, text)  # (1,)
            if state.walk is not None:
                ids = state.walk.move(ids)
            chosen += ids[ids >= 0].tolist()
        except NonFiniteError:
            if not chosen:
                raise
            break  # the next call will meet it
    state.observe(torch.tensor([chosen], dtype=torch.int64, device=state.device))
    return chosen
