"""A row of ids in memory or on disk, from which a `BlockDataset` cuts its blocks.

`TensorRow` holds a tensor; a batch is one gather from a view of all its windows. `StoredRow` holds ranges of
a prepared corpus and reads ids when they are needed; a part of it has other ranges, without a copy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from charlm.data.documents import Documents
from charlm.data.prepared import PreparedCorpus
from charlm.errors import CorpusError, DataError, InputError, quoted
from charlm.plain import int_from

__all__ = ["PREPARED", "Row", "StoredRow", "TensorRow", "in_order", "row_of"]

PREPARED = "prepared:"
"""The fingerprint of a text on disk begins with this."""


class Row(Protocol):
    """N ids, the smallest unsigned integer type that holds them, and the largest possible id."""

    dtype: torch.dtype
    max_id: int

    def __len__(self) -> int:
        """Return N."""
        ...

    def between(self, start: int, stop: int) -> Tensor:
        """Return the ids from `start` to `stop`, of `dtype`: a view of memory, or a copy from disk."""
        ...

    def windows(self, width: int) -> Callable[[Tensor], Tensor]:
        """Return a function from starts (B,) int64 to the ids (B, width) that begin there, a copy."""
        ...

    def parts(self, ranges: Sequence[range]) -> Row:
        """Return the row of the ids in some ranges, which are in order and do not overlap."""
        ...


class TensorRow:
    """A row of ids in memory.

    Args:
        ids: (N,) of their smallest type, on the CPU.
        max_id: the largest id.
    """

    ids: Tensor
    max_id: int
    dtype: torch.dtype

    def __init__(self, ids: Tensor, max_id: int) -> None:
        self.ids, self.max_id, self.dtype = ids, max_id, ids.dtype

    def __len__(self) -> int:
        """Return N."""
        return len(self.ids)

    def between(self, start: int, stop: int) -> Tensor:
        """Return a view of the ids from `start` to `stop`."""
        return self.ids[start:stop]

    def windows(self, width: int) -> Callable[[Tensor], Tensor]:
        """Return a function from starts (B,) to windows (B, width)."""
        # index_select, not view[starts]: on this view it is several hundred times faster.
        return partial(torch.index_select, self.ids.unfold(0, width, 1), 0)

    def parts(self, ranges: Sequence[range]) -> TensorRow:
        """Return a view of one range, or a copy of several joined together."""
        pieces = [self.ids[part.start : part.stop] for part in ranges]
        return row_of(pieces[0] if len(pieces) == 1 else torch.cat(pieces))


class StoredRow:
    """A row of ids in a prepared corpus.

    Args:
        corpus: the corpus.
        ranges: the ranges of its ids that belong to the row, in order. None: all.
    """

    corpus: PreparedCorpus
    ranges: tuple[range, ...]
    max_id: int
    dtype: torch.dtype

    def __init__(self, corpus: PreparedCorpus, ranges: Sequence[range] | None = None) -> None:
        self.corpus = corpus
        self.max_id = corpus.index.max_id
        self.dtype = _torch_type(corpus.dtype)
        self.ranges = tuple(part for part in (ranges or [range(corpus.index.n_ids)]) if len(part))
        self._ends = [0, *accumulate(len(part) for part in self.ranges)]

    def __len__(self) -> int:
        """Return N."""
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """A hash that identifies the ids. It follows from the hashes of the files, without reading them."""
        return f"{PREPARED}{self.corpus.fingerprint(self.ranges)}"

    def between(self, start: int, stop: int) -> Tensor:
        """Read the ids from `start` to `stop`."""
        ids = np.empty(max(0, min(stop, len(self)) - start), self.corpus.dtype)
        self._read_into(ids, start)
        return _tensor(ids)

    def windows(self, width: int) -> Callable[[Tensor], Tensor]:
        """Return a function from starts (B,) to windows (B, width), which reads from disk."""
        return partial(self._windows, width)

    def _windows(self, width: int, starts: Tensor) -> Tensor:
        ids = np.empty((len(starts), width), self.corpus.dtype)
        for window, start in zip(ids, starts.tolist(), strict=True):
            if not 0 <= start <= len(self) - width:
                raise IndexError(f"start {start} is out of range for {len(self) - width + 1} blocks")
            self._read_into(window, start)
        return _tensor(ids)

    def _read_into(self, ids: NDArray[Any], start: int) -> None:
        number, done = bisect_right(self._ends, start) - 1, 0
        while done < len(ids):
            part, inside = self.ranges[number], start + done - self._ends[number]
            taken = min(len(ids) - done, len(part) - inside)
            self.corpus.read_into(ids[done : done + taken], part.start + inside)
            done, number = done + taken, number + 1

    def parts(self, ranges: Sequence[range]) -> StoredRow:
        """Return the row of some ranges, without a copy."""
        pieces = []
        for one in ranges:
            for begin, part in zip(self._ends, self.ranges, strict=False):
                start, stop = max(one.start - begin, 0), min(one.stop - begin, len(part))
                if start < stop:
                    pieces.append(range(part.start + start, part.start + stop))
        return StoredRow(self.corpus, pieces)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        places = [(part.start, part.stop) for part in self.ranges]
        return _reopened, (str(self.corpus.path), self.corpus.index_sha256, places)


def _reopened(path: str, index_sha256: str, places: Sequence[tuple[int, int]]) -> StoredRow:
    corpus = PreparedCorpus(Path(path))
    if corpus.index_sha256 != index_sha256:
        raise CorpusError(f"{quoted(path)} holds another prepared corpus than before")
    return StoredRow(corpus, [range(*place) for place in places])


def row_of(ids: Tensor | NDArray[Any]) -> TensorRow:
    """Return the row of some ids in the smallest unsigned type that holds them.

    Ids of that type are shared, not copied, even from a read-only array.

    Raises:
        DataError: an id is negative or too large.
        InputError: they are no row of integers.
    """
    if not isinstance(ids, Tensor | np.ndarray):
        raise InputError(f"ids must be a tensor or an array, got {type(ids).__name__}")
    if ids.ndim != 1 or not _is_integer(ids.dtype):
        raise InputError(f"ids must be one row of integers, got shape {tuple(ids.shape)} of {ids.dtype}")
    if isinstance(ids, Tensor) and ids.is_meta:
        raise InputError("ids must hold data, got a tensor on the meta device")
    array = ids.cpu().numpy() if isinstance(ids, Tensor) else ids
    if len(array) == 0:
        return TensorRow(torch.empty(0, dtype=torch.uint8, device="cpu"), 0)
    low, high = int(array.min()), int(array.max())
    if low < 0:
        raise DataError(f"ids must not be negative, got {low} at position {int(array.argmin())}")
    dtype = np.min_scalar_type(high)
    if dtype == np.uint64:
        raise DataError(f"ids must be below 2**32, got {high}")
    array = np.ascontiguousarray(array, dtype=dtype)
    # torch shares memory only with writable arrays; nothing here writes
    return TensorRow(torch.from_numpy(array if array.flags.writeable else np.asarray(_Lent(array))), high)


def in_order(
    row: Row,
    block_size: int,
    batch_size: int,
    most: int | None = None,
    documents: Documents | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets as `BlockDataset.blocks` does, of the row's own type and on its device."""
    B, N, T = int_from(1, batch_size, "batch_size"), len(row), block_size
    most = None if most is None else int_from(1, most, "most")
    if documents is not None:
        for length, begins in documents.windows(T, most):
            windows_at = row.windows(length + 1)
            for i in range(0, len(begins), B):
                windows = windows_at(torch.from_numpy(begins[i : i + B]))  # (B, length + 1)
                yield windows[:, :-1], windows[:, 1:]
        return
    full = (N - 1) // T
    if most is not None and most < full:
        windows_at, chosen = row.windows(T + 1), torch.arange(most, device="cpu") * full // most  # (most,)
        for i in range(0, most, B):
            windows = windows_at(chosen[i : i + B] * T)  # (B, T + 1)
            yield windows[:, :-1], windows[:, 1:]
        return
    for i in range(0, full, B):
        last = min(i + B, full)
        ids = row.between(i * T, last * T + 1)  # (B T + 1,)
        yield ids[:-1].view(last - i, T), ids[1:].view(last - i, T)
    if most is None and full * T < N - 1:
        ids = row.between(full * T, N)
        yield ids[None, :-1], ids[None, 1:]


class _Lent:
    """The memory of a read-only array, declared as writable."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array  # lives as long as this object, which numpy keeps
        description = array.__array_interface__
        self.__array_interface__ = {**description, "data": (description["data"][0], False)}


def _is_integer(dtype: torch.dtype | np.dtype[Any]) -> bool:
    if isinstance(dtype, np.dtype):
        return np.issubdtype(dtype, np.integer)
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _torch_type(dtype: np.dtype[Any]) -> torch.dtype:
    kinds = {"uint8": torch.uint8, "uint16": torch.uint16, "uint32": torch.uint32}
    return kinds[dtype.newbyteorder("=").name]


def _tensor(ids: NDArray[Any]) -> Tensor:
    return torch.from_numpy(ids.astype(ids.dtype.newbyteorder("="), copy=False))
