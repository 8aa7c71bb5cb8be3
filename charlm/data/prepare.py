"""Writes a prepared corpus from texts, in two passes and little memory. No torch.

The first pass counts the characters. The second encodes the texts into files of ids, each of which appears
whole or not at all. The index is written last. An interrupted preparation continues with the first missing
file of ids if neither texts nor settings have changed. `charlm.data.prepared` reads the corpus.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from charlm.data.foreign import token_files
from charlm.data.prepared import (
    CHECKED_FILE,
    DOCUMENTS_FILE,
    INDEX_FILE,
    PREPARING_FILE,
    TOKENIZER_FILE,
    CorpusIndex,
    is_shard,
    shard_name,
)
from charlm.data.sources import Counted, Progress, Source, Texts, changed, listed
from charlm.errors import CorpusError, FileFormatError, InputError, quoted, shown
from charlm.files import strict_json
from charlm.files.atomic import (
    FileDigest,
    is_left_behind,
    make_directory,
    remove_file,
    remove_left_behind,
    write_file,
)
from charlm.files.reading import OpenFile, read_file
from charlm.files.strict_json import take
from charlm.plain import as_float, as_path, int_from, share_of
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer, tokenizer_from_dict

__all__ = ["prepare_corpus"]

_SHARD_BYTES = 2**30
_FORMAT, _VERSION = "charlm.preparing", 1


def prepare_corpus(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: Literal["char", "byte"] | CharTokenizer | ByteTokenizer = "char",
    encoding: str = "utf-8",
    val_fraction: float = 0.1,
    shard_bytes: int = _SHARD_BYTES,
    on_progress: Progress | None = None,
) -> CorpusIndex:
    """Write a text of any length as a prepared corpus, for `BlockDataset.open`.

    Args:
        sources: the texts, joined in this order: files (gzip or not), folders with all files in them,
            patterns such as `texts/*.txt`, or names of corpora. Or token files: a folder of nanoGPT
            (train.bin, val.bin, meta.pkl), or files of llm.c.
        out: the folder to write: missing, empty, or that of an interrupted preparation with the same
            arguments.
        tokenizer: "char" makes a tokenizer of all characters of the text, "byte" takes the bytes of its
            UTF-8; or a tokenizer that knows all characters.
        encoding: of the files, as in `load_corpus`.
        val_fraction: share of the text, at its end, for validation; 0: none. Token files have their own
            split.
        shard_bytes: the most bytes in a file of ids.
        on_progress: called again and again with the progress.

    Returns:
        The index of the corpus.

    Raises:
        CorpusError: a text cannot be read, or `out` holds something else.
        InvalidTextError: a text is not valid in the encoding.
        UnknownCharacterError: a tokenizer was given, and lacks a character.
        DataError: there is no text, or a text changed while it was read.
        OSError: a file could not be written; the next call continues from there.

    Example:
        >>> folder = Path(getfixture("tmp_path"))
        >>> _ = (folder / "one.txt").write_text("to be or not to be", encoding="utf-8")
        >>> index = prepare_corpus(folder / "one.txt", folder / "data")
        >>> index.n_ids, index.vocab_size, index.train_ids
        (18, 7, 16)
    """
    share = as_float(val_fraction)
    if share is None or not 0 <= share < 1:
        raise InputError(f"val_fraction must be at least 0 and below 1, got {shown(val_fraction)}")
    if isinstance(tokenizer, str) and tokenizer not in {"char", "byte"}:
        raise InputError(f'tokenizer must be "char", "byte" or a tokenizer, got {shown(tokenizer)}')
    shard_bytes = int_from(4, shard_bytes, "shard_bytes")
    out = as_path(out)
    report = on_progress or (lambda *_: None)
    source: Source = token_files(sources) or Texts(listed(sources), tokenizer, encoding)
    key = hashlib.sha256(json.dumps([*source.key(), share, shard_bytes]).encode()).hexdigest()
    counted = _begun(out, key)
    if counted is None:
        counted = source.count(report)
        _begin(out, key, counted)
    remove_left_behind(out)
    shards = _write_shards(out, source, counted, shard_bytes, report)
    train_ids = counted.train_ids
    index = CorpusIndex(
        n_ids=counted.n_ids,
        n_chars=counted.n_chars,
        n_bytes=counted.n_bytes,
        vocab_size=counted.vocab_size,
        max_id=counted.max_id,
        train_ids=max(share_of(counted.n_ids, 1 - share), 1) if train_ids is None else train_ids,
        dtype=counted.dtype.name,
        n_documents=len(counted.ends),
        shards=tuple((digest.size // counted.dtype.itemsize, digest.sha256) for digest in shards),
        others={name: _digest(content) for name, content in counted.files().items()},
    )
    write_file(out / INDEX_FILE, strict_json.dumps(index.to_dict()))
    with contextlib.suppress(OSError):
        remove_file(out / PREPARING_FILE)
    return index


def _begun(out: Path, key: str) -> Counted | None:
    """Return the result of the first pass if this preparation was interrupted in this folder.

    The files of another interrupted preparation are deleted.

    Raises:
        CorpusError: the folder holds something else.
    """
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if INDEX_FILE in names:
        raise _exists(
            f"{quoted(str(out))} holds a prepared corpus already; choose another folder, or delete it"
        )
    if not all(_is_own(name) for name in names) or (out.exists() and not out.is_dir()):
        raise _exists(f"{quoted(str(out))} is not empty; choose another folder")
    with contextlib.suppress(FileFormatError, FileNotFoundError, NotADirectoryError):
        file = out / PREPARING_FILE
        values = strict_json.loads(read_file(file, max_bytes=strict_json.MAX_BYTES), path=str(file))
        strict_json.check_version(values, _FORMAT, _VERSION, path=str(file))
        if values.get("key") == key:
            return _read_counted(out, take(values, "counted", dict, path=str(file)), str(file))
    # PREPARING_FILE first: without it, nothing that is still there counts as begun.
    for name in sorted(names, key=lambda name: name != PREPARING_FILE):
        if not is_left_behind(name):
            remove_file(out / name)
    return None


def _is_own(name: str) -> bool:
    own = {PREPARING_FILE, DOCUMENTS_FILE, TOKENIZER_FILE, CHECKED_FILE}
    return name in own or is_shard(name) or is_left_behind(name)


def _read_counted(out: Path, values: Mapping[str, Any], path: str) -> Counted:
    ends = read_file(out / DOCUMENTS_FILE, max_bytes=2**40)
    tokenizer = None
    if (file := out / TOKENIZER_FILE).exists():
        held = read_file(file, max_bytes=2**23)
        tokenizer = tokenizer_from_dict(
            strict_json.loads(held, path=str(file), max_bytes=2**23), path=str(file)
        )
    return Counted(tokenizer=tokenizer, ends=np.frombuffer(ends, "<u8").astype(np.int64), **values)


def _begin(out: Path, key: str, counted: Counted) -> None:
    """Write the result of the first pass; from now on, the preparation can be continued."""
    make_directory(out)
    remove_left_behind(out)
    for name, content in counted.files().items():
        write_file(out / name, content)
    names = ("n_chars", "n_bytes", "vocab_size", "max_id", "train_ids")
    values = {name: getattr(counted, name) for name in names}
    content = strict_json.dumps({"format": _FORMAT, "version": _VERSION, "key": key, "counted": values})
    write_file(out / PREPARING_FILE, content)


def _write_shards(
    out: Path, source: Source, counted: Counted, shard_bytes: int, report: Progress
) -> list[FileDigest]:
    """Write the missing files of ids, and return the digests of all."""
    dtype, n_ids = counted.dtype.newbyteorder("<"), counted.n_ids
    each = shard_bytes // dtype.itemsize
    starts = range(0, n_ids, each)
    digests: list[FileDigest] = []
    for start in starts:
        path, size = out / shard_name(len(digests)), dtype.itemsize * (min(start + each, n_ids) - start)
        if not path.exists():
            break
        digests.append(FileDigest(size, OpenFile(path, size).sha256()))
        report("writing", min(start + each, n_ids), n_ids)
    stream = _Stream(source.pieces(counted, len(digests) * each), dtype, len(digests) * each)
    for start in starts[len(digests) :]:
        stop = min(start + each, n_ids)

        def content(stop: int = stop) -> Iterator[memoryview]:
            while stream.at < stop:
                yield stream.take(stop - stream.at)
                report("writing", stream.at, n_ids)

        digests.append(write_file(out / shard_name(len(digests)), content()))
    stream.check_end()
    return digests


class _Stream:
    """The ids as bytes, cut at the ends of the files."""

    def __init__(self, pieces: Iterator[NDArray[Any]], dtype: np.dtype[Any], at: int) -> None:
        self._pieces, self._dtype, self.at = pieces, dtype, at
        self._rest: NDArray[Any] = np.empty(0, dtype)

    def take(self, most: int) -> memoryview:
        while not len(self._rest):
            piece = next(self._pieces, None)
            if piece is None:
                raise changed()
            self._rest = np.ascontiguousarray(piece, self._dtype)
        taken, self._rest = self._rest[:most], self._rest[most:]
        self.at += len(taken)
        return taken.view(np.uint8).data

    def check_end(self) -> None:
        if len(self._rest) or any(len(piece) for piece in self._pieces):
            raise changed()


def _digest(content: bytes) -> FileDigest:
    return FileDigest(len(content), hashlib.sha256(content).hexdigest())


def _exists(message: str) -> CorpusError:
    error = CorpusError(message)
    error.errno = errno.EEXIST
    return error
