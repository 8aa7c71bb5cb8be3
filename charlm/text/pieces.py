"""Reads the text of a file in pieces, so that a text of any length can be read in little memory.

Text is decoded strictly and never changed: line ends, byte order marks and NULs arrive as they were
written. A gzip file is decompressed on the way. A file whose first bytes show that it is no text is refused.
An error in the middle of a text is raised when its piece is reached.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from charlm.errors import CorpusError, InputError, InvalidTextError, quoted
from charlm.files.kinds import GZIP, encoding_of, kind_of
from charlm.plain import as_path

__all__ = ["corpus_error", "reading_errors", "text_pieces"]

_PIECE = 2**20  # bytes
_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_ADVICE = {errno.ENOENT: "; check the path", errno.EISDIR: "; name the files in it"}


def text_pieces(
    path: str | Path, *, encoding: str = "utf-8", on_read: Callable[[int], None] | None = None
) -> Iterator[str]:
    """Yield the text of a file, unchanged, in pieces of about a million characters.

    Arguments and errors are those of `charlm.text.corpus.read_text`. `on_read` is called after each read
    with its number of bytes.
    """
    name = "standard input" if path == "-" else quoted(str(path))
    try:
        codec = codecs.lookup(encoding).name
        with suppress(UnicodeError):  # a LookupError means that the codec is not one of text
            b"ab".decode(encoding, "replace")
        new_decoder = codecs.getincrementaldecoder(encoding)
    except (LookupError, TypeError, ValueError) as error:
        raise _no_encoding(encoding) from error
    is_wide = codec.startswith(("utf-16", "utf-32"))
    decoder, fed, lines = new_decoder(), 0, 0
    with _opened(path, name, on_read) as read:
        for number, piece in enumerate(_unpacked(read, name, str(path).endswith(".gz"), is_wide)):
            wide = None if number else encoding_of(piece)
            if wide is not None and codec not in _codecs_of(wide, piece):
                raise InvalidTextError(
                    f"{name} must be valid {encoding}; it looks like {wide}: convert it with "
                    f'iconv -f {wide} -t UTF-8, or say so: encoding="{wide}" in Python, --encoding {wide} of '
                    "the command"
                )
            if number == 0 and codec in {"utf-16", "utf-32"} and not piece.startswith(_MARKS):
                # Without a mark, the byte order is the machine's, as in bytes.decode.
                decoder = codecs.getincrementaldecoder(f"{codec}-{sys.byteorder[0]}e")()
            fed += len(piece)
            lines += piece.count(b"\n")
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:  # error.object ends where the piece ends
                offset = error.start + fed - len(error.object)
                line = lines - error.object.count(b"\n", error.start) + 1
                raise _invalid(error, offset, line, name, encoding) from None
            except (LookupError, ValueError) as error:
                raise _no_encoding(encoding) from error
            if text:
                yield text


def corpus_error(message: str, cause: Exception) -> CorpusError:
    """Return a CorpusError with the `errno` of its cause."""
    error = CorpusError(message)
    error.errno = cause.errno if isinstance(cause, OSError) else None
    return error


@contextmanager
def reading_errors(name: str) -> Iterator[None]:
    """Turn errors of reading inside the block into a CorpusError that names the file."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "")
        raise corpus_error(f"{name} cannot be read: {error.strerror or error}{advice}", error) from error
    except (AttributeError, ValueError) as error:  # no standard input, or a closed one; a NUL in the path
        raise corpus_error(f"{name} cannot be read: {error}", error) from error


@contextmanager
def _opened(
    path: str | Path, name: str, on_read: Callable[[int], None] | None
) -> Iterator[Callable[[int], bytes]]:
    """Open a file and yield a function that reads bytes from it: fewer than asked for only at its end."""
    file: Any = None

    def read(size: int) -> bytes:
        with reading_errors(name):
            data: bytes | None = file.read(size)
            if data is None:  # a non-blocking pipe that is still empty
                raise BlockingIOError(
                    errno.EAGAIN, "it does not wait for its writer; give a file or a plain pipe"
                )
        if on_read is not None:
            on_read(len(data))
        return data

    with reading_errors(name):
        file = sys.stdin.buffer if path == "-" else as_path(path).open("rb")
    try:
        yield read
    finally:
        if path != "-":
            file.close()


def _unpacked(read: Callable[[int], bytes], name: str, gzip_wanted: bool, is_wide: bool) -> Iterator[bytes]:
    """Yield the decompressed bytes of a text, with an empty piece at the end; refuse data that is no text."""
    first = read(_PIECE)
    packed = re.match(GZIP, first) is not None
    if packed:
        file = gzip.GzipFile(fileobj=cast("IO[bytes]", _Rejoined(first, read)), mode="rb")

        def read_on() -> bytes:
            try:
                return file.read(_PIECE)
            except CorpusError:
                raise
            except (OSError, EOFError, zlib.error) as error:
                raise corpus_error(
                    f"{name} is damaged and cannot be decompressed: {error}; copy it again", error
                ) from error

        piece = read_on()
    else:
        piece = first

        def read_on() -> bytes:
            return read(_PIECE)

    if kind := kind_of(piece, wide=is_wide):
        raise CorpusError(f"{name} must be a text, got {kind}")
    if gzip_wanted and not packed:
        raise CorpusError(f"{name} must be compressed with gzip, as its name says, but is not; rename it")
    while piece:
        yield piece
        piece = read_on()
    yield b""


class _Rejoined:
    """A file whose first bytes have been read already, for a reader that wants them, too."""

    def __init__(self, first: bytes, read: Callable[[int], bytes]) -> None:
        self._first, self._read = first, read

    def read(self, size: int) -> bytes:
        first, self._first = self._first[:size], self._first[size:]
        return first or self._read(size)


def _codecs_of(wide: str, data: bytes) -> set[str]:
    """Return the names of the codecs that decode a text whose first bytes are those of UTF-16 or UTF-32."""
    family, order = wide[:6].lower(), wide[6:].lower()
    if not order:  # the byte order mark tells it
        return {family, f"{family}-{'le' if data.startswith(codecs.BOM_UTF16_LE) else 'be'}"}
    return {f"{family}-{order}", *([family] if sys.byteorder.startswith(order[0]) else [])}


def _no_encoding(encoding: object) -> InputError:
    return InputError(f"encoding must be a text encoding of Python, got {quoted(str(encoding), 40)}")


def _invalid(error: UnicodeDecodeError, offset: int, line: int, name: str, encoding: str) -> InvalidTextError:
    return InvalidTextError(
        f"{name} must be valid {encoding}, got byte 0x{error.object[error.start]:02x} at offset {offset} "
        f"(line {line}), {error.reason}; convert it to UTF-8, or name its encoding, such as latin-1: "
        "encoding=... in Python, --encoding of the command",
        offset=offset,
    )
