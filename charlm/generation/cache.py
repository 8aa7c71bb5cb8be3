"""`Cache`: what a model has read in one generation; and `KVCache`, the keys and values of attention.

It is passed to the model as an argument; the model keeps nothing. A `KVCache` knows shapes alone, not what
attention does with them. (nanochat's `engine.py` holds its cache this way.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, final

import torch
from torch import Tensor

from charlm.errors import InputError

__all__ = ["Cache", "KVCache", "LayerCache"]


class Cache(Protocol):
    """What generation asks of a cache, whatever a model keeps in it. A `KVCache` can do both."""

    def truncate(self, length: int) -> bool:
        """Forget all but the first characters.

        Args:
            length: how many stay, at least 1 and fewer than were read.

        Returns:
            False if that cannot be done, and nothing was; all is then read again.
        """

    def fork(self, rows: Sequence[int]) -> Self | None:
        """Return a cache that holds a copy of what some rows have read; None if it cannot be copied.

        Args:
            rows: their numbers, in any order; one may be taken several times.
        """


class LayerCache:
    """Keys and values of one attention layer, in buffers that are filled from the left.

    Args:
        capacity: the most characters it will hold.

    Attributes:
        length: how many characters it holds.

    Example:
        >>> layer = LayerCache(capacity=8)
        >>> _ = layer.append(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))  # B = 1, H = 2, t = 3, D = 4
        >>> keys, values = layer.append(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
        >>> keys.shape, layer.length
        (torch.Size([1, 2, 4, 4]), 4)
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length: int = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of t new characters and return those of all characters.

        Args:
            keys: (B, H, t, D).
            values: (B, H, t, D).

        Returns:
            Keys and values of everything read so far, (B, H, length, D): views of the buffers.

        Raises:
            InputError: B is another than before.
        """
        B, H, t, D = keys.shape
        if self._keys is None or self._values is None:
            self._keys = torch.empty(B, H, self.capacity, D, dtype=keys.dtype, device=keys.device)
            self._values = torch.empty_like(self._keys)
        _check_rows(keys, self._keys)
        end = self.length + t
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def fork(self, rows: Sequence[int]) -> LayerCache:
        """Return a cache that holds a copy of what some rows have read.

        Args:
            rows: their numbers, in any order; one may be taken several times.
        """
        twin = LayerCache(self.capacity)
        if self._keys is not None and self._values is not None:
            twin.append(*(kept[list(rows), :, : self.length] for kept in (self._keys, self._values)))
        return twin


@final
class KVCache:
    """What a model has read in one generation.

    Args:
        n_layer: attention layers of the model; 0 for a model without attention.
        capacity: the most characters it will hold, usually the model's block_size.

    Attributes:
        layers: one `LayerCache` for each attention layer.
        length: how many characters have been read; the next one's position in the window.

    Example:
        >>> from charlm import GPT
        >>> model = GPT.from_config("cpu-10s", vocab_size=65).eval()
        >>> cache = model.new_cache()
        >>> with torch.no_grad():
        ...     _ = model(torch.tensor([[24, 43, 58]]), cache=cache)
        ...     logits, _ = model(torch.tensor([[5]]), cache=cache)  # after all four
        >>> logits.shape, cache.length
        (torch.Size([1, 1, 65]), 4)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # `fork` would copy what is known here, and lose the rest without a word.
        raise TypeError("KVCache has no subclasses: a cache of your own is any class with truncate and fork")

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.layers: list[LayerCache] = [LayerCache(capacity) for _ in range(n_layer)]
        self._capacity = capacity
        self.length: int = 0
        self._ids: Tensor | None = None

    def read(self, ids: Tensor) -> Tensor:
        """Keep ids (B, T) that come next, for a model that looks at earlier ones; `advance` counts them.

        Returns:
            (B, length + T), all that were read and these: a view of the buffer.

        Raises:
            InputError: B is another than before.
        """
        if self._ids is None:
            self._ids = ids.new_empty(ids.size(0), self._capacity)
        _check_rows(ids, self._ids)
        end = self.length + ids.size(1)
        self._ids[:, self.length : end] = ids
        return self._ids[:, :end]

    def advance(self, count: int) -> None:
        """Note that the model has read more characters. Models call it once per forward pass.

        Args:
            count: how many, T.
        """
        self.length += count

    def truncate(self, length: int) -> bool:
        """Forget all but the first characters.

        Args:
            length: how many stay, at most as many as were read.

        Returns:
            True.
        """
        self.length = length
        for layer in self.layers:
            layer.length = length
        return True

    def fork(self, rows: Sequence[int]) -> KVCache:
        """Return a cache that holds a copy of what some rows have read.

        Args:
            rows: their numbers, in any order; one may be taken several times.
        """
        twin = KVCache(0, self._capacity)
        twin.layers = [layer.fork(rows) for layer in self.layers]
        twin.length = self.length
        twin._ids = None if self._ids is None else self._ids[list(rows)]
        return twin


def _check_rows(new: Tensor, kept: Tensor) -> None:
    if len(new) != len(kept):
        raise InputError(f"idx must have as many rows as the cache, {len(kept)}, got {len(new)}")
