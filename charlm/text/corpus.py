"""Where texts come from: files, standard input, and corpora with a name.

Text is decoded strictly and never changed: line ends, byte order marks and NULs arrive as they were
written. A corpus that has to be downloaded is checked before it is kept or used, so the cache folder holds
the right bytes or none. Knows nothing of tokenizers.
`tinyshakespeare` is the corpus of the lecture "Let's build GPT", and of char-rnn before it.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import os
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from charlm.errors import (
    CorpusError,
    FileFormatError,
    InputError,
    InvalidTextError,
    did_you_mean,
    quoted,
    warn,
)
from charlm.files import atomic, reading
from charlm.files.folders import cache_folder
from charlm.files.kinds import GZIP, encoding_of, kind_of
from charlm.plain import as_path, as_text
from charlm.text.download import Download, fetch

__all__ = ["load_corpus", "read_text"]

_PYTHON_DOCS = "python-docs"
_DOWNLOADS = {
    "tinyshakespeare": Download(
        name="tinyshakespeare",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        size=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    )
}
_NAMES = (_PYTHON_DOCS, *_DOWNLOADS)
_ADVICE = {errno.ENOENT: "; check the path", errno.EISDIR: "; name the files in it"}


def read_text(path: str | Path, *, encoding: str = "utf-8") -> str:
    """Return the text of a file exactly as it stands there: line ends, a byte order mark and NUL are kept.

    Args:
        path: the file; the string "-" is standard input. What is compressed with gzip is decompressed.
        encoding: what the bytes are; any text encoding of Python's.

    Raises:
        CorpusError: the file is missing, a directory, unreadable or damaged, or no text but a pointer of Git
            LFS, an archive, a PDF or the like; `errno` is the system's reason.
        InvalidTextError: the bytes are not valid in the encoding, or look like UTF-16 or UTF-32 in another;
            `offset` is that of the first bad one, after decompression.
        InputError: there is no such encoding.
    """
    name = "standard input" if path == "-" else quoted(str(path))
    try:
        codec = codecs.lookup(encoding).name
    except (LookupError, TypeError, ValueError) as error:
        raise _no_encoding(encoding) from error
    is_wide = codec.startswith(("utf-16", "utf-32"))
    data = _unpacked(_bytes_of(path, name), name, gzip_wanted=str(path).endswith(".gz"), is_wide=is_wide)
    wide = encoding_of(data)
    try:
        if wide is None or codec in _codecs_of(wide, data):
            return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _invalid(data, error, name, encoding) from None
    except (LookupError, ValueError) as error:  # a codec, but of no text
        raise _no_encoding(encoding) from error
    raise InvalidTextError(
        f"{name} must be valid {encoding}; it looks like {wide}: convert it with iconv -f {wide} -t UTF-8, "
        f'or say so: encoding="{wide}" in Python, --encoding {wide} of the command'
    )


def load_corpus(source: str | Path | Sequence[str | Path], *, encoding: str = "utf-8") -> str:
    """Return the text of a file, of a corpus with a name, or of several.

    The names are `python-docs`, Python's own documentation (`pydoc_data.topics`, which differs between
    versions of Python), and `tinyshakespeare`, 1,115,394 characters. This is read from the folder
    `$CHARLM_DATA_DIR` if that is set, else downloaded once into the cache folder.

    Args:
        source: a path, "-" for standard input, or a name; or several of these, whose texts are joined with
            nothing in between, as `cat` does. A string is a name only where no file is called so; a `Path`
            never is.
        encoding: of the files, as in `read_text`.

    Returns:
        The text, which may be empty.

    Raises:
        CorpusError: there is no such file or corpus, it cannot be read or downloaded, or it is no text.
        InvalidTextError: a file is not valid in the encoding, or looks like UTF-16 or UTF-32.
        InputError: `source` is none of these, or there is no such encoding.

    Example:
        >>> text = load_corpus("python-docs")
        >>> load_corpus(["python-docs", "python-docs"]) == text + text
        True
    """
    sources = [source] if isinstance(source, str | Path) else source
    if not isinstance(sources, Sequence) or not all(isinstance(one, str | Path) for one in sources):
        raise InputError(f"source must be a path, a name or a list of these, got {type(source).__name__}")
    if not sources:
        raise InputError("source must name at least one file or corpus, got an empty list")
    return "".join(_one_corpus(as_text(one) or one, encoding) for one in sources)


def _one_corpus(source: str | Path, encoding: str) -> str:
    if isinstance(source, str) and source in _NAMES and not as_path(source).is_file():
        return _python_docs() if source == _PYTHON_DOCS else _downloaded(_DOWNLOADS[source])
    try:
        return read_text(source, encoding=encoding)
    except CorpusError as error:
        if error.errno != errno.ENOENT or isinstance(source, Path):
            raise
        hint = did_you_mean(source, _NAMES, f"the named corpora are {' and '.join(_NAMES)}")
        raise _error(f"{quoted(source)} is neither a file nor a named corpus; {hint}", error) from None


def _bytes_of(path: str | Path, name: str) -> bytes:
    try:
        if path == "-":
            data: bytes | None = sys.stdin.buffer.read()
            if data is None:  # it does not block, and nothing is there yet
                raise BlockingIOError(
                    errno.EAGAIN, "it does not wait for its writer; give a file or a plain pipe"
                )
            return data
        return as_path(path).read_bytes()
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "")
        raise _error(f"{name} cannot be read: {error.strerror or error}{advice}", error) from error
    except (AttributeError, ValueError) as error:  # no standard input, or a closed one; a NUL in the path
        raise _error(f"{name} cannot be read: {error}", error) from error


def _codecs_of(wide: str, data: bytes) -> set[str]:
    """Return the names of Python's codecs that read a text which is known to be UTF-16 or UTF-32."""
    family, order = wide[:6].lower(), wide[6:].lower()
    if not order:  # its byte order mark says it
        return {family, f"{family}-{'le' if data.startswith(codecs.BOM_UTF16_LE) else 'be'}"}
    return {f"{family}-{order}", *([family] if sys.byteorder.startswith(order[0]) else [])}


def _no_encoding(encoding: object) -> InputError:
    return InputError(f"encoding must be a text encoding of Python, got {quoted(str(encoding), 40)}")


def _unpacked(data: bytes, name: str, *, gzip_wanted: bool, is_wide: bool) -> bytes:
    """Return the bytes of a text, and refuse what is none."""
    packed = re.match(GZIP, data) is not None
    try:
        data = gzip.decompress(data) if packed else data
    except (OSError, EOFError, zlib.error) as error:
        raise _error(
            f"{name} is damaged and cannot be decompressed: {error}; copy it again", error
        ) from error
    if kind := kind_of(data, wide=is_wide):
        raise CorpusError(f"{name} must be a text, got {kind}")
    if gzip_wanted and not packed:
        raise CorpusError(f"{name} must be compressed with gzip, as its name says, but is not; rename it")
    return data


def _invalid(data: bytes, error: UnicodeDecodeError, name: str, encoding: str) -> InvalidTextError:
    offset = error.start + len(data) - len(error.object)  # utf-8-sig counts from behind the byte order mark
    line = data.count(b"\n", 0, offset) + 1
    return InvalidTextError(
        f"{name} must be valid {encoding}, got byte 0x{data[offset]:02x} at offset {offset} (line {line}), "
        f"{error.reason}; convert it to UTF-8, or say what it is, such as latin-1: encoding=... in Python, "
        "--encoding of the command",
        offset=offset,
    )


def _python_docs() -> str:
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 - 700 kB that few programs need
    except ImportError as error:
        raise CorpusError(
            f"{_PYTHON_DOCS} is not part of this Python; pass the path of a text file"
        ) from error
    return "\n".join(topics[name] for name in sorted(topics))


def _downloaded(wanted: Download) -> str:
    file = f"{wanted.name}.txt"
    if folder := os.environ.get("CHARLM_DATA_DIR"):
        path = Path(folder, file)
        name = f"{quoted(str(path))} (CHARLM_DATA_DIR is set)"
        data = _bytes_of(path, name)
        if not wanted.matches(data):
            raise CorpusError(
                f"{name} must have {wanted.size} bytes with sha256 {wanted.sha256}, "
                f"got {kind_of(data) or 'other content'}; "
                f"put the file from {wanted.url} there"
            )
        return data.decode("utf-8")
    path = cache_folder() / file
    try:
        cached = reading.read_file(path, max_bytes=wanted.size, exact_size=wanted.size)
    except (OSError, FileFormatError):
        cached = bytearray()
    if not wanted.matches(cached):  # not there yet, or damaged
        cached = bytearray(fetch(wanted))
        _keep(path, cached)
    return cached.decode("utf-8")


def _keep(path: Path, data: bytearray) -> None:
    try:
        atomic.make_directory(path.parent)
        atomic.write_file(path, data)
    except OSError as error:
        warn(
            f"the download is not kept: {quoted(str(path))} cannot be written: {error.strerror or error}; "
            "set CHARLM_CACHE_DIR to a folder that can be written"
        )


def _error(message: str, cause: Exception) -> CorpusError:
    error = CorpusError(message)
    error.errno = cause.errno if isinstance(cause, OSError) else None
    return error
