"""A prepared corpus: the ids of a text in files on disk, so that the text need not fit into memory. No torch.

DATA/index.json       written last, the commit record: every file with its size and sha256
DATA/tokenizer.json   the tokenizer; missing if it is not known, as with token files of other programs
DATA/documents.bin    where each document ends, in ids: uint64, little-endian
DATA/ids-000000.bin   the ids: uint8, uint16 or uint32, little-endian, at most 1 GiB; then ids-000001.bin
DATA/checked.json     the files that were hashed and have not changed since; may be deleted at any time

Files are read at offsets and never mapped: a mapping counts as memory of the process, and reading it kills
the process if the file has become shorter. This module reads; `charlm.data.prepare` writes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from charlm.errors import CorpusError, FileFormatError, quoted
from charlm.files import strict_json
from charlm.files.atomic import FileDigest, write_file
from charlm.files.reading import OpenFile, read_file, refusal
from charlm.files.strict_json import take
from charlm.plain import as_path
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer, tokenizer_from_dict

__all__ = [
    "CHECKED_FILE",
    "DOCUMENTS_FILE",
    "INDEX_FILE",
    "PREPARING_FILE",
    "TOKENIZER_FILE",
    "CorpusIndex",
    "PreparedCorpus",
    "is_prepared",
    "is_shard",
    "shard_name",
]

INDEX_FILE, TOKENIZER_FILE, DOCUMENTS_FILE = "index.json", "tokenizer.json", "documents.bin"
CHECKED_FILE, PREPARING_FILE = "checked.json", "preparing.json"
_FORMAT, _CHECKED, _VERSION = "charlm.corpus", "charlm.checked", 1
_MOST_BYTES = 8 * 2**20  # of a JSON file, which has room for 14,000 shards
_DTYPES = ("uint8", "uint16", "uint32")
_SHA256 = re.compile("[0-9a-f]{64}")
_HASHING = 8  # the most files that are hashed at once


def shard_name(number: int) -> str:
    """Return the name of the file of ids with this number."""
    return f"ids-{number:06}.bin"


def is_shard(name: str) -> bool:
    """Return whether this is the name of a file of ids."""
    return re.fullmatch(r"ids-\d{6,}\.bin", name) is not None


def is_prepared(path: str | Path) -> bool:
    """Return whether a folder holds a prepared corpus or an interrupted preparation."""
    path = as_path(path)
    return any((path / name).is_file() for name in (INDEX_FILE, PREPARING_FILE))


@dataclass(frozen=True, kw_only=True)
class CorpusIndex:
    """The content of index.json."""

    n_ids: int
    """Length of the text in ids."""
    n_chars: int | None
    """Length of the text in characters; None: unknown."""
    n_bytes: int | None
    """Length of its UTF-8, in bytes; None: unknown."""
    vocab_size: int
    """The number of different ids."""
    max_id: int
    """The largest id."""
    train_ids: int
    """So many ids at the beginning are for training; the rest is for validation."""
    dtype: str
    """The type of the ids: uint8, uint16 or uint32."""
    n_documents: int
    """The number of documents: of files, if the text came in files."""
    shards: tuple[tuple[int, str], ...]
    """The number of ids and the sha256 of each file of ids."""
    others: Mapping[str, FileDigest]
    """Size and sha256 of the other files, by name."""

    @property
    def id_bytes(self) -> int:
        """The number of bytes of an id."""
        return np.dtype(self.dtype).itemsize

    def to_dict(self) -> dict[str, object]:
        """Return the content of index.json."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            **{name: getattr(self, name) for name in _NUMBERS},
            "dtype": self.dtype,
            "shards": [{"ids": ids, "sha256": sha256} for ids, sha256 in self.shards],
            "files": {name: {"size": d.size, "sha256": d.sha256} for name, d in self.others.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, object], *, path: str) -> Self:
        """Make an index from the values of `to_dict`.

        Raises:
            FileFormatError: the file `path` holds something else.
        """
        strict_json.check_version(values, _FORMAT, _VERSION, path=path)
        numbers: dict[str, Any] = {
            name: None
            if values.get(name) is None and name in _OPTIONAL
            else take(values, name, int, path=path)
            for name in _NUMBERS
        }
        dtype = take(values, "dtype", str, path=path)
        shards = [_entry(entry, "ids", path) for entry in take(values, "shards", list, path=path)]
        files = take(values, "files", dict, path=path)
        others = {name: FileDigest(*_entry(entry, "size", path)) for name, entry in files.items()}
        index = cls(dtype=dtype, shards=tuple(shards), others=others, **numbers)
        if not (
            dtype in _DTYPES
            and all(ids > 0 for ids, _ in shards)
            and sum(ids for ids, _ in shards) == index.n_ids >= index.train_ids > 0
            and 0 <= index.max_id < index.vocab_size <= 2 ** (8 * index.id_bytes)
            and set(files) in ({DOCUMENTS_FILE}, {DOCUMENTS_FILE, TOKENIZER_FILE})
            and others[DOCUMENTS_FILE].size == 8 * index.n_documents
        ):
            raise refusal(path, "must hold numbers that fit to each other.")
        return index


_NUMBERS = ("n_ids", "n_chars", "n_bytes", "vocab_size", "max_id", "train_ids", "n_documents")
_OPTIONAL = {"n_chars", "n_bytes"}


def _entry(entry: object, number: str, path: str) -> tuple[int, str]:
    if not isinstance(entry, dict):
        raise refusal(path, "must hold an object for each file.")
    sha256 = take(entry, "sha256", str, path=path)
    if _SHA256.fullmatch(sha256) is None:
        raise refusal(path, f"must hold a sha256 in hexadecimal for each file, got {quoted(sha256, 80)}.")
    return take(entry, number, int, path=path), sha256


class PreparedCorpus:
    """A prepared corpus, from which any number of threads can read at any place.

    Args:
        path: the folder.

    Attributes:
        path: the folder.
        index: its index.
        tokenizer: the tokenizer of the ids; None: unknown.
        dtype: of the ids, little-endian.
        index_sha256: of index.json.

    Raises:
        CorpusError: there is no prepared corpus, or a file of it is missing.
        FileFormatError: a file was changed, cut or swapped. Each file is hashed when it is first opened, and
            again after it was written to.
    """

    path: Path
    index: CorpusIndex
    tokenizer: CharTokenizer | ByteTokenizer | None
    dtype: np.dtype[Any]
    index_sha256: str

    def __init__(self, path: str | Path) -> None:
        self.path = as_path(path).absolute()
        file = self.path / INDEX_FILE
        try:
            data = read_file(file, max_bytes=_MOST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            what = "there is no prepared corpus in"
            if (self.path / PREPARING_FILE).is_file():
                what = "the preparation was not brought to its end (give charlm prepare again) in"
            raise _missing(f"{what} {quoted(str(path))}: it has no {INDEX_FILE}") from None
        self.index_sha256 = hashlib.sha256(data).hexdigest()
        values = strict_json.loads(data, path=str(file), max_bytes=_MOST_BYTES)
        self.index = index = CorpusIndex.from_dict(values, path=str(file))
        self.dtype = np.dtype(index.dtype).newbyteorder("<")
        self.tokenizer = None
        if TOKENIZER_FILE in index.others:
            where, held = str(self.path / TOKENIZER_FILE), self._other(TOKENIZER_FILE)
            content = strict_json.loads(held, path=where, max_bytes=_MOST_BYTES)
            self.tokenizer = tokenizer_from_dict(content, path=where)
            if self.tokenizer.vocab_size != index.vocab_size:
                raise refusal(where, f"must have {index.vocab_size} ids, as {INDEX_FILE} says.")
        self._ends = list(accumulate(ids for ids, _ in index.shards))
        try:
            self._files = [
                OpenFile(self.path / shard_name(i), ids * self.dtype.itemsize)
                for i, (ids, _) in enumerate(index.shards)
            ]
        except FileNotFoundError as error:
            raise self._lacks(Path(str(error.filename)).name) from None
        self._check()

    def documents(self) -> NDArray[np.uint64]:
        """Return where each document ends, in ids, (n_documents,)."""
        return np.frombuffer(self._other(DOCUMENTS_FILE), "<u8").astype(np.uint64)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a copy of the ids from `start` to `stop`, (stop - start,); both must lie in the text.

        Raises:
            FileFormatError: a file has become shorter since it was opened.
        """
        ids = np.empty(stop - start, self.dtype)
        self.read_into(ids, start)
        return ids

    def read_into(self, ids: NDArray[Any], start: int) -> None:
        """Fill a contiguous array of this corpus's dtype with the ids from `start` on."""
        size, begin, end = self.dtype.itemsize, 0, len(ids)
        number = bisect_right(self._ends, start)
        while begin < end:
            first = self._ends[number - 1] if number else 0
            taken = min(end - begin, self._ends[number] - start)
            piece = ids[begin : begin + taken].view(np.uint8).data
            self._files[number].read_into(piece, (start - first) * size)
            begin, start, number = begin + taken, start + taken, number + 1

    def fingerprint(self, ranges: Sequence[range]) -> str:
        """Return a sha256 that identifies the ids in some ranges, made from the hashes of the files."""
        digest, size = hashlib.sha256(), self.dtype.itemsize
        first = 0
        for end, (_, sha256) in zip(self._ends, self.index.shards, strict=True):
            for part in ranges:
                start, stop = max(part.start, first), min(part.stop, end)
                if start < stop:
                    digest.update(f"{sha256} {size} {start - first} {stop - first}\n".encode())
            first = end
        return digest.hexdigest()

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            FileFormatError: a file differs from the index.
        """
        self._other(DOCUMENTS_FILE)
        self._hash(range(len(self._files)))

    def _other(self, name: str) -> bytearray:
        expected, path = self.index.others[name], self.path / name
        try:
            data = read_file(path, max_bytes=expected.size, exact_size=expected.size)
        except FileNotFoundError:
            raise self._lacks(name) from None
        _compare(path, expected.sha256, hashlib.sha256(data).hexdigest())
        return data

    def _lacks(self, name: str) -> CorpusError:
        return _missing(
            f"{quoted(str(self.path))} lacks {name}, which its {INDEX_FILE} names; copy it again, or prepare "
            "the text again"
        )

    def _check(self) -> None:
        """Hash the files that were not hashed before or have changed since."""
        file, hashed = self.path / CHECKED_FILE, {}
        with contextlib.suppress(OSError, FileFormatError):
            data = read_file(file, max_bytes=_MOST_BYTES)
            hashed = strict_json.loads(data, path=str(file), max_bytes=_MOST_BYTES)
        stamps = {
            shard_name(i): f"{sha256} {opened.stamp}"
            for i, (opened, (_, sha256)) in enumerate(zip(self._files, self.index.shards, strict=True))
        }
        new = [i for i, (name, stamp) in enumerate(stamps.items()) if hashed.get(name) != stamp]
        if new:
            self._hash(new)
            with contextlib.suppress(OSError):  # the folder may be read-only; then each opening hashes
                write_file(file, strict_json.dumps({"format": _CHECKED, "version": _VERSION, **stamps}))

    def _hash(self, numbers: Sequence[int]) -> None:
        files = [self._files[i] for i in numbers]
        with ThreadPoolExecutor(min(_HASHING, os.cpu_count() or 1)) as pool:
            for i, sha256 in zip(numbers, pool.map(OpenFile.sha256, files), strict=True):
                _compare(self._files[i].path, self.index.shards[i][1], sha256)


def _compare(path: Path, expected: str, got: str) -> None:
    if expected != got:
        raise refusal(
            path,
            f"must have the sha256 {expected}, as {INDEX_FILE} says, got {got}: it was changed. Copy it "
            "again, or prepare the text again.",
        )


def _missing(message: str) -> CorpusError:
    error = CorpusError(message)
    error.errno = errno.ENOENT
    return error
