"""Speculative sampling: a quick model guesses some ids ahead, the model reads all of them in one pass.

Reading five ids costs a large model little more than reading one (Leviathan et al. 2022, arXiv:2211.17192;
Chen et al. 2023, arXiv:2302.01318). There a guess is kept or not by a coin, so that the distribution is
right. Here model and draft are asked with the same uniform number, and a guess is kept where the model would
have chosen it: fewer are, but the text is the very same, id for id, that the model writes by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from charlm.errors import NonFiniteError
from charlm.generation.options import SamplingOptions
from charlm.generation.state import PredictionState, context_start

__all__ = ["stream_drafted"]

_MOST = 8  # guesses at once


def stream_drafted(
    state: PredictionState, draft: PredictionState, max_new_tokens: int, options: SamplingOptions
) -> Iterator[Tensor]:
    """Yield what `stream_ids(state, max_new_tokens, options)` yields.

    Args:
        state: has one row, which has observed the prompt.
        draft: of another model; has observed the same. It takes as many guesses at once as were right lately.
        max_new_tokens: how many ids.
        options: how to choose; the draft's choice is made so, too.

    Yields:
        (1,) int64.

    Raises:
        NonFiniteError: as `stream_ids`.
    """
    ahead = 4
    left = max_new_tokens
    while left:
        position = state.lengths[0]
        room = left - 1
        if state.block_size is not None:  # all guesses must be seen from one context
            begin = context_start(position, state.block_size, state.overflow)
            room = min(room, begin + state.block_size - position)
        try:
            for _ in range(min(ahead, room)):
                draft.advance(options, [0])
        except NonFiniteError:  # then there are fewer guesses
            pass
        guesses = draft.text(0)[position:]
        chosen = state.verify(guesses.to(state.device), options, 0)
        agreed = sum(1 for guess, i in zip(guesses.tolist(), chosen, strict=False) if guess == i)
        if agreed < len(guesses):
            draft.retract(len(guesses) - agreed)
        draft.observe(torch.tensor([chosen[agreed:]], device=draft.device))
        ahead = min(ahead + 1, _MOST) if agreed == len(guesses) else max(agreed + 1, 2)
        left -= len(chosen)
        for i in chosen:
            yield torch.tensor([i], device=state.device)
