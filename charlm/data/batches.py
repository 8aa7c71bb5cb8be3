"""Batches on the model's device.

There are two ways, and `batches_on` chooses. `HostBatches` makes each batch on the CPU and moves it.
`DeviceBatches` moves the ids of the whole text once, in a small integer type; then only the B starts of each
batch are moved. Starts are always drawn on the CPU, so batches are the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from charlm.data.blocks import BlockDataset
from charlm.data.rows import TensorRow, in_order

if TYPE_CHECKING:
    from charlm.backends.base import DeviceBackend

__all__ = ["Batches", "DeviceBatches", "HostBatches", "batches_on"]

_MOST_OF_FREE = 8  # a text may take an eighth of the device's free memory
_AT_ONCE = 2**24  # ids that are moved together
_UNTOLD = 2**26  # bytes of the largest text on a device that does not report its memory

# Not every device can gather or widen unsigned integers of more than a byte. So their bits are moved as
# signed integers and masked after the gather.
_SIGNED: dict[torch.dtype, tuple[torch.dtype, int | None]] = {
    torch.uint16: (torch.int16, 2**16 - 1),
    torch.uint32: (torch.int32, 2**32 - 1),
}


class HostBatches:
    """Batches that are made on the CPU and moved to the device.

    Args:
        data: the text.
        backend: the device.
    """

    def __init__(self, data: BlockDataset, backend: DeviceBackend) -> None:
        self._data, self._backend = data, backend

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the batch of `BlockDataset.sample_batch`, on the device."""
        x, y = self._backend.to_device(*self._data.sample_batch(batch_size, generator=generator))  # (B, T)
        return x, y

    def at(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch of `BlockDataset.blocks_at`, on the device; `starts` (B,) are on the CPU."""
        x, y = self._backend.to_device(*self._data.blocks_at(starts))  # (B, T)
        return x, y

    def blocks(self, batch_size: int, *, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of `BlockDataset.blocks`, on the device."""
        for batch in self._data.blocks(batch_size, most=most):
            x, y = self._backend.to_device(*batch)  # (B, T)
            yield x, y


class DeviceBatches:
    """Batches of a text that lies on the device.

    Args:
        data: the text; its ids are copied to the device.
        backend: the device.
    """

    def __init__(self, data: BlockDataset, backend: DeviceBackend) -> None:
        self._draw, self._block_size, self._documents = data._draw_starts, data.block_size, data.documents
        signed, self._mask = _SIGNED.get(data.row.dtype, (torch.uint8, None))
        ids = torch.empty(data.n_ids, dtype=signed, device=backend.device)  # (N,)
        for start in range(0, data.n_ids, _AT_ONCE):  # a text on disk never fills the main memory
            piece = data.ids_between(start, start + _AT_ONCE)
            ids[start : start + _AT_ONCE].copy_(piece.view(signed))
        self._row = _DeviceRow(ids, data.max_id, backend)
        self._windows_at = self._row.windows(data.block_size + 1)

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the batch of `BlockDataset.sample_batch`, on the device."""
        return self.at(self._draw(batch_size, generator))

    def at(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch of `BlockDataset.blocks_at`, on the device; `starts` (B,) are on the CPU."""
        windows = self._windows_at(starts)  # (B, T + 1)
        return self._widened(windows[:, :-1]), self._widened(windows[:, 1:])

    def blocks(self, batch_size: int, *, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of `BlockDataset.blocks`, on the device."""
        for x, y in in_order(self._row, self._block_size, batch_size, most, self._documents):
            yield self._widened(x), self._widened(y)

    def _widened(self, ids: Tensor) -> Tensor:
        """Return ids as int64, a copy."""
        return ids.long() if self._mask is None else ids.long().bitwise_and_(self._mask)


class _DeviceRow(TensorRow):
    """A row of ids on a device; windows are gathered id by id, which every device can do."""

    def __init__(self, ids: Tensor, max_id: int, backend: DeviceBackend) -> None:
        super().__init__(ids, max_id)
        self._backend = backend

    @override
    def windows(self, width: int) -> Callable[[Tensor], Tensor]:
        offsets = torch.arange(width, device=self._backend.device)  # (width,)

        def windows_at(starts: Tensor) -> Tensor:
            (starts,) = self._backend.to_device(starts)  # (B,)
            places = starts[:, None] + offsets  # (B, width)
            return self.ids.index_select(0, places.flatten()).view_as(places)

        return windows_at


Batches: TypeAlias = HostBatches | DeviceBatches


def batches_on(data: BlockDataset, backend: DeviceBackend) -> Batches:
    """Return the batches of a text on a device, made in the better of the two ways.

    Args:
        data: the text. A subclass may draw in its own way, so its batches are made on the CPU.
        backend: the device.

    Example:
        >>> from charlm.backends.cpu import CPUBackend
        >>> batches = batches_on(BlockDataset(torch.arange(10), block_size=4), CPUBackend())
        >>> x, y = batches.sample(3, torch.Generator().manual_seed(1))
        >>> x.shape, y.shape
        (torch.Size([3, 4]), torch.Size([3, 4]))
    """
    if backend.is_host or type(data) is not BlockDataset:
        return HostBatches(data, backend)
    memory = backend.memory()
    room = _UNTOLD if memory is None else memory.free // _MOST_OF_FREE
    nbytes = data.n_ids * data.row.dtype.itemsize
    return DeviceBatches(data, backend) if nbytes <= room else HostBatches(data, backend)
