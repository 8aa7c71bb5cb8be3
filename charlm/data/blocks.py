"""`BlockDataset`: a long row of ids, cut into blocks of tokens whose targets are the next tokens.

It knows ids alone: no text (beyond `from_text`), no models, no devices. As in the lecture, a block that
starts at `s` has the input `ids[s : s+T]` and the target `ids[s+1 : s+T+1]`. Every start is a valid item, so
there are N - T items, which overlap. The ids stay in the smallest integer type, in memory or on disk
(`charlm.data.rows`), and are copied or read only when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from charlm.data.documents import Documents
from charlm.data.prepared import PreparedCorpus
from charlm.data.rows import Row, StoredRow, TensorRow, in_order, row_of
from charlm.errors import DataError, InputError, shown
from charlm.plain import as_float, int_from, share_of
from charlm.text.tokenizer import OnUnknown, Tokenizer, Unit, unit_of

__all__ = ["BlockDataset"]

_PIECE, _MOST_PIECES = 4_096, 20  # of `set_aside`: ids in a piece, and the most pieces


class BlockDataset(Dataset[tuple[Tensor, Tensor]]):
    """Blocks of `block_size` tokens with their targets, which lie one token to the right.

    This is a map-style dataset: `DataLoader` takes it as it is, with any number of workers. A text that is
    larger than memory stays on disk: see `open`.

    Args:
        ids: (N,) integers, N > block_size; a tensor, an array, or a row of `charlm.data.rows`. They are
            stored on the CPU in the smallest unsigned type that holds them. Ids of that type are shared, not
            copied, so do not change them afterwards.
        block_size: T, tokens in a block.
        tokenizer: the tokenizer that made the ids, if it is known. A `Trainer` refuses data of another
            tokenizer than its own. Nothing is encoded or decoded here.
        documents: the borders of the documents, as `from_texts` makes them; None: the ids are one text.

    Raises:
        DataError: the text is too short for a single block with its targets, or an id is negative.
        InputError: the ids are no row of integers, `block_size` is no int of 1 or more, or the documents do
            not end where the ids end.

    Example:
        >>> data = BlockDataset(torch.arange(10), block_size=4)
        >>> x, y = data[2]
        >>> x.tolist(), y.tolist()
        ([2, 3, 4, 5], [3, 4, 5, 6])
        >>> len(data)
        6
    """

    row: Row
    max_id: int
    tokenizer: Tokenizer | None = None
    documents: Documents | None = None
    """The documents, whose borders no block crosses; None: the ids are one text."""
    _cut: int | None = None  # the first id for validation, if a prepared corpus names it

    def __init__(
        self,
        ids: Tensor | NDArray[Any] | Row,
        block_size: int,
        *,
        tokenizer: Tokenizer | None = None,
        documents: Documents | None = None,
    ) -> None:
        self.tokenizer, self.documents = tokenizer or self.tokenizer, documents or self.documents
        self.block_size: int = int_from(1, block_size, "block_size")
        self.row = ids if isinstance(ids, TensorRow | StoredRow) else row_of(ids)  # type: ignore[arg-type]
        self.max_id = self.row.max_id
        if self.documents is None:
            self._check_length("the text", self.n_ids)
        elif self.documents.ends[-1] != self.n_ids:
            raise InputError(f"documents must end with the ids, {self.n_ids}, got {self.documents.ends[-1]}")
        elif not self.documents.n_targets:
            raise DataError(f"no document has two {self.unit}s, of which one could tell the next")
        width = min(self.block_size + 1, self.n_ids)  # all documents may be shorter than a block
        self._windows_at = self.row.windows(width)  # from (B,) to (B, T + 1)

    @classmethod
    def from_text(
        cls, text: str, tokenizer: Tokenizer, block_size: int, *, on_unknown: OnUnknown = "error"
    ) -> Self:
        """Encode a text and cut it into blocks.

        Args:
            text: longer than a block.
            tokenizer: makes the ids.
            block_size: T, tokens in a block.
            on_unknown: how unknown characters are treated, as in `CharTokenizer.encode_array`.

        Raises:
            UnknownCharacterError: the text has a character that the tokenizer lacks.
            DataError: the text is too short for a single block with its targets.
        """
        return cls._made(tokenizer.encode_array(text, on_unknown=on_unknown), block_size, tokenizer)

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        block_size: int,
        *,
        weights: Sequence[float] | None = None,
        on_unknown: OnUnknown = "error",
    ) -> Self:
        """Encode several texts as separate documents: no block crosses the border between two.

        `split` then splits by document. Training leaves out the documents that are too short for a block
        with its targets. Evaluation scores every id once, except the first of each document.

        Args:
            texts: the documents; empty ones are ignored.
            tokenizer: makes the ids.
            block_size: T, tokens in a block.
            weights: how often training sees each document, relative to one of weight 1; None: all alike.
            on_unknown: how unknown characters are treated, as in `CharTokenizer.encode_array`.

        Raises:
            UnknownCharacterError: a text has a character that the tokenizer lacks.
            DataError: there is no text.
            InputError: the weights are no numbers from 1e-6 to 1e6, one for each text.

        Example:
            >>> from charlm import CharTokenizer
            >>> data = BlockDataset.from_texts(["abcab", "cba"], CharTokenizer("abc"), block_size=2)
            >>> [x.tolist() for x, _ in data]
            [[0, 1], [1, 2], [2, 0], [2, 1]]
        """
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"texts must be a list of str, got {shown(texts)}")
        rows = [tokenizer.encode_array(text, on_unknown=on_unknown) for text in texts]
        documents = Documents.of([len(row) for row in rows], weights)
        return cls._made(np.concatenate(rows), block_size, tokenizer, documents)

    @classmethod
    def open(cls, path: str | Path, block_size: int, *, by_document: bool = False) -> Self:
        """Open a prepared corpus, which stays on disk: only the ids of a batch are read into memory.

        The batches are those of the same text in memory. Each file is hashed when it is first opened (about a
        second per gigabyte), and again after it was changed.

        Args:
            path: the folder that `charlm prepare` or `charlm.data.prepare.prepare_corpus` wrote.
            block_size: T, tokens in a block.
            by_document: treat each file that it was made from as a document, as `from_texts` does.

        Raises:
            CorpusError: there is no prepared corpus, or a file of it is missing.
            FileFormatError: a file was changed, cut or swapped.
            DataError: the text is too short for a single block with its targets.
        """
        corpus = PreparedCorpus(path)
        if by_document:
            documents = Documents.of(np.diff(corpus.documents().astype(np.int64), prepend=0).tolist())
            return cls._made(StoredRow(corpus), block_size, corpus.tokenizer, documents)
        data = cls._made(StoredRow(corpus), block_size, corpus.tokenizer)
        data._cut = corpus.index.train_ids
        return data

    def split(self, fraction: float | None = None) -> tuple[Self, Self]:
        """Split into the first `fraction` of the text, for training, and the rest, for validation.

        Fewer than 20 documents are each split in this way. Of 20 or more, whole documents make up the second
        part; long and short ones are spread evenly over both parts.

        Args:
            fraction: share of the first part, in (0, 1). The cut is at `fraction * N`, rounded down; 0.93 of
                1,000 is exactly 930. None: the cut of a prepared corpus, else 0.9.

        Returns:
            Two datasets over the same ids (views, no copy).

        Raises:
            DataError: a part would be too short; the message says which.
            InputError: `fraction` is no number between 0 and 1.
        """
        cut = self._cut
        if fraction is not None or cut is None:
            share = as_float(0.9 if fraction is None else fraction)
            if share is None or not 0 < share < 1:
                raise InputError(f"fraction must be a number between 0 and 1, got {shown(fraction)}")
            if self.documents is not None:
                first, second = self.documents.split(share)
                return self._part(first), self._part(second)
            cut = share_of(self.n_ids, share)
        self._check_length("the first part of the text (for training)", cut)
        self._check_length("the second part of the text (for validation)", self.n_ids - cut)
        return self._part([range(cut)]), self._part([range(cut, self.n_ids)])

    def set_aside(self, count: int) -> tuple[Self, Self]:
        """Take some pieces out of the text: train on the rest, and choose by the loss on the pieces.

        There are at most twenty pieces of about four thousand ids each, spread evenly over the text. The end
        alone may be unlike the rest: the last fortieth of the training text of Tiny Shakespeare belongs to
        the play of the validation text.

        Args:
            count: the number of ids in all pieces together.

        Returns:
            The rest and the pieces. In each, ids that were apart become neighbours where a piece begins or
            ends. They are copies of a text in memory, and ranges of a text on disk.

        Raises:
            DataError: a part would be too short; the message says which.

        Example:
            >>> rest, aside = BlockDataset(torch.arange(100), block_size=4).set_aside(10)
            >>> len(rest.ids), aside.ids.tolist()
            (90, [45, 46, 47, 48, 49, 50, 51, 52, 53, 54])
        """
        N, count = self.n_ids, int_from(1, count, "count")
        self._check_length("the text without the pieces set aside", N - count)
        self._check_length("the pieces set aside", count)
        pieces = min(max(count // _PIECE, 1), _MOST_PIECES)
        borders = [0]
        for i in range(pieces):
            length = (i + 1) * count // pieces - i * count // pieces
            start = (2 * i + 1) * N // (2 * pieces) - length // 2
            borders += [start, start + length]
        ranges = [range(start, stop) for start, stop in pairwise([*borders, N])]
        return self._part(ranges[::2]), self._part(ranges[1::2])

    def in_blocks_of(self, block_size: int) -> Self:
        """Return the same text in blocks of another size."""
        data = self._part([range(self.n_ids)], block_size)
        data._cut = self._cut
        return data

    def ids_between(self, start: int, stop: int) -> Tensor:
        """Return the ids from `start` to `stop`: a view of a text in memory, a copy of a text on disk."""
        start, stop, _ = slice(start, stop).indices(self.n_ids)
        return self.row.between(start, max(start, stop))

    def _part(self, ranges: Sequence[range], block_size: int | None = None) -> Self:
        row = self.row.parts(ranges)
        ids = row.ids if isinstance(row, TensorRow) else row  # a subclass may take nothing but tensors
        documents = None if self.documents is None else self.documents.parts(ranges)
        return self._made(ids, block_size or self.block_size, self.tokenizer, documents)

    @classmethod
    def _made(
        cls,
        ids: Tensor | NDArray[Any] | Row,
        block_size: int,
        tokenizer: Tokenizer | None,
        documents: Documents | None = None,
    ) -> Self:
        """Make a dataset of this class, whose constructor need not take a tokenizer or documents."""
        made = cls.__new__(cls)
        made.tokenizer, made.documents = tokenizer, documents
        made.__init__(ids, block_size)  # type: ignore[misc]
        return made

    @property
    def n_ids(self) -> int:
        """N, the length of the text in ids."""
        return len(self.row)

    @property
    def n_targets(self) -> int:
        """The number of ids that are predicted: all but the first, or all but the first of each document."""
        return self.n_ids - 1 if self.documents is None else self.documents.n_targets

    @property
    def ids(self) -> Tensor:
        """The ids (N,), in the smallest unsigned type; a text on disk is read into memory as a whole."""
        return self.row.ids if isinstance(self.row, TensorRow) else self.row.between(0, len(self.row))

    @property
    def unit(self) -> Unit:
        """The unit of an id in messages and charts: "character" or "byte"."""
        return "character" if self.tokenizer is None else unit_of(self.tokenizer)

    def _check_length(self, name: str, N: int) -> None:
        if self.block_size >= N:
            raise DataError(
                f"{name} has {N:,} {self.unit}{'s' * (N != 1)}; block_size {self.block_size:,} needs at "
                f"least {self.block_size + 1:,}: a block and the {self.unit} after it. Use a longer text or "
                "a smaller block_size."
            )

    def __len__(self) -> int:
        """Return the number of starts: N - block_size, or the sum of this over the documents."""
        if self.documents is not None:
            return int(self.documents.n_starts(self.block_size).sum())
        return self.n_ids - self.block_size

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        """Return the block that starts at `start`: inputs (T,) and targets (T,), int64."""
        if not -len(self) <= start < len(self):
            raise IndexError(f"start {start} is out of range for {len(self)} blocks")
        start %= len(self)
        if self.documents is not None:
            start = self.documents.place(start, self.block_size)
        window = self.row.between(start, start + self.block_size + 1)  # (T + 1,)
        return window[:-1].long(), window[1:].long()  # two copies: changing one leaves the other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.n_ids} {self.unit}s, block_size={self.block_size})"

    def __getstate__(self) -> dict[str, object]:
        """Leave out the view of all windows, which would pickle as T + 1 texts, and a text on disk."""
        ids = self.row.ids.numpy() if isinstance(self.row, TensorRow) else self.row
        others = {"tokenizer": self.tokenizer, "documents": self.documents, "_cut": self._cut}
        return {"ids": ids, "block_size": self.block_size, **others}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.tokenizer, self._cut = state.pop("tokenizer", None), state.pop("_cut", None)
        self.documents = state.pop("documents", None)
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
        return self.blocks_at(self._draw_starts(batch_size, generator))

    def _draw_starts(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Return where the blocks of `sample_batch` begin, (B,) int64."""
        B = int_from(1, batch_size, "batch_size")
        if self.documents is None:  # as the lecture draws them
            return torch.randint(len(self), (B,), generator=generator, device="cpu")
        if not len(self):
            self._check_length("the longest document", int(self.documents.lengths.max()))
        shares = torch.rand(B, dtype=torch.float64, generator=generator, device="cpu")
        return torch.from_numpy(self.documents.places(shares.numpy(), self.block_size))

    def blocks_at(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blocks that begin at given places.

        Args:
            starts: (B,) int64, each in [0, len(self)); with documents, positions in the row of ids.

        Returns:
            Inputs (B, T) and targets (B, T), int64, on the CPU.
        """
        windows = self._windows_at(starts)  # (B, T + 1)
        return windows[:, :-1].long(), windows[:, 1:].long()

    def blocks(self, batch_size: int, *, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the whole text in order, every target exactly once, for evaluation.

        Args:
            batch_size: B, the most blocks in a batch.
            most: yield at most so many blocks, spread evenly over the text; None: all.

        Yields:
            Inputs and targets, (B, T) int64. The last batch may have fewer blocks. Without `most`, the
            rest of the text follows as a single shorter block (1, t). With documents, the shorter blocks at
            their ends come last, grouped by length.
        """
        for x, y in in_order(self.row, self.block_size, batch_size, most, self.documents):
            yield x.long(), y.long()
