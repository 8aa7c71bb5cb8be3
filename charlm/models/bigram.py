"""`BigramLM`: the lecture's first model. The next token depends on the last one alone.

It is one table: row i holds the logits of the token after token i. It can be trained by gradient descent, as
in the lecture, or fitted at once from counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from charlm.errors import DataError, InputError, shown
from charlm.generation.cache import Cache, KVCache
from charlm.models.base import LanguageModel, cross_entropy
from charlm.models.config import BigramConfig, ModelConfig
from charlm.models.memory import check_fits
from charlm.plain import as_float

if TYPE_CHECKING:
    from charlm.data.blocks import BlockDataset

__all__ = ["BigramLM"]

_AT_ONCE = 2**22  # pairs that are counted together


class BigramLM(LanguageModel):
    """A table of logits (V, V), drawn from N(0, 1) with torch's global generator, as in the lecture.

    Args:
        vocab_size: V, the number of different ids.

    Raises:
        ConfigError: `vocab_size` is no positive int.
        NotEnoughMemoryError: the table does not fit into the memory.

    Example:
        >>> _ = torch.manual_seed(1337)
        >>> model = BigramLM(65)
        >>> logits, loss = model(torch.zeros(4, 8, dtype=torch.long))
        >>> logits.shape, loss
        (torch.Size([4, 8, 65]), None)
    """

    kind: ClassVar[str] = "bigram"
    config_class: ClassVar[type[ModelConfig]] = BigramConfig
    config: BigramConfig
    token_embedding_table: nn.Embedding

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.config = BigramConfig(vocab_size=vocab_size)
        check_fits(self.config)
        V = self.config.vocab_size
        self.token_embedding_table = nn.Embedding(V, V)

    @override
    @classmethod
    def from_config(cls, config: BigramConfig | Mapping[str, object]) -> Self:
        """Build a new model from its settings.

        Args:
            config: a `BigramConfig`, or a mapping of its fields.

        Raises:
            ConfigError: a field is unknown, missing or bad.
        """
        if not isinstance(config, BigramConfig):
            config = BigramConfig.from_dict(config)
        return cls(config.vocab_size)

    @override
    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self._check_idx(idx, targets)
        logits = self.token_embedding_table(idx)  # (B, T, V)
        if isinstance(cache, KVCache):
            cache.advance(idx.size(1))
        return logits, None if targets is None else cross_entropy(logits, targets)

    @override
    def new_cache(self) -> KVCache:
        """Return a cache without layers, since nothing but the last id counts."""
        return KVCache(n_layer=0, capacity=0)

    def fit(self, data: BlockDataset, *, smoothing: float = 0.5) -> Self:
        """Set the table from counts of pairs of tokens: the best bigram model, without gradients.

        Row i becomes log((count(i, j) + s) / (count(i) + s V)), which is additive smoothing (Lidstone 1920).

        Args:
            data: the ids to count; its block_size has no effect.
            smoothing: s, added to each count. 0 is exact maximum likelihood: a pair that never occurs gets
                -inf, and a text with such a pair has an infinite loss. The row of an id that never occurs
                becomes uniform.

        Returns:
            The model itself.

        Raises:
            DataError: the data holds an id of V or more.
            InputError: `smoothing` is negative or not finite.

        Example:
            >>> from charlm import BlockDataset
            >>> data = BlockDataset(torch.tensor([0, 1, 1, 0, 1, 1]), block_size=2)
            >>> model = BigramLM(2).fit(data, smoothing=0)
            >>> logits, _ = model(torch.tensor([[0, 1]]))
            >>> logits.detach().softmax(dim=-1)  # 0 is always followed by 1, and 1 by either
            tensor([[[0.0000, 1.0000],
                     [0.3333, 0.6667]]])
        """
        added = as_float(smoothing)
        if added is None or not 0 <= added < 1e300:
            raise InputError(f"smoothing must be a finite number, 0 or more, got {shown(smoothing)}")
        V = self.vocab_size
        if data.max_id >= V:
            raise DataError(f"the data holds the id {data.max_id}, but vocab_size is {V}")
        pairs = np.zeros(V * V, dtype=np.int64)
        for start in range(0, data.n_ids - 1, _AT_ONCE):  # a text on disk is read in parts
            ids = data.ids_between(start, start + _AT_ONCE + 1).numpy().astype(np.int64)
            pairs += np.bincount(ids[:-1] * V + ids[1:], minlength=V * V)
        counts = pairs.reshape(V, V) + added
        counts[counts.sum(axis=1) == 0] = 1.0
        with np.errstate(divide="ignore"):
            log_probs = np.log(counts) - np.log(counts.sum(axis=1, keepdims=True))  # (V, V)
        with torch.no_grad():
            self.token_embedding_table.weight.copy_(torch.from_numpy(log_probs))
        return self
