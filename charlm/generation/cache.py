"""`Cache`: the state of a model after the ids that it has read; `KVCache` holds keys and values of attention.

A cache is passed to the model as an argument, so the model itself has no state, as in nanochat's `engine.py`.
A `KVCache` knows shapes alone, not what attention computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, final

import torch
from torch import Tensor

from charlm.errors import InputError

__all__ = ["Cache", "KVCache", "LayerCache"]


class Cache(Protocol):
    """The two methods that generation needs of a cache."""

    def truncate(self, length: int) -> bool:
        """Forget all but the first tokens.

        Args:
            length: the number of tokens that stay, at least 1 and fewer than were read.

        Returns:
            False if this is impossible and nothing was changed; the tokens are then read again.
        """

    def fork(self, rows: Sequence[int]) -> Self | None:
        """Return a copy of the cache for some rows, or None if it cannot be copied.

        Args:
            rows: numbers of rows in any order; a number may occur several times.
        """


class LayerCache:
    """Keys and values of one attention layer, in buffers that are filled from the left.

    Args:
        capacity: the most tokens that it can hold.

    Attributes:
        length: the number of tokens that it holds.

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
        """Add the keys and values of t new tokens and return those of all tokens.

        Args:
            keys: (B, H, t, D).
            values: (B, H, t, D).

        Returns:
            Keys and values of all tokens so far, (B, H, length, D): views of the buffers.

        Raises:
            InputError: B differs from before.
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
        """Return a copy for some rows; see `Cache.fork`."""
        twin = LayerCache(self.capacity)
        if self._keys is not None and self._values is not None:
            twin.append(*(kept[list(rows), :, : self.length] for kept in (self._keys, self._values)))
        return twin


@final
class KVCache:
    """The keys and values of all attention layers of a model.

    Args:
        n_layer: the number of attention layers; 0 for a model without attention.
        capacity: the most tokens that it can hold, usually the model's block_size.

    Attributes:
        layers: one `LayerCache` for each attention layer.
        length: the number of tokens that were read, which is the position of the next one in the window.

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
        # `fork` would silently lose the attributes of a subclass.
        raise TypeError("KVCache has no subclasses: a cache of your own is any class with truncate and fork")

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.layers: list[LayerCache] = [LayerCache(capacity) for _ in range(n_layer)]
        self._capacity = capacity
        self.length: int = 0
        self._ids: Tensor | None = None

    def read(self, ids: Tensor) -> Tensor:
        """Store the next ids (B, T), for a model that looks at earlier ids; `advance` counts them.

        Returns:
            (B, length + T), all ids so far, these included: a view of the buffer.

        Raises:
            InputError: B differs from before.
        """
        if self._ids is None:
            self._ids = ids.new_empty(ids.size(0), self._capacity)
        _check_rows(ids, self._ids)
        end = self.length + ids.size(1)
        self._ids[:, self.length : end] = ids
        return self._ids[:, :end]

    def advance(self, count: int) -> None:
        """Count T tokens as read. A model calls this once per forward pass.

        Args:
            count: T.
        """
        self.length += count

    def truncate(self, length: int) -> bool:
        """Forget all but the first `length` tokens, and return True."""
        self.length = length
        for layer in self.layers:
            layer.length = length
        return True

    def fork(self, rows: Sequence[int]) -> KVCache:
        """Return a copy for some rows; see `Cache.fork`."""
        twin = KVCache(0, self._capacity)
        twin.layers = [layer.fork(rows) for layer in self.layers]
        twin.length = self.length
        twin._ids = None if self._ids is None else self._ids[list(rows)]
        return twin


def _check_rows(new: Tensor, kept: Tensor) -> None:
    if len(new) != len(kept):
        raise InputError(f"idx must have as many rows as the cache, {len(kept)}, got {len(new)}")
