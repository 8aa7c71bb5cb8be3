"""Speculative sampling: a fast model guesses some ids ahead, and the model reads them all in one pass.

Reading five ids costs a large model little more than reading one (Leviathan et al. 2022, arXiv:2211.17192;
Chen et al. 2023, arXiv:2302.01318). These papers accept a guess at random, which keeps the distribution. Here
model and draft use the same uniform number, and a guess is accepted if the model would have chosen it. Fewer
guesses are accepted, but the text is the one that the model generates alone, as long as its logits do not
depend on the number of ids in a pass. They do not in the compiled engine; in PyTorch they differ by rounding.
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

_MOST = 8  # the most guesses at once
_WORTH = 0.15  # a guess is made if its chance of being accepted is at least this
_SELDOM = 8  # a draft that is nearly always wrong guesses only every eighth id


def stream_drafted(
    state: PredictionState, draft: PredictionState, max_new_tokens: int, options: SamplingOptions
) -> Iterator[Tensor]:
    """Yield the same as `stream_ids(state, max_new_tokens, options)`.

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
    right = 0.6  # share of recent guesses that were right
    left, turn = max_new_tokens, 0
    while left and not _ended(state):
        position = state.lengths[0]
        room = left - 1
        if state.block_size is not None:  # all guesses must lie in one context
            begin = context_start(position, state.block_size, state.overflow)
            room = min(room, begin + state.block_size - position)
        turn += 1
        far = min(int(math.log(_WORTH) / math.log(right)), _MOST)
        if far == 0 and turn % _SELDOM == 0:  # the draft may have improved
            far = 1
        draft.walk = None if state.walk is None else state.walk.fork([0])
        guesses = _guesses(draft, options, min(far, room))
        chosen = _agreed(state, guesses.tolist(), options) if far else next_ids(state, options).tolist()
        chosen = [i for i in chosen if i >= 0]  # -1 is an end of a constraint
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
    """Let the draft guess ahead, and return its ids, (count,) or fewer."""
    guesses = [torch.empty(0, dtype=torch.int64, device=draft.device)]
    with suppress(NonFiniteError):  # the draft can choose nothing
        while len(guesses) <= count and not _ended(draft):
            guess = next_ids(draft, options)
            if guess < 0:
                draft.retract(1)  # the id that ended the text does not belong to it
            else:
                guesses.append(guess)
    return torch.cat(guesses)


def _ended(state: PredictionState) -> bool:
    return state.walk is not None and state.walk.ended(0)


def _agreed(state: PredictionState, guesses: list[int], options: SamplingOptions) -> list[int]:
    """Do the same as `next_ids` for the only row, once for each right guess and once more.

    Returns:
        From 1 to t + 1 ids, which are now observed; none if a constraint ends the text at once.
    """
    position, t = state.lengths[0], len(guesses)
    logits = state.verify(torch.tensor(guesses, dtype=torch.int64, device=state.device))  # (t + 1, V)
    chosen: list[int] = []
    if not options.filters_by_itself and state.walk is None:
        with suppress(NonFiniteError):  # it matters only if the guesses before it are right: see below
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
            break  # the next call raises it
    state.observe(torch.tensor([chosen], dtype=torch.int64, device=state.device))
    return chosen
