"""Reads texts: from files, from standard input, and corpora by name.

Text is decoded strictly and never changed: line ends, byte order marks and NULs arrive as they were
written. A downloaded corpus is checked before it is stored or used, so the cache folder holds the right
bytes or none. This module knows no tokenizers.
`tinyshakespeare` is the corpus of the lecture "Let's build GPT", and of char-rnn before it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from charlm.errors import CorpusError, FileFormatError, InputError, did_you_mean, quoted, warn
from charlm.files import atomic, reading
from charlm.files.folders import cache_folder
from charlm.files.kinds import kind_of
from charlm.plain import as_path, as_text
from charlm.text.download import Download, fetch
from charlm.text.pieces import corpus_error, reading_errors, text_pieces

__all__ = ["corpus_pieces", "is_named", "load_corpus", "read_text"]

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


def read_text(path: str | Path, *, encoding: str = "utf-8") -> str:
    """Return the text of a file, unchanged: line ends, a byte order mark and NULs are kept.

    Args:
        path: the file; the string "-" is standard input. A gzip file is decompressed.
        encoding: the encoding of the file; any text encoding of Python.

    Raises:
        CorpusError: the file is missing, a directory, unreadable or damaged, or no text: a pointer of Git
            LFS, an archive, a PDF or the like. `errno` is the system's reason.
        InvalidTextError: the bytes are not valid in the encoding, or they look like UTF-16 or UTF-32.
            `offset` is the place of the first bad byte, after decompression.
        InputError: Python has no such encoding.
    """
    return "".join(text_pieces(path, encoding=encoding))


def load_corpus(source: str | Path | Sequence[str | Path], *, encoding: str = "utf-8") -> str:
    """Return the text of a file, of a named corpus, or of several of these.

    There are two named corpora. `python-docs` is Python's own documentation (`pydoc_data.topics`), which
    differs between versions of Python. `tinyshakespeare` has 1,115,394 characters; it is read from the
    folder `$CHARLM_DATA_DIR` if that is set, else downloaded once into the cache folder.

    Args:
        source: a path, "-" for standard input, or a name; or a list of these, whose texts are joined as
            `cat` does. A string is a path if there is such a file, else a name. A `Path` is never a name.
        encoding: of the files, as in `read_text`.

    Returns:
        The text, which may be empty.

    Raises:
        CorpusError: there is no such file or corpus, it cannot be read or downloaded, or it is no text.
        InvalidTextError: a file is not valid in the encoding, or looks like UTF-16 or UTF-32.
        InputError: `source` has a wrong type or is an empty list, or Python has no such encoding.

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
    return "".join(
        piece for one in sources for piece in corpus_pieces(as_text(one) or one, encoding=encoding)
    )


def is_named(source: str | Path) -> bool:
    """Return whether a source is the name of a corpus and not a path."""
    return isinstance(source, str) and source in _NAMES and not as_path(source).is_file()


def corpus_pieces(
    source: str | Path, *, encoding: str = "utf-8", on_read: Callable[[int], None] | None = None
) -> Iterator[str]:
    """Yield the text of a file or named corpus in pieces, so that it need not fit into memory.

    Arguments and errors are those of `load_corpus`; `on_read` is that of `text_pieces`.
    """
    if is_named(source):
        yield _python_docs() if source == _PYTHON_DOCS else _downloaded(_DOWNLOADS[str(source)])
        return
    try:
        yield from text_pieces(source, encoding=encoding, on_read=on_read)
    except CorpusError as error:
        if error.errno != errno.ENOENT or isinstance(source, Path):
            raise
        hint = did_you_mean(source, _NAMES, f"the named corpora are {' and '.join(_NAMES)}")
        raise corpus_error(f"{quoted(source)} is neither a file nor a named corpus; {hint}", error) from None


def _python_docs() -> str:
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 - 700 kB that few programs need
    except ImportError as error:
        raise CorpusError(
            f"{_PYTHON_DOCS} is not part of this Python; pass the path of a text file"
        ) from error
    return "\n".join(topics[name] for name in sorted(topics))


def _downloaded(download: Download) -> str:
    file = f"{download.name}.txt"
    if folder := os.environ.get("CHARLM_DATA_DIR"):
        path = Path(folder, file)
        name = f"{quoted(str(path))} (CHARLM_DATA_DIR is set)"
        with reading_errors(name):
            data = path.read_bytes()
        if not download.matches(data):
            raise CorpusError(
                f"{name} must have {download.size} bytes with sha256 {download.sha256}, "
                f"got {kind_of(data) or 'other content'}; put the file from {download.url} there"
            )
        return data.decode("utf-8")
    path = cache_folder() / file
    try:
        cached = reading.read_file(path, max_bytes=download.size, exact_size=download.size)
    except (OSError, FileFormatError):
        cached = bytearray()
    if not download.matches(cached):  # not there yet, or damaged
        cached = bytearray(fetch(download))
        try:
            atomic.make_directory(path.parent)
            atomic.write_file(path, cached)
        except OSError as error:
            reason = error.strerror or error
            warn(
                f"the download is not kept: {quoted(str(path))} cannot be written: {reason}; "
                "set CHARLM_CACHE_DIR to a folder that can be written"
            )
    return cached.decode("utf-8")
