"""The order of blocks when a run goes through the text in epochs.

Each epoch cuts the text into blocks that do not overlap, at an offset of its own, and visits them in an order
of its own. A batch may span two epochs. The lecture draws with replacement instead: after as many characters
as the text has, it has seen only 63 % of them. Offset and order are derived from the epoch's number, so the
blocks of any step are known without the steps before it. The order of up to 2**24 blocks is a shuffled list;
that of more is computed place by place, to save memory.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from charlm.data.blocks import BlockDataset
from charlm.errors import DataError
from charlm.plain import blocks_in_epoch
from charlm.randomness import derive_seed

__all__ = ["DocumentOrder", "EpochOrder", "order_of", "permuted"]

_MOST_LISTED = 2**24  # blocks: their order is a list of 128 MiB
_MOST_EPOCHS, _INEXACT = 1_000, 0.002  # for `_whole`: the largest factor, and the tolerated relative error
_ROUNDS = 4  # four rounds of pseudorandom functions make a pseudorandom permutation


class EpochOrder:
    """The starts of all batches of a run.

    Args:
        data: the text and the size of a block, T.
        batch_size: B.
        seed: of the run.

    Attributes:
        blocks: the number of blocks in an epoch; less than one block at each end of the text is left out.

    Example:
        >>> order = EpochOrder(BlockDataset(torch.arange(100), block_size=10), batch_size=3, seed=1)
        >>> order.blocks
        9
        >>> sorted(start // 10 for i in range(3) for start in order.starts(i).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8]
    """

    blocks: int

    def __init__(self, data: BlockDataset, batch_size: int, seed: int) -> None:
        N, self._block_size = data.n_ids, data.block_size
        self.blocks = blocks_in_epoch(N, self._block_size)
        self._offsets = min(self._block_size, N - self.blocks * self._block_size)
        self._batch_size, self._seed = batch_size, seed
        self._epochs: dict[int, Tensor] = {}

    def starts(self, batch: int) -> Tensor:
        """Return (B,), where the blocks of a batch begin.

        Args:
            batch: its number in the run, from 0.
        """
        begin, end = batch * self._batch_size, (batch + 1) * self._batch_size
        touched = range(begin // self.blocks, (end - 1) // self.blocks + 1)
        if self.blocks <= _MOST_LISTED:
            self._epochs = {epoch: self._epoch(epoch) for epoch in touched}
        parts = [
            self._some(epoch, range(max(begin - first, 0), min(end - first, self.blocks)))
            for epoch, first in ((epoch, epoch * self.blocks) for epoch in touched)
        ]
        return torch.cat(parts)

    def _some(self, epoch: int, places: range) -> Tensor:
        """Return the starts at some places of an epoch."""
        if epoch in self._epochs:
            return self._epochs[epoch][places.start : places.stop]
        _, offset = self._beginning(epoch)
        order = permuted(
            np.arange(places.start, places.stop), self.blocks, derive_seed(self._seed, "order", epoch)
        )
        return self._begins(epoch, offset, torch.from_numpy(order))

    def _epoch(self, epoch: int) -> Tensor:
        """Return the starts of one epoch in the order of the visit, (blocks,)."""
        if epoch in self._epochs:
            return self._epochs[epoch]
        generator, offset = self._beginning(epoch)
        order = torch.randperm(self.blocks, generator=generator, device="cpu")
        return self._begins(epoch, offset, order)

    def _begins(self, epoch: int, offset: Tensor, numbers: Tensor) -> Tensor:
        """Return where the blocks of these numbers begin in an epoch, (n,)."""
        return offset + self._block_size * numbers

    def _beginning(self, epoch: int) -> tuple[torch.Generator, Tensor]:
        """Return the generator of an epoch, and the start of its first block, (1,)."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "epoch", epoch))
        return generator, torch.randint(self._offsets, (1,), generator=generator, device="cpu")


class DocumentOrder(EpochOrder):
    """The starts of all batches of a run on documents.

    An epoch shows each block of a document as often as its weight says. Documents of equal weight form a
    group. If the weight is not whole, some blocks of the group are shown once more than others, and each
    epoch chooses other ones. A document has more ids than its blocks cover; so each repetition shifts the
    blocks by a few ids.

    Args:
        data: documents, and the size of a block, T.
        batch_size: B.
        seed: of the run.

    Raises:
        DataError: all documents are too short for a block.

    Example:
        >>> from charlm import CharTokenizer
        >>> data = BlockDataset.from_texts(["aaaaa", "bbbbb"], CharTokenizer("ab"), 4, weights=[1, 3])
        >>> sorted(DocumentOrder(data, batch_size=4, seed=1).starts(0).tolist())
        [0, 5, 5, 5]
    """

    blocks: int

    def __init__(self, data: BlockDataset, batch_size: int, seed: int) -> None:
        if data.documents is None:
            raise DataError("there are no documents: BlockDataset.from_texts makes them")
        self._block_size, self._batch_size, self._seed = data.block_size, batch_size, seed
        self._offsets, self._epochs = 1, {}
        documents, T = data.documents, data.block_size
        blocks = documents.blocks(T)
        if not blocks.any():
            longest = int(documents.lengths.max())
            raise DataError(
                f"each document is too short for a block of {T} and the {data.unit} after it: the longest "
                f"has {longest} {data.unit}s. Use a smaller block_size, or join them"
            )
        weights = documents.weights
        order = np.argsort(weights, kind="stable")
        order = order[blocks[order] > 0]
        self._documents = order
        self._starts, self._blocks = documents.starts[order], blocks[order]
        self._slack = (documents.lengths - 1 - T * blocks)[order]
        self._block_ends = np.cumsum(self._blocks)
        values, firsts = np.unique(weights[order], return_index=True)
        self._group_blocks = np.add.reduceat(self._blocks, firsts)  # (G,)
        self._group_slots = _whole(values * self._group_blocks)  # (G,)
        self._slot_ends = np.cumsum(self._group_slots)
        self.blocks = int(self._slot_ends[-1])

    @override
    def _begins(self, epoch: int, offset: Tensor, numbers: Tensor) -> Tensor:
        slots, seed = numbers.numpy(), derive_seed(self._seed, "documents", epoch)
        group = np.searchsorted(self._slot_ends, slots, side="right")
        turns = _mixed(np.arange(len(self._slot_ends), dtype=np.uint64) ^ np.uint64(seed))
        turns = (turns % self._group_blocks.astype(np.uint64)).astype(np.int64)  # (G,)
        turned = slots - (self._slot_ends - self._group_slots)[group] + turns[group]
        repetition, inside = np.divmod(turned, self._group_blocks[group])
        block = inside + (np.cumsum(self._group_blocks) - self._group_blocks)[group]
        which = np.searchsorted(self._block_ends, block, side="right")
        number = block - self._block_ends[which] + self._blocks[which]
        key = self._documents[which].astype(np.uint64) * np.uint64(2**20) + repetition.astype(np.uint64)
        begin = _mixed(_mixed(key) ^ np.uint64(seed)) % (self._slack[which] + 1).astype(np.uint64)
        return torch.from_numpy(self._starts[which] + begin.astype(np.int64) + self._block_size * number)


def order_of(data: BlockDataset, batch_size: int, seed: int) -> EpochOrder:
    """Return the order of the blocks of a text, or of documents."""
    return (EpochOrder if data.documents is None else DocumentOrder)(data, batch_size, seed)


def _whole(numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return whole numbers in the same proportions as these, within one part in 500."""
    for epochs in range(1, _MOST_EPOCHS):
        rounded = np.maximum(np.rint(epochs * numbers), 1)
        if (np.abs(rounded / (epochs * numbers) - 1) <= _INEXACT).all():
            break
    return rounded.astype(np.int64)


def permuted(places: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Apply a random permutation of 0 … count - 1 to some numbers, each computed by itself.

    A Feistel network permutes the numbers of `2 h` bits, where `2 h` bits are just enough to hold them all.
    A result of `count` or more is permuted again until it is smaller ("cycle walking").

    Args:
        places: (B,) from 0 to count - 1.
        count: the number of permuted numbers, up to 2**62.
        seed: chooses the permutation.

    Returns:
        (B,) int64.

    Source:
        Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions" (1988);
        Black and Rogaway, "Ciphers with arbitrary finite domains" (2002).

    Example:
        >>> sorted(permuted(np.arange(6), 6, seed=1).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    half = np.uint64(-(-(count - 1).bit_length() // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(derive_seed(seed, "round", i)) for i in range(_ROUNDS)]
    images = places.astype(np.uint64)
    walking = np.arange(len(images))
    while len(walking):
        left, right = images[walking] >> half, images[walking] & low
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & low)
        images[walking] = (left << half) | right
        walking = walking[images[walking] >= count]
    return images.astype(np.int64)


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return 64 bits that depend on every bit of each number: the end of Steele's SplitMix64 (2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
