"""`NGramLM`: predicts the next token from counts of n-grams, without gradients.

The counts are smoothed by interpolated Kneser-Ney with three discounts for each length (Chen and Goodman, "An
empirical study of smoothing techniques for language modeling", 1998). The discounts are fitted on the end of
the training text, not taken from the closed formula. For each length, the model also mixes in what followed
the same context in the last few thousand tokens: a cache in the sense of language modelling (Kuhn and De
Mori, "A cache-based natural language model for speech recognition", 1990). `charlm.models.ngram_counts`
counts; this module computes probabilities. Every look-up is a bisection, for all positions at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from charlm.errors import DataError, InputError
from charlm.generation.cache import Cache
from charlm.generation.engine import Engine
from charlm.models.base import LanguageModel, cross_entropy
from charlm.models.config import ModelConfig, NGramConfig
from charlm.models.ngram_counts import count_ngrams
from charlm.models.ngram_discounts import Evidence, fit_discounts
from charlm.models.ngram_window import Repeats, Window, spans
from charlm.native.ngram import ngram_engine, why_not_ngram

if TYPE_CHECKING:
    from charlm.data.blocks import BlockDataset

__all__ = ["NGramLM"]

_HELD_OUT = 0.1, 100_000  # part of the training text for the discounts: a share, and the most tokens
_SCORED = 16_384  # the most positions of this part that are scored
_PIECE = 1_024  # tokens of this part after which the window begins anew, as in a short text
_PLAIN_DISCOUNTS = [0.5, 1.0, 1.5]
_ROWS = 4_096  # the most positions whose followers are looked up at once
_NUMBERS = 2**24  # the most probabilities of these positions


class _LastIds:
    """A cache of the ids on which the next prediction depends."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None

    def truncate(self, length: int) -> bool:
        return False  # earlier ids are not stored

    def fork(self, rows: Sequence[int]) -> _LastIds:
        twin = _LastIds()
        twin.ids = None if self.ids is None else self.ids[list(rows)]
        return twin


class NGramLM(LanguageModel):
    """Smoothed counts of all n-grams up to some order; the distribution is uniform until it is fitted.

    The tables are buffers, not parameters. `codes` (M,) int64 and `counts` (M,) int32 describe the M
    different n-grams as in `count_ngrams`, with 12 bytes each. `discounts` (order, 3) are subtracted from
    counts of 1, of 2, and of 3 or more, for each length. `window_shares` (11, 3) are the shares that are
    taken from the counts in the window, for each length from 1; a model without a window has none.

    Args:
        vocab_size: V, the number of different ids.
        order: length of the longest n-grams, 1 to 32; each token is predicted from the order - 1 before it.
        window: the number of tokens before a position, its context included, in which earlier occurrences
            of the context are looked for, up to 65,536; 0: use the counts of the training text alone.

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> from charlm import BlockDataset, CharTokenizer
        >>> tokenizer = CharTokenizer("abn")
        >>> model = NGramLM(3, order=3).fit(BlockDataset.from_text("banana" * 9, tokenizer, block_size=8))
        >>> tokenizer.decode(model.generate(torch.tensor([[1]]), 5, temperature=0)[0])
        'banana'
    """

    kind: ClassVar[str] = "ngram"
    config_class: ClassVar[type[ModelConfig]] = NGramConfig
    config: NGramConfig
    codes: Tensor
    counts: Tensor
    discounts: Tensor
    window_shares: Tensor

    def __init__(self, vocab_size: int, order: int = 7, window: int = 4_096) -> None:
        super().__init__()
        self._allocate(NGramConfig(vocab_size=vocab_size, order=order, window=window))

    @override
    @classmethod
    def from_config(cls, config: NGramConfig | Mapping[str, object]) -> Self:
        """Build a model with room for `n_ngrams`; it is uniform until its tables are filled.

        Args:
            config: a `NGramConfig`, or a mapping of its fields.

        Raises:
            ConfigError: a field is unknown, missing or bad.
        """
        if not isinstance(config, NGramConfig):
            config = NGramConfig.from_dict(config)
        model = cls(config.vocab_size, config.order, config.window)
        model._allocate(config)
        return model

    def _allocate(self, config: NGramConfig) -> None:
        self.config = config
        self.register_buffer("codes", torch.full((config.n_ngrams,), -1))  # no look-up succeeds
        self.register_buffer("counts", torch.zeros(config.n_ngrams, dtype=torch.int32))
        self.register_buffer("discounts", torch.tensor(_PLAIN_DISCOUNTS).repeat(config.order, 1))
        shares = torch.ones(config.window_lengths, 3)  # the window has no effect
        self.register_buffer("window_shares", shares, persistent=len(shares) > 0)

    @property
    def order(self) -> int:
        """Length of the longest n-grams."""
        return self.config.order

    @override
    def num_parameters(self) -> int:
        """Return the number of numbers in the tables: two for each n-gram, and the discounts."""
        tables = (self.codes, self.counts, self.discounts, self.window_shares)
        return sum(table.numel() for table in tables)

    @override
    def new_cache(self) -> Cache:
        """Return a cache of the ids on which the next prediction depends, except the last one."""
        return _LastIds()

    @override
    def why_not_native(self) -> str | None:
        return why_not_ngram(self) if type(self) is NGramLM else super().why_not_native()

    @override
    def _native_engine(self, rows: int) -> Engine | None:
        return ngram_engine(self, rows) if type(self) is NGramLM else None

    @override
    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the next id after each id; the logits are log-probabilities.

        See `LanguageModel.forward`. A position with fewer than order - 1 ids before it, in `idx` and the
        cache, is predicted from these.
        """
        self._check_idx(idx, targets)
        self._check_range("idx", idx, lowest=0)
        B, T = idx.shape
        context = idx
        if cache is not None:
            context = self._with_cached(idx, cache)  # (B, S), S at least T
        S = context.size(1)
        nodes = [node[:, -T:].flatten() for node in self._contexts(context)]  # order - 1 of (B T,)
        start = self._uniform()  # (1, V)
        self._mix(start, torch.zeros(1, dtype=torch.int64, device=idx.device), 0)
        window = self._window(context)
        ends = torch.arange(B * S, device=idx.device).view(B, S)[:, -T:].flatten()  # (B T,)
        logits = start.new_empty(B * T, self.vocab_size)
        for some in self._some(B * T):
            out = logits[some]  # (R, V)
            out.copy_(start)
            repeats = window.repeats(ends[some]) if window else ()
            for length, (node, seen) in enumerate(zip_longest(nodes, repeats), 1):
                if node is not None:
                    self._mix(out, node[some], length)
                if seen is not None:
                    self._mix_window(out, seen, length)
            # No probability is zero, but the product of many discounts may underflow.
            out.clamp_(min=torch.finfo(out.dtype).tiny).log_()
        logits = logits.view(B, T, self.vocab_size)
        return logits, None if targets is None else cross_entropy(logits, targets)

    def fit(self, data: BlockDataset) -> Self:
        """Count the n-grams of a text; earlier counts are replaced.

        The discounts are fitted first: the end of the text (a tenth, at most 100,000 tokens) is predicted
        from the counts of the rest and from the window, in pieces of 1,024 tokens. Then the whole text is
        counted. No random number is drawn: the same text gives the same model (on the same build and number
        of threads).

        Memory: the model takes 12 bytes per different n-gram, of which a text of N tokens has at most
        `order` N (English, order 7: about one per character). Counting takes about 70 bytes per token and 40
        per n-gram.

        Args:
            data: the ids to count; its block_size has no effect.

        Returns:
            The model itself.

        Raises:
            DataError: the data holds an id that is not below `vocab_size`.
        """
        V = self.vocab_size
        if data.max_id >= V:
            raise DataError(f"the data holds the id {data.max_id}, but vocab_size is {V}")
        ids = data.ids.numpy()  # (N,)
        N = len(ids)
        held_out = min(int(_HELD_OUT[0] * N), _HELD_OUT[1])
        window = self.config.window
        fresh = NGramLM(V, self.order, window)
        discounts, shares = fresh.discounts.cpu(), fresh.window_shares.cpu()
        if held_out:
            beginning = fresh.to(self.device)
            beginning._store(ids[: N - held_out], beginning.discounts, beginning.window_shares)
            row = torch.from_numpy(ids[max(N - held_out - self.order, 0) :].astype(np.int64))
            evidence = beginning._evidence(row.to(self.device), held_out)
            fitted = torch.from_numpy(fit_discounts(evidence, V))
            is_share = torch.tensor([seen.shares for seen in evidence], device="cpu")
            discounts = fitted[~is_share]
            shares = fitted[is_share]
        self._store(ids, discounts.to(self.discounts), shares.to(self.window_shares))
        return self

    @override
    def _check_values(self) -> None:
        """Raise InputError unless `fit` could have made the codes, counts and discounts."""
        M, V = len(self.codes), self.vocab_size
        if (self.codes[:1] < 0).any() or (self.codes[1:] <= self.codes[:-1]).any():
            raise InputError("codes must increase, from 0 or more.")
        end = 0  # the last node of one length
        for _ in range(self.order):
            end = int(torch.searchsorted(self.codes, (end + 1) * V))
        if end != M:
            raise InputError(
                f"codes must be those of n-grams of at most {self.order} ids with their beginnings."
            )
        if (self.counts < 1).any():
            raise InputError("counts must be 1 or more.")
        limits = torch.arange(1, 4, device=self.discounts.device)
        if not ((self.discounts > 0) & (self.discounts < limits)).all():
            raise InputError(
                "discounts must be above 0 and below the counts that they are taken from, 1, 2, 3."
            )
        if not ((self.window_shares > 0) & (self.window_shares <= 1)).all():
            raise InputError("window_shares must be above 0 and at most 1.")

    def _store(
        self, ids: np.ndarray[tuple[int], np.dtype[np.unsignedinteger]], discounts: Tensor, shares: Tensor
    ) -> None:
        """Count, and then replace all tables at once: if memory runs out, none has changed."""
        device = self.codes.device
        counted = count_ngrams(ids, self.vocab_size, self.order)
        codes = torch.from_numpy(counted[0]).to(device)
        counts = torch.from_numpy(counted[1].astype(np.int32)).to(device)
        self.codes, self.counts, self.discounts, self.window_shares = codes, counts, discounts, shares
        self.config = self.config.replace(n_ngrams=len(codes))

    def _with_cached(self, idx: Tensor, cache: Cache) -> Tensor:
        if not isinstance(cache, _LastIds):
            raise InputError(f"cache must be from new_cache(), got a {type(cache).__name__}")
        context = idx
        if cache.ids is not None:
            if cache.ids.size(0) != idx.size(0):
                raise InputError(
                    f"idx must have as many rows as the cache, {cache.ids.size(0)}, got {idx.size(0)}"
                )
            context = torch.cat([cache.ids, idx], dim=1)
        kept = max(self.order - 2, self.config.window - 1)
        cache.ids = context[:, max(context.size(1) - kept, 0) :]
        return context

    def _window(self, texts: Tensor) -> Window | None:
        size = self.config.window
        return Window(texts, self.vocab_size, size) if size else None

    def _some(self, positions: int) -> list[slice]:
        """Return slices of positions that are processed together."""
        step = max(1, min(_ROWS, _NUMBERS // self.vocab_size))
        return [slice(at, at + step) for at in range(0, positions, step)]

    def _uniform(self) -> Tensor:
        dtype = torch.promote_types(self.discounts.dtype, torch.float32)
        V = self.vocab_size
        return torch.full((1, V), 1 / V, dtype=dtype, device=self.discounts.device)

    def _children(self, nodes: Tensor, ids: Tensor) -> Tensor:
        """Return the node of each n-gram extended by an id, or M + 1, which has no children."""
        M = len(self.codes)
        if M == 0:
            return torch.ones_like(nodes)
        codes = nodes * self.vocab_size + ids
        at = torch.searchsorted(self.codes, codes).clamp_(max=M - 1)
        return torch.where(self.codes[at] == codes, at + 1, M + 1)

    def _contexts(self, idx: Tensor) -> list[Tensor]:
        """Return the nodes (B, T) of the contexts that end at each place, for each length below `order`."""
        nodes: list[Tensor] = []
        for length in range(1, self.order):
            before = torch.zeros_like(idx)
            if length > 1:
                before[:, 0] = len(self.codes) + 1
                before[:, 1:] = nodes[-1][:, :-1]
            nodes.append(self._children(before, idx))
        return nodes

    def _followers(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return row, id and count of all followers of R contexts, (F,) each."""
        first = torch.searchsorted(self.codes, nodes * self.vocab_size)  # (R,)
        number = torch.searchsorted(self.codes, (nodes + 1) * self.vocab_size) - first  # (R,)
        rows, place = spans(first, number)  # (F,)
        ids = self.codes[place] - nodes[rows] * self.vocab_size
        return rows, ids, self.counts[place].long()

    @staticmethod
    def _sums(rows: Tensor, counts: Tensor, R: int) -> tuple[Tensor, Tensor]:
        """Return the sum of the counts of each context (R,), and the number of 1, 2 and more (R, 3)."""
        total = counts.new_zeros(R).index_add_(0, rows, counts)
        kinds = counts.new_zeros(3 * R)
        kinds.index_add_(0, 3 * rows + counts.clamp(max=3) - 1, torch.ones_like(counts))
        return total, kinds.view(R, 3)

    def _mix(self, p: Tensor, nodes: Tensor, length: int) -> None:
        """Mix the counts behind longer contexts, the nodes (R,), into probabilities p (R, V).

        The discounts take a mass from the counts; p distributes it. If a context never occurred, p stays.
        """
        rows, ids, counts = self._followers(nodes)
        total, kinds = self._sums(rows, counts, len(nodes))
        discounts = self.discounts[length].to(p.dtype)  # (3,)
        taken = (kinds * discounts).sum(dim=1) / total.clamp(min=1)  # (R,)
        p *= torch.where(total > 0, taken, 1)[:, None]
        p.view(-1)[rows * self.vocab_size + ids] += (counts - discounts[counts.clamp(max=3) - 1]) / total[
            rows
        ]

    def _mix_window(self, p: Tensor, seen: Repeats, length: int) -> None:
        """Mix the ids that followed the last `length` ids in the window into probabilities p (R, V)."""
        shares = self.window_shares[length - 1].to(p.dtype)  # (3,)
        rows = seen.total.nonzero()[:, 0]
        p[rows] *= ((seen.kinds[rows] * shares).sum(dim=1) / seen.total[rows])[:, None]
        left = seen.counts * (1 - shares[seen.counts.clamp(max=3) - 1]) / seen.total[seen.rows]
        # An id that followed at several places occurs several times here, always with the same value.
        p.view(-1)[seen.rows * self.vocab_size + seen.ids] += left

    def _evidence(self, ids: Tensor, held_out: int) -> list[Evidence]:
        """Look up the counts behind some of the last `held_out` ids of a row (S,), in the order of mixing."""
        S = len(ids)
        chosen = torch.arange(S - 1 - held_out, S - 1, -(-held_out // _SCORED), device=ids.device)  # (H,)
        nexts = ids[chosen + 1]
        counted = []
        for nodes in (
            torch.zeros_like(chosen),
            *(nodes[0, chosen] for nodes in self._contexts(ids[None, :-1])),
        ):
            different, which = torch.unique(nodes, return_inverse=True)
            rows, _, counts = self._followers(different)
            total, kinds = self._sums(rows, counts, len(different))
            count = F.pad(self.counts, (0, 1))[self._children(nodes, nexts) - 1]  # (H,)
            counted.append(
                Evidence(count.cpu().numpy(), total[which].cpu().numpy(), kinds[which].cpu().numpy())
            )
        repeated = self._repeated(ids, chosen, nexts)
        return [seen for pair in zip_longest(counted, [None, *repeated]) for seen in pair if seen is not None]

    def _repeated(self, ids: Tensor, chosen: Tensor, nexts: Tensor) -> list[Evidence]:
        """Return the counts in the window, for each length that occurred in it."""
        pieces = F.pad(ids, (0, -len(ids) % _PIECE)).view(-1, _PIECE)
        window, H = self._window(pieces), len(chosen)
        if window is None:
            return []
        table = np.zeros((self.config.window_lengths, H, 5), dtype=np.int64)
        for some in self._some(H):
            for length, seen in enumerate(window.repeats(chosen[some])):
                right = seen.ids == nexts[some][seen.rows]
                count = torch.zeros_like(seen.total).index_add_(0, seen.rows, right.long())
                columns = torch.cat([count[:, None], seen.total[:, None], seen.kinds], dim=1)
                table[length, some] = columns.cpu().numpy()
        return [Evidence(one[:, 0], one[:, 1], one[:, 2:], shares=True) for one in table]
