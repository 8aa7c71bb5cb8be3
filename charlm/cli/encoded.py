"""The ids of a training text: in memory, or prepared on disk if the text is large. No torch here.

A text in memory is not kept after it is encoded. A text that takes more than a share of the free memory is
prepared in the cache folder, under the hash of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from charlm.backends.host import available_bytes
from charlm.cli.output import Console, UsageError
from charlm.cli.preparing import Bar
from charlm.cli.reading import (
    VAL_FRACTION,
    Reading,
    begins_with,
    joined_notes,
    named,
    pieces_of,
    unknown_notes,
)
from charlm.data.documents import Documents
from charlm.data.prepare import prepare_corpus
from charlm.data.prepared import PreparedCorpus, is_prepared
from charlm.errors import CorpusError, DataError, quoted
from charlm.files.folders import cache_folder
from charlm.files.reading import OpenFile
from charlm.plain import share_of
from charlm.text.corpus import corpus_pieces, load_corpus
from charlm.text.inspection import remarks
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

__all__ = ["Encoded", "characters_of", "corpus_of", "encode_corpus", "is_large"]

_MOST_OF_FREE = 16  # a text in memory may take a sixteenth of the free memory, since encoding takes more
_PACKED = 5  # expected size of a text, relative to its compressed file


@dataclass(frozen=True)
class Encoded:
    """The ids of a text, with their tokenizer."""

    encoding: str
    """Encoding of the files."""
    kind: str
    """Kind of the tokenizer: "char" or "byte"."""
    tokenizer: Tokenizer
    ids: NDArray[np.unsignedinteger[Any]] | PreparedCorpus
    """(N,) in the smallest type that holds them; or the corpus on disk."""
    n_chars: int
    """Length of the text in characters."""
    remarks: Sequence[str]
    """Notes for the user on the text."""
    documents: Documents | None = None
    """The documents; None: the ids are one text."""

    @property
    def n_ids(self) -> int:
        """Length of the text in ids."""
        return self.ids.index.n_ids if isinstance(self.ids, PreparedCorpus) else len(self.ids)

    @property
    def recorded_split(self) -> tuple[float, float]:
        """The share for validation of a prepared corpus, and the share at which to cut it."""
        if not isinstance(self.ids, PreparedCorpus):
            return VAL_FRACTION, 1 - VAL_FRACTION
        N, train_ids = self.n_ids, self.ids.index.train_ids
        if train_ids == share_of(N, 1 - VAL_FRACTION):
            return VAL_FRACTION, 1 - VAL_FRACTION
        return 1 - train_ids / N, 1.0 if train_ids == N else (train_ids + 0.5) / N

    @property
    def is_prepared(self) -> bool:
        """Whether the ids are on disk."""
        return isinstance(self.ids, PreparedCorpus)


def encode_corpus(
    sources: Sequence[str], reading: Reading, *, console: Console, prepared: bool | None = None
) -> Encoded:
    """Read texts, make the tokenizer, and encode them.

    Args:
        sources: as for `load_corpus`; or one prepared corpus.
        reading: how they are read.
        console: shows that a text is prepared.
        prepared: whether the ids must be on disk. None: only those of a large text.

    Raises:
        UsageError: a prepared corpus was given with another source, or with other settings than its own.
        CharLMError: as in `load_corpus`, `prepare_corpus` and the tokenizer.
    """
    corpus = _stored(sources, reading, console, prepared)
    if corpus is not None:
        if corpus.tokenizer is None:
            raise CorpusError(
                f"{quoted(str(corpus.path))} has ids whose characters are not known, such as tokens of "
                "GPT-2; train from Python: BlockDataset.open"
            )
        n_chars = corpus.index.n_chars or corpus.index.n_ids
        documents = _stored_documents(corpus, reading) if reading.apart else None
        kind = _kind(corpus.tokenizer)
        return Encoded(reading.encoding, kind, corpus.tokenizer, corpus, n_chars, [], documents)
    texts = [load_corpus(source, encoding=reading.encoding) for source in sources]
    text = "".join(texts)
    old, on_unknown = reading.tokenizer, reading.on_unknown
    tokenizer = reading.made(text)
    notes = [] if old is None else unknown_notes(text, old, on_unknown)
    if isinstance(old, CharTokenizer) and isinstance(tokenizer, CharTokenizer):
        new = tokenizer.vocab[old.vocab_size :]
        notes += [f"new to the model: {named(new)}"] if new else []
    documents = None
    if reading.apart:
        pieces, weights, said = pieces_of(sources, texts, reading)
        rows = [tokenizer.encode_array(piece, on_unknown=on_unknown) for piece in pieces]
        ids, documents = np.concatenate(rows), Documents.of([len(row) for row in rows], weights)
        notes += said
    else:
        ids = tokenizer.encode_array(text, on_unknown=on_unknown)
        notes += joined_notes(sources, texts, reading.val_fraction)
    end = 0.0 if reading.apart else reading.val_fraction  # documents have each their own end
    notes += remarks(text, tokenizer.vocab_size, val_fraction=end)
    return Encoded(reading.encoding, _kind(tokenizer), tokenizer, ids, len(text), notes, documents)


def _stored_documents(corpus: PreparedCorpus, reading: Reading) -> Documents:
    ends = corpus.documents().astype(np.int64)
    lengths = np.diff(ends, prepend=0).tolist()
    if reading.separator is not None:
        raise UsageError(
            "--separator needs texts that fit into memory; of a prepared corpus each file is one"
        )
    if reading.weights is not None and len(reading.weights) != len(lengths):
        raise UsageError("--weight needs the files themselves: a prepared corpus does not know their names")
    return Documents.of(lengths, reading.weights)


def _kind(tokenizer: CharTokenizer | ByteTokenizer) -> str:
    return "byte" if isinstance(tokenizer, ByteTokenizer) else "char"


def _stored(
    sources: Sequence[str], reading: Reading, console: Console, on_disk: bool | None
) -> PreparedCorpus | None:
    """Return the prepared corpus, if it is named or the texts are large; else None."""
    tokenizer = reading.tokenizer
    is_named = any(map(is_prepared, sources))
    on_disk = is_large(sources) if on_disk is None else on_disk
    if (is_named or on_disk) and reading.on_unknown != "error":
        raise UsageError(
            "--on-unknown needs a text that fits into memory; without it, new characters are added"
        )
    if not is_named and on_disk and isinstance(tokenizer, CharTokenizer) and reading.extends:
        tokenizer = tokenizer.extend(
            piece for source in sources for piece in corpus_pieces(source, encoding=reading.encoding)
        )
    kind: Literal["char", "byte"] = "byte" if reading.kind == "byte" else "char"
    corpus = corpus_of(sources, reading.encoding, tokenizer or kind, console=console, on_disk=on_disk)
    if corpus is not None and tokenizer is not None and not begins_with(corpus.tokenizer, tokenizer):
        raise DataError(
            f"{quoted(str(corpus.path))} was prepared with another vocabulary than the model's, so its ids "
            "stand for other characters; give the text itself"
        )
    return corpus


def corpus_of(
    sources: Sequence[str],
    encoding: str,
    tokenizer: Literal["char", "byte"] | CharTokenizer | ByteTokenizer,
    *,
    console: Console,
    on_disk: bool | None = None,
) -> PreparedCorpus | None:
    """Return the named prepared corpus, or one that is made from large texts; else None.

    Args:
        sources: as for `load_corpus`; or one prepared corpus.
        encoding: of the files among them.
        tokenizer: "char", "byte", or an existing tokenizer.
        console: shows that a text is prepared.
        on_disk: whether the ids must be on disk. None: only those of a large text.
    """
    folders = [source for source in sources if is_prepared(source)]
    if folders:
        if len(sources) > 1:
            raise UsageError(
                f"{quoted(folders[0])} is a prepared corpus and stands alone; prepare all texts together"
            )
        return PreparedCorpus(folders[0])
    if not (is_large(sources) if on_disk is None else on_disk):
        return None
    files = [Path(source) for source in sources]
    folder = cache_folder() / "corpora" / _content_key(files, encoding, tokenizer)
    with contextlib.suppress(CorpusError):
        return PreparedCorpus(folder)
    console.say(f"prepare the text is large, and is first prepared on disk, in {quoted(str(folder))}")
    with Bar(console) as bar:
        prepare_corpus(files, folder, tokenizer=tokenizer, encoding=encoding, on_progress=bar.tell)
    return PreparedCorpus(folder)


def characters_of(corpus: PreparedCorpus) -> Tokenizer:
    """Return the tokenizer of a prepared corpus, or raise CorpusError if it is unknown."""
    if corpus.tokenizer is None:
        raise CorpusError(f"{quoted(str(corpus.path))} does not know the characters of its ids")
    return corpus.tokenizer


def is_large(sources: Sequence[str]) -> bool:
    """Return whether the sources are files, and take more than a share of the free memory."""
    files = [Path(source) for source in sources]
    if not all(file.is_file() for file in files):  # standard input, or the name of a corpus
        return False
    return sum(_text_size(file) for file in files) * _MOST_OF_FREE > (available_bytes() or 2**63)


def _text_size(file: Path) -> int:
    return file.stat().st_size * (_PACKED if file.suffix == ".gz" else 1)


def _content_key(
    files: Sequence[Path], encoding: str, tokenizer: Literal["char", "byte"] | CharTokenizer | ByteTokenizer
) -> str:
    """Return a key of the content of files and their encoding."""
    hashes = [OpenFile(file.resolve(), file.stat().st_size).sha256() for file in files]
    kind = tokenizer if isinstance(tokenizer, str) else tokenizer.to_dict()
    return hashlib.sha256(json.dumps([hashes, encoding, kind]).encode()).hexdigest()[:32]
