"""The context of each position, and the passes through a model that predict a span of positions.

Two rules hold for every model: a cache never changes a result, and the context depends on the absolute
position alone. So each row of a batch gets the result that it would get by itself. This module knows
positions, and neither ids nor models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from charlm.generation.options import Overflow

__all__ = ["Pass", "context_start", "plan_passes"]


def context_start(position: int, block_size: int | None, overflow: Overflow) -> int:
    """Return where the context for the prediction of the id at `position` begins.

    The model sees all ids as long as they are at most `block_size`. Past that, "slide" shows exactly the last
    `block_size` ids, as in the lecture: then every step costs a whole window, since all positions shift.
    "restart" continues from the last half of the window whenever the window is full: then all but one step in
    half a window cost one id.

    Args:
        position: absolute position of the id to be predicted, from 0; the prompt counts.
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
    """The ids of one row from `start` up to `stop`, which are read at once.

    Attributes:
        row: its number in the state.
        begin: position where the context begins; the ids from there to `start` were read before.
        start: position of the first id that is read.
        stop: position after the last id; the last logits predict the id there.
        wanted: the number of logits that are asked for, after each of the last ids.
        has_room: whether the id at `stop` fits into the window, too, so that a cache is useful.

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
    """Return the passes that predict each row's span of positions, in rounds of at most one pass per row.

    Args:
        spans: for each row the positions to predict, from 1 on.
        read: for each row the positions that were read, from the beginning of their context; empty if none
            counts.
        block_size: the model's window; None: no limit.
        overflow: the rule past the window.

    Example:
        >>> plan_passes([range(5, 6)], [range(0, 3)], 4, "slide")  # another context begins: all is read again
        [[Pass(row=0, begin=1, start=1, stop=5, wanted=1, has_room=False)]]
        >>> plan_passes([range(4, 5)], [range(0, 3)], 4, "slide")  # the id at position 3, to predict the next
        [[Pass(row=0, begin=0, start=3, stop=4, wanted=1, has_room=False)]]
    """
    rounds: list[list[Pass]] = []
    for row, span in enumerate(spans):
        position, done, number = span.start, read[row], 0
        while position < span.stop:
            begin = context_start(position, block_size, overflow)
            last = span.stop - 1 if block_size is None else min(span.stop - 1, begin + block_size)
            # The logits of a position come from the id before it, even if that was read already.
            start = max(min(done.stop, position - 1), begin) if done.start == begin else begin
            has_room = block_size is None or last < begin + block_size
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(Pass(row, begin, start, last, last + 1 - position, has_room))
            done, position, number = range(begin, last), last + 1, number + 1
    return rounds
