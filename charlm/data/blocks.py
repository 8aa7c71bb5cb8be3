"""`BlockDataset`: a long row of ids, seen as blocks of characters with their next characters as targets.

It knows ids alone: no text (beyond `from_text`), no models, no devices. A block that starts at `s` has
the input `ids[s : s+T]` and the target `ids[s+1 : s+T+1]`, as in the lecture; every start is a valid
item, so an epoch has N - T items that overlap. The ids stay in the smallest integer type, and a batch
is one gather from a strided view of all windows: nothing is copied until it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from charlm.errors import DataError, InputError, shown
from charlm.plain import as_float, int_from, share_of
from charlm.text.tokenizer import Tokenizer, Unit, unit_of

__all__ = ["BlockDataset", "draw_starts", "in_order"]

_INTEGERS = {
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
}


_PIECE, _MOST_PIECES = 4_096, 20  # of what is set aside: ids in a piece, and how many there are


class BlockDataset(Dataset[tuple[Tensor, Tensor]]):
    """Blocks of `block_size` characters and, one to the right, their targets.

    A map-style dataset: `DataLoader` takes it as it is, with any number of workers.

    Args:
        ids: (N,) integers, N > block_size; a tensor or an array. Kept in the smallest unsigned type
            that holds them, on the CPU. What has that type already is shared, not copied: leave it as
            it is from then on.
        block_size: T, characters in a block.
        tokenizer: what made the ids, if that is known: a `Trainer` refuses data whose ids stand for other
            characters than its own do. Nothing is encoded or decoded with it.

    Raises:
        DataError: the text is too short for a single block with its targets, or an id is negative.
        InputError: the ids are no row of integers, or `block_size` is no int of 1 or more.

    Example:
        >>> data = BlockDataset(torch.arange(10), block_size=4)
        >>> x, y = data[2]
        >>> x.tolist(), y.tolist()
        ([2, 3, 4, 5], [3, 4, 5, 6])
        >>> len(data)
        6
    """

    ids: Tensor
    max_id: int
    tokenizer: Tokenizer | None = None

    def __init__(
        self, ids: Tensor | NDArray[Any], block_size: int, *, tokenizer: Tokenizer | None = None
    ) -> None:
        self.tokenizer = tokenizer or self.tokenizer
        self.block_size: int = int_from(1, block_size, "block_size")
        self.ids, self.max_id = _smallest(ids)
        self._check_length("the text", len(self.ids))
        self._windows = self.ids.unfold(0, self.block_size + 1, 1)  # (N - T, T + 1), a view

    @classmethod
    def from_text(cls, text: str, tokenizer: Tokenizer, block_size: int) -> Self:
        """Encode a text and cut it into blocks.

        Args:
            text: longer than a block.
            tokenizer: makes the ids.
            block_size: T, characters in a block.

        Raises:
            UnknownCharacterError: the text has a character that the tokenizer lacks.
            DataError: the text is too short for a single block with its targets.
        """
        return cls._made(tokenizer.encode_array(text), block_size, tokenizer)

    def split(self, fraction: float = 0.9) -> tuple[Self, Self]:
        """Return the first `fraction` of the text and the rest: train and validation, as in the lecture.

        Args:
            fraction: share of the first part, in (0, 1). The cut is at `fraction * N`, rounded down:
                of a decimal as of the decimal, 0.93 of 1,000 is 930.

        Returns:
            Two datasets over the same ids (views, no copy).

        Raises:
            DataError: a part would be too short; the message says which.
            InputError: `fraction` is no number between 0 and 1.
        """
        share = as_float(fraction)
        if share is None or not 0 < share < 1:
            raise InputError(f"fraction must be a number between 0 and 1, got {shown(fraction)}")
        cut = share_of(len(self.ids), share)
        self._check_length("the first part of the text (for training)", cut)
        self._check_length("the second part of the text (for validation)", len(self.ids) - cut)
        first, second = (
            self._made(ids, self.block_size, self.tokenizer) for ids in (self.ids[:cut], self.ids[cut:])
        )
        return first, second

    def set_aside(self, count: int) -> tuple[Self, Self]:
        """Return the text without some pieces, and these pieces: to train on, and to decide something by.

        The pieces are spread evenly over the text, since its end may be unlike the rest: the last fortieth of
        Tiny Shakespeare is the beginning of the play that validates. Each has about four thousand ids, and
        there are at most twenty.

        Args:
            count: how many ids are set aside.

        Returns:
            Two datasets, each of ids that are no longer next to one another where a piece begins or ends.

        Raises:
            DataError: a part would be too short; the message says which.

        Example:
            >>> rest, aside = BlockDataset(torch.arange(100), block_size=4).set_aside(10)
            >>> len(rest.ids), aside.ids.tolist()
            (90, [45, 46, 47, 48, 49, 50, 51, 52, 53, 54])
        """
        N, count = len(self.ids), int_from(1, count, "count")
        self._check_length("the text without what is set aside", N - count)
        self._check_length("what is set aside", count)
        pieces = min(max(count // _PIECE, 1), _MOST_PIECES)
        ids, is_aside = self.ids.numpy(), np.zeros(N, bool)
        for i in range(pieces):
            length = (i + 1) * count // pieces - i * count // pieces
            start = (2 * i + 1) * N // (2 * pieces) - length // 2
            is_aside[start : start + length] = True
        rest, aside = (
            self._made(ids[kept], self.block_size, self.tokenizer) for kept in (~is_aside, is_aside)
        )
        return rest, aside

    @classmethod
    def _made(cls, ids: Tensor | NDArray[Any], block_size: int, tokenizer: Tokenizer | None) -> Self:
        """Return a dataset; a subclass need not know that there is a tokenizer."""
        made = cls.__new__(cls)
        made.tokenizer = tokenizer
        made.__init__(ids, block_size)  # type: ignore[misc]
        return made

    @property
    def unit(self) -> Unit:
        """What an id stands for, "character" or "byte": how messages and charts call it."""
        return "character" if self.tokenizer is None else unit_of(self.tokenizer)

    def _check_length(self, name: str, N: int) -> None:
        if self.block_size >= N:
            raise DataError(
                f"{name} has {N} {self.unit}s; block_size {self.block_size} needs at least "
                f"{self.block_size + 1}: a block and the {self.unit} after it. Use a longer text or a "
                "smaller block_size."
            )

    def __len__(self) -> int:
        """Return the number of starts, N - block_size."""
        return self._windows.size(0)

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        """Return the block that starts at `start`: inputs (T,) and targets (T,), int64."""
        if not -len(self) <= start < len(self):
            raise IndexError(f"start {start} is out of range for {len(self)} blocks")
        window = self._windows[start]  # (T + 1,)
        return window[:-1].long(), window[1:].long()  # two copies: who changes one leaves the other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.ids)} {self.unit}s, block_size={self.block_size})"

    def __getstate__(self) -> dict[str, object]:
        """Leave out the view of all windows: pickled, it would be T + 1 times the text."""
        return {"ids": self.ids.numpy(), "block_size": self.block_size, "tokenizer": self.tokenizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.tokenizer = state.pop("tokenizer", None)
        self.__init__(**state)  # type: ignore[misc]  # rebuilds the view from the ids

    def sample_batch(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw blocks at random, with replacement.

        Args:
            batch_size: B, number of blocks.
            generator: a CPU generator to draw the starts from. None: torch's global one.

        Returns:
            Inputs (B, T) and targets (B, T), int64, on the CPU.

        Raises:
            InputError: `batch_size` is no int of 1 or more.

        Example:
            >>> data = BlockDataset(torch.arange(100), block_size=8)
            >>> x, y = data.sample_batch(4, generator=torch.Generator().manual_seed(1337))
            >>> x.shape, bool((y == x + 1).all())
            (torch.Size([4, 8]), True)
        """
        return self.blocks_at(draw_starts(len(self), batch_size, generator))

    def blocks_at(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blocks that begin at given places.

        Args:
            starts: (B,) int64, each at least 0 and below `len(self)`.

        Returns:
            Inputs (B, T) and targets (B, T), int64, on the CPU.
        """
        # index_select, not self._windows[starts]: on this view it is several hundred times faster.
        windows = self._windows.index_select(0, starts)  # (B, T + 1)
        return windows[:, :-1].long(), windows[:, 1:].long()

    def blocks(self, batch_size: int, *, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the whole text in order, every target exactly once: for evaluation.

        Args:
            batch_size: B, the most blocks in a batch.
            most: yield only so many blocks, spread evenly over the text; None: all.

        Yields:
            Inputs and targets, (B, T) int64. The last full batch may have fewer blocks, and one more
            batch of a single shorter block (1, t) follows where the text does not divide; not with `most`.
        """
        for x, y in in_order(self.ids, self.block_size, batch_size, most):
            yield x.long(), y.long()


def draw_starts(count: int, batch_size: int, generator: torch.Generator | None) -> Tensor:
    """Return (B,) starts below `count` on the CPU, as the lecture draws them."""
    B = int_from(1, batch_size, "batch_size")
    return torch.randint(count, (B,), generator=generator, device="cpu")


def in_order(
    ids: Tensor, block_size: int, batch_size: int, most: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets as `BlockDataset.blocks` does, as views of ids of any type on any device."""
    B, N, T = int_from(1, batch_size, "batch_size"), len(ids), block_size
    most = None if most is None else int_from(1, most, "most")
    full = (N - 1) // T
    inputs = ids[: full * T].view(full, T)
    targets = ids[1 : full * T + 1].view(full, T)
    if most is not None and most < full:
        chosen = torch.arange(most, device=ids.device) * full // most  # (most,)
        inputs, targets = inputs[chosen], targets[chosen]
    for i in range(0, len(inputs), B):
        yield inputs[i : i + B], targets[i : i + B]
    if most is None and full * T < N - 1:
        yield ids[full * T : -1][None], ids[full * T + 1 :][None]


def _smallest(ids: Tensor | NDArray[Any]) -> tuple[Tensor, int]:
    """Return the ids in the smallest unsigned type that holds them, and the largest id."""
    if not isinstance(ids, Tensor | np.ndarray):
        raise InputError(f"ids must be a tensor or an array, got {type(ids).__name__}")
    if ids.ndim != 1 or not (
        ids.dtype in _INTEGERS if isinstance(ids, Tensor) else np.issubdtype(ids.dtype, np.integer)
    ):
        raise InputError(f"ids must be one row of integers, got shape {tuple(ids.shape)} of {ids.dtype}")
    if isinstance(ids, Tensor) and ids.is_meta:
        raise InputError("ids must hold data, got a tensor on the meta device")
    array = ids.cpu().numpy() if isinstance(ids, Tensor) else ids
    if len(array) == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu"), 0
    low, high = int(array.min()), int(array.max())
    if low < 0:
        raise DataError(f"ids must not be negative, got {low} at position {int(array.argmin())}")
    dtype = np.min_scalar_type(high)
    if dtype == np.uint64:
        raise DataError(f"ids must be below 2**32, got {high}")
    array = np.ascontiguousarray(array, dtype=dtype)
    if not array.flags.writeable:  # torch shares memory only with arrays that may be written
        array = array.copy()
    return torch.from_numpy(array), high
