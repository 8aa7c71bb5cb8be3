"""The texts of a preparation: any number of files, each a document, read twice in little memory. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from charlm.data.prepared import DOCUMENTS_FILE, TOKENIZER_FILE
from charlm.errors import CorpusError, DataError, InputError, UnknownCharacterError, quoted
from charlm.files import strict_json
from charlm.plain import as_path
from charlm.text.checks import encoded
from charlm.text.corpus import corpus_pieces, is_named
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer

__all__ = ["Counted", "Progress", "Source", "Texts", "changed", "in_order", "listed", "stamp"]

Progress: TypeAlias = Callable[[Literal["reading", "writing"], int, int], None]
"""Called with the stage, the amount done and the total: of bytes when reading, of ids when writing."""

_MOST_CODES = 0x110000

PathT = TypeVar("PathT", bound=PurePath)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """The result of the first pass."""

    tokenizer: CharTokenizer | ByteTokenizer | None
    ends: NDArray[np.int64]
    """(n_documents,), where each document ends, in ids."""
    n_chars: int | None
    n_bytes: int | None
    vocab_size: int
    max_id: int
    train_ids: int | None = None
    """The number of ids for training, if the source has a split of its own."""

    @property
    def n_ids(self) -> int:
        """Length of the text."""
        return int(self.ends[-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest type that holds each id."""
        return np.min_scalar_type(self.vocab_size - 1)

    def files(self) -> dict[str, bytes]:
        """Return the content of the files beside the ids, by name."""
        files = {DOCUMENTS_FILE: self.ends.astype("<u8").tobytes()}
        if self.tokenizer is not None:
            files[TOKENIZER_FILE] = strict_json.dumps(self.tokenizer.to_dict())
        return files


class Source(Protocol):
    """A source of ids that can be read twice."""

    def key(self) -> list[object]:
        """Return values of JSON that change when the source does."""
        ...

    def count(self, report: Progress) -> Counted:
        """Read everything once."""
        ...

    def pieces(self, counted: Counted, skipped: int) -> Iterator[NDArray[Any]]:
        """Read everything again, and yield all ids after the first `skipped`."""
        ...


class Texts:
    """Texts, one document each.

    Args:
        documents: files, or names of corpora, as `listed` returns them.
        tokenizer: as in `prepare_corpus`.
        encoding: of the files.
    """

    def __init__(
        self,
        documents: Sequence[str | Path],
        tokenizer: Literal["char", "byte"] | CharTokenizer | ByteTokenizer,
        encoding: str,
    ) -> None:
        self._documents, self._tokenizer, self._encoding = documents, tokenizer, encoding

    def key(self) -> list[object]:
        """Return values of JSON that change when the texts or the arguments do."""
        kind = self._tokenizer if isinstance(self._tokenizer, str) else self._tokenizer.to_dict()
        return [[stamp(document) for document in self._documents], self._encoding, kind]

    def count(self, report: Progress) -> Counted:
        """Count the characters of the texts."""
        total = sum(_size(document) for document in self._documents)
        done = 0

        def on_read(count: int) -> None:
            nonlocal done
            done += count
            report("reading", done, total)

        of_codes = np.zeros(_MOST_CODES, np.int64)  # occurrences of each code point
        lengths = np.ones(_MOST_CODES, np.int64)  # bytes of UTF-8 of each code point
        for first in (0x80, 0x800, 0x10000):
            lengths[first:] += 1
        checker = _Checker(self._tokenizer) if isinstance(self._tokenizer, CharTokenizer) else None
        chars, sizes = [], []  # of each document
        for document in self._documents:
            n_chars = n_bytes = 0
            for piece in corpus_pieces(document, encoding=self._encoding, on_read=on_read):
                counts = _counted(piece)
                of_codes[: len(counts)] += counts
                n_chars += len(piece)
                n_bytes += int(counts @ lengths[: len(counts)])
                if checker is not None:
                    checker.check(piece, document)
            chars.append(n_chars)
            sizes.append(n_bytes)
        codes = np.flatnonzero(of_codes)
        if not len(codes):
            raise DataError("the text is empty, and a vocabulary needs at least one character")
        tokenizer = self._tokenizer
        if isinstance(tokenizer, str):
            characters = codes.astype("<u4").tobytes().decode("utf-32-le")
            tokenizer = ByteTokenizer() if tokenizer == "byte" else CharTokenizer(characters)
        by_byte = isinstance(tokenizer, ByteTokenizer)
        return Counted(
            tokenizer=tokenizer,
            ends=np.cumsum(sizes if by_byte else chars),
            n_chars=sum(chars),
            n_bytes=sum(sizes),
            vocab_size=tokenizer.vocab_size,
            max_id=tokenizer.vocab_size - 1,
        )

    def pieces(self, counted: Counted, skipped: int) -> Iterator[NDArray[Any]]:
        """Yield all ids after the first `skipped`."""
        tokenizer, start = counted.tokenizer, 0
        if tokenizer is None:
            return
        for document, end in zip(self._documents, counted.ends.tolist(), strict=True):
            if end > skipped:
                for text in corpus_pieces(document, encoding=self._encoding):
                    ids = tokenizer.encode_array(text)
                    start += len(ids)
                    yield ids[len(ids) - max(start - skipped, 0) :] if start - len(ids) < skipped else ids
                if start != end:
                    raise changed(document)
            start = end


class _Checker:
    """Checks that a tokenizer knows all characters of a text that comes in pieces."""

    def __init__(self, tokenizer: CharTokenizer) -> None:
        self._tokenizer = tokenizer
        self._document: object = None
        self._position = self._line = self._column = 0

    def check(self, piece: str, document: object) -> None:
        """Raise UnknownCharacterError with the place of the first unknown character in the document."""
        if document is not self._document:
            self._document, self._position, self._line, self._column = document, 0, 1, 1
        try:
            self._tokenizer.encode_array(piece)
        except UnknownCharacterError as error:
            first = error.line == 1
            line, column = self._line + error.line - 1, error.column + (self._column - 1 if first else 0)
            position, character = self._position + error.position, error.characters[0]
            raise UnknownCharacterError(
                f"{quoted(character)} (U+{ord(character):04X}) is not in the vocabulary, in "
                f"{quoted(str(document))} at position {position} (line {line}, column {column})",
                characters=error.characters,
                position=position,
                line=line,
                column=column,
                count=error.count,
            ) from None
        self._position += len(piece)
        self._line += piece.count("\n")
        self._column = len(piece) - piece.rfind("\n") if "\n" in piece else self._column + len(piece)


def _counted(text: str) -> NDArray[np.int64]:
    """Return the number of occurrences of each code point, from 0 to the largest."""
    if text.isascii():
        return np.bincount(np.frombuffer(text.encode(), np.uint8))
    return np.bincount(np.frombuffer(encoded(text, "utf-32-le", text=text), "<u4"))


def listed(sources: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Return the files and named corpora of the sources, in order."""
    documents: list[str | Path] = []
    for source in [sources] if isinstance(sources, str | Path) else sources:
        path = as_path(source)
        if source == "-":
            raise InputError(
                "standard input can be read only once, and a preparation reads twice; give a file"
            )
        if is_named(source):
            documents.append(source)
        elif path.is_dir():
            inside = in_order(entry for entry in path.rglob("*") if entry.is_file())
            is_hidden = [any(part[0] == "." for part in file.relative_to(path).parts) for file in inside]
            documents += [file for file, hidden in zip(inside, is_hidden, strict=True) if not hidden]
        elif not path.exists() and any(sign in str(source) for sign in "*?["):
            matching = in_order(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
            if not matching:
                raise CorpusError(f"no file fits {quoted(str(source))}; check the path")
            documents += listed(matching)
        else:
            documents.append(source)
    if not documents:
        raise CorpusError("there is no file to prepare; check the paths")
    return documents


def in_order(paths: Iterable[PathT]) -> list[PathT]:
    """Return paths in the same order on all systems; the order of Windows ignores case."""
    return sorted(paths, key=lambda path: path.parts)


def stamp(document: str | Path) -> list[object]:
    """Return path, size and time of a document, which change when it does; of a named corpus, its name."""
    path = as_path(document)
    try:
        status = path.stat()
    except OSError:  # a named corpus; or an error that reading will report
        return [str(document)]
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


def _size(document: str | Path) -> int:
    values = stamp(document)
    return int(str(values[1])) if len(values) > 1 else 0


def changed(document: str | Path | None = None) -> DataError:
    """Return the error about a text that changed between the two passes."""
    name = "a text" if document is None else quoted(str(document))
    return DataError(f"{name} has changed while it was prepared; prepare it again")
