"""A model of a user's own: recurrent, with a cache of its own kind that nobody can copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from charlm.errors import InputError
from charlm.generation import Cache
from charlm.models.base import LanguageModel, cross_entropy
from charlm.models.config import ModelConfig

__all__ = ["HiddenCache", "Recurrent"]


class HiddenCache:
    """Keeps the hidden state (B, C), which can be neither copied nor taken back."""

    def __init__(self) -> None:
        self.length = 0
        self.hidden: Tensor | None = None

    def truncate(self, length: int) -> bool:
        return False

    def fork(self, rows: Sequence[int]) -> None:
        return None


class Recurrent(LanguageModel):
    """h = tanh(A h + E[id]), logits = W h: each id read by itself, one row at a time.

    So a row's numbers depend on the row alone, to the last bit.

    Args:
        vocab_size: V.
        block_size: the most ids at once, or None.
        keeps_cache: whether it has a cache at all.
        seed: of the weights.
    """

    def __init__(self, vocab_size: int, block_size: int | None, *, keeps_cache: bool, seed: int = 0) -> None:
        super().__init__()
        self.config = ModelConfig(vocab_size=vocab_size)
        self._window = block_size
        self.keeps_cache = keeps_cache
        self.read = 0  # ids, in all
        generator = torch.Generator().manual_seed(seed)
        C = 6

        def noise(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.turn, self.embedding, self.out = noise(C, C), noise(vocab_size, C), noise(C, vocab_size)

    @override
    @classmethod
    def from_config(cls, config: ModelConfig | Mapping[str, Any]) -> Self:
        raise NotImplementedError

    @property
    @override
    def block_size(self) -> int | None:
        return self._window

    @override
    def new_cache(self) -> HiddenCache | None:
        return HiddenCache() if self.keeps_cache else None

    @override
    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self._check_idx(idx, targets)
        self._check_range("idx", idx, lowest=0)
        B, T = idx.shape
        start = cache.length if isinstance(cache, HiddenCache) else 0
        if self._window is not None and start + T > self._window:
            raise InputError(f"idx must have at most {self._window} ids a row, got {start + T}")
        kept = cache.hidden if isinstance(cache, HiddenCache) else None  # (B, C)
        rows, last = [], []
        for b in range(B):
            h = self.turn.new_zeros(len(self.turn)) if kept is None else kept[b]  # (C,)
            logits = []
            for t in range(T):
                h = torch.tanh(0.5 * self.turn.mv(h) + self.embedding[idx[b, t]])
                logits.append(h @ self.out)
            rows.append(torch.stack(logits))
            last.append(h)
        self.read += B * T
        if isinstance(cache, HiddenCache):
            cache.hidden = torch.stack(last)
            cache.length += T
        out = torch.stack(rows)  # (B, T, V)
        return out, None if targets is None else cross_entropy(out, targets)
