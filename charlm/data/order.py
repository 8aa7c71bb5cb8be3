"""Which blocks a step sees when a run goes through the text in epochs.

Each epoch cuts the text into blocks that do not overlap, at an offset of its own, and visits them in an
order of its own; a batch may reach over the end of an epoch. Drawing with replacement, as in the lecture,
has seen only 63 % of a text when it has drawn as many characters as there are. Offset and order have the
epoch's number as their address, so any step's blocks are known without those before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from charlm.data.blocks import BlockDataset
from charlm.randomness import derive_seed

__all__ = ["EpochOrder"]


class EpochOrder:
    """The starts of all batches of a run.

    Args:
        data: the text and the size of a block, T.
        batch_size: B.
        seed: of the run.

    Attributes:
        blocks: how many blocks an epoch has; less than one block at each end of the text is left out.

    Example:
        >>> order = EpochOrder(BlockDataset(torch.arange(100), block_size=10), batch_size=3, seed=1)
        >>> order.blocks
        9
        >>> sorted(start // 10 for i in range(3) for start in order.starts(i).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8]
    """

    blocks: int

    def __init__(self, data: BlockDataset, batch_size: int, seed: int) -> None:
        N, self._block_size = len(data.ids), data.block_size
        self.blocks = max(1, N // self._block_size - 1)
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
        self._epochs = {epoch: self._epoch(epoch) for epoch in touched}
        parts = [
            starts[max(begin - epoch * self.blocks, 0) : end - epoch * self.blocks]
            for epoch, starts in self._epochs.items()
        ]
        return torch.cat(parts)  # a copy of B starts, not of an epoch: that of a long text has millions

    def _epoch(self, epoch: int) -> Tensor:
        """Return (blocks,), the starts of one epoch, in order."""
        if epoch in self._epochs:
            return self._epochs[epoch]
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "epoch", epoch))
        offset = torch.randint(self._offsets, (1,), generator=generator, device="cpu")  # (1,)
        return offset + self._block_size * torch.randperm(self.blocks, generator=generator, device="cpu")
