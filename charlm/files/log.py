"""The one log of a run: lines are appended to it, and a resume cuts it back.

A line is whole once its newline is written, and readers ignore a torn last line. A failed write leaves no
torn line anywhere else; after a crash `keep_lines` comes before the next `Appender`, which is what a resume
does. Knows nothing of what the lines say.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from charlm.files.atomic import sync_directory, write_all, write_file
from charlm.files.reading import read_lines

__all__ = ["MAX_LINE", "MAX_LOG", "Appender", "keep_lines"]

MAX_LOG = 1 << 30
MAX_LINE = 256 * 1024
"""Largest log and longest line that are read, in bytes."""

# Windows lacks the first two, the others the last. Without O_NONBLOCK a pipe in the log's place would block.
_OPTIONAL_FLAGS: int = (
    getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)


class Appender:
    """The end of a log file, to which whole lines are appended.

    After a failed `append` the next one first cuts the torn line off, so a torn line can only be the last.
    One appender per file; lines survive a loss of power once the `flush` that follows them has returned.

    Args:
        path: the log; made if missing. A symbolic link is refused.

    Raises:
        OSError: from every method; the appender stays usable.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _OPTIONAL_FLAGS
        self._descriptor: int | None = os.open(path, flags, 0o666)
        try:
            self._size = os.fstat(self._descriptor).st_size
            self._torn = False
            sync_directory(path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, line: bytes) -> None:
        """Append one line, its newline included."""
        if self._torn:
            os.ftruncate(self._open_descriptor, self._size)
        self._torn = True
        write_all(self._open_descriptor, line)
        self._size += len(line)
        self._torn = False

    def flush(self) -> None:
        """Fsync what was appended."""
        os.fsync(self._open_descriptor)

    def close(self) -> None:
        """Close the file, once. Does not fsync."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    @property
    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise OSError(errno.EBADF, "this log is closed")
        return self._descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def keep_lines(
    path: str | Path,
    keep: Callable[[bytes], bool],
    *,
    max_bytes: int = MAX_LOG,
    max_line: int = MAX_LINE,
) -> None:
    """Rewrite a log with the lines that are to be kept; a torn last line always goes, as does a longer one.

    Args:
        path: the log.
        keep: says of each whole line, without its newline, whether it stays.
        max_bytes: largest log that is read.
        max_line: most bytes of a line that may stay.

    Raises:
        FileFormatError: the log is no regular file or larger than `max_bytes`.
        OSError: it could not be read or rewritten; then it is as before.
    """
    lines = read_lines(path, max_bytes=max_bytes, max_line=max_line)
    kept = [line + b"\n" for line in lines if line is not None and keep(line)]
    if sum(map(len, kept)) < Path(path).stat().st_size:
        write_file(path, kept)
