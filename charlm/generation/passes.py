"""Which ids a model sees at each position, and how a span of positions becomes passes through it.

Two rules hold for every model: a cache never changes a result, and which ids are seen is a function of the
absolute position alone. So each row of a batch gets what it would get by itself. This file knows positions,
neither ids nor models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from charlm.generation.options import Overflow

__all__ = ["Pass", "context_start", "plan_passes"]


def context_start(position: int, block_size: int | None, overflow: Overflow) -> int:
    """Return where the context begins from which the id at `position` is predicted.

    Up to `block_size` ids the model sees all of them. Past that, "slide" shows it exactly the last
    `block_size`, as the lecture does: every step then costs a whole window, since all positions shift.
    "restart" goes on from the last half of the window whenever the window is full, and lets it fill again:
    all but one step in half a window then cost one id.

    Args:
        position: absolute position of the id to be predicted, from 0; what came before counts.
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
    dropped = block_size + 1 - max(block_size // 2, 1)  # ids that each restart leaves behind
    restarts = -((block_size - position) // dropped)  # ceil((position - block_size) / dropped)
    return restarts * dropped


class Pass(NamedTuple):
    """Some ids of one row that are read at once: those from `start` on, up to `stop`.

    Attributes:
        row: its number in the state.
        begin: position where the context begins; the ids from there to `start` have been read before.
        start: position of the first id that is read.
        stop: position after the last one, which is what the last logits predict.
        wanted: how many logits are asked for: after each of the last so many ids.
        has_room: whether the window has room for the id at `stop`, too, so that it pays to keep what is read.

    Example:
        >>> one = Pass(row=0, begin=0, start=2, stop=5, wanted=1, has_room=True)  # reads the ids 2, 3 and 4
        >>> one.stop  # and predicts the one at 5
        5
    """

    row: int
    begin: int
    start: int
    stop: int
    wanted: int
    has_room: bool


def plan_passes(
    spans: Sequence[range], read: Sequence[range], block_size: int | None, overflow: Overflow
) -> list[list[Pass]]:
    """Return the passes that predict each row's span of positions, in rounds of at most one for each row.

    Args:
        spans: for each row the positions whose logits are wanted, from 1 on.
        read: for each row the positions of the ids that have been read, from the beginning of their context;
            empty if none of them counts any more.
        block_size: the model's window; None: no limit.
        overflow: what happens past it.

    Example:
        >>> plan_passes([range(5, 6)], [range(0, 3)], 4, "slide")  # another context begins: all is read again
        [[Pass(row=0, begin=1, start=1, stop=5, wanted=1, has_room=False)]]
        >>> plan_passes([range(4, 5)], [range(0, 3)], 4, "slide")  # the id at position 3, to predict the next
        [[Pass(row=0, begin=0, start=3, stop=4, wanted=1, has_room=False)]]
    """
    rounds: list[list[Pass]] = []
    for row, span in enumerate(spans):
        position, known, number = span.start, read[row], 0
        while position < span.stop:
            begin = context_start(position, block_size, overflow)
            last = span.stop - 1 if block_size is None else min(span.stop - 1, begin + block_size)
            # The id before a position has to be read for its logits, even once more.
            start = max(min(known.stop, position - 1), begin) if known.start == begin else begin
            has_room = block_size is None or last < begin + block_size
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(Pass(row, begin, start, last, last + 1 - position, has_room))
            known, position, number = range(begin, last), last + 1, number + 1
    return rounds
