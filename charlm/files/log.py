"""The log of a run: lines are appended, and a resume removes those after its checkpoint.

A line is whole once its newline is written, and readers ignore an incomplete last line. A failed write leaves
no incomplete line elsewhere. After a crash, a resume calls `keep_lines` before it makes an `Appender`. After
a failed fsync, the kernel may drop the written bytes and still report success for the next fsync, so the
lines since the last successful one are written again.
"""

from __future__ import annotations

import contextlib
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


_MOST_UNSYNCED = 1 << 20  # bytes of lines that are kept until they are synced


class Appender:
    """Appends whole lines to a log file.

    After a failed `append`, the next call first removes the incomplete line, so only the last line can be
    incomplete. After a failed `flush`, the next call writes the lines again that were not durable. A file may
    have one appender. A line survives a loss of power once a `flush` after it has returned.

    Args:
        path: the log, which is made if it is missing. A symbolic link is refused.

    Raises:
        OSError: from every method; the appender stays usable.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._unsynced = bytearray()  # whole lines
        self._is_torn = self._is_lost = False
        self._descriptor: int | None = self._opened()
        try:
            self._synced_size = os.fstat(self._descriptor).st_size
            os.fsync(self._descriptor)  # of lines whose process was killed
            sync_directory(self._path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, line: bytes) -> None:
        """Append one line, its newline included."""
        self._mend()
        self._is_torn = True
        write_all(self._open_descriptor, line)
        self._is_torn = False
        self._unsynced += line
        if len(self._unsynced) > _MOST_UNSYNCED:
            self.flush()

    def flush(self) -> None:
        """Fsync the appended lines."""
        self._mend()
        self._is_lost = True
        os.fsync(self._open_descriptor)
        self._is_lost = False
        self._synced_size += len(self._unsynced)
        self._unsynced.clear()

    def close(self) -> None:
        """Close the file, once. Does not fsync."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self._mend()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _OPTIONAL_FLAGS, 0o666)

    def _mend(self) -> None:
        """Repair the end of the file after a call that failed."""
        if self._is_lost:
            descriptor, self._descriptor = self._open_descriptor, self._opened()
            with contextlib.suppress(OSError):  # it may report the failed fsync again
                os.close(descriptor)
            os.ftruncate(self._descriptor, self._synced_size)
            write_all(self._descriptor, self._unsynced)
        elif self._is_torn:
            os.ftruncate(self._open_descriptor, self._synced_size + len(self._unsynced))
        self._is_lost = self._is_torn = False

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
    """Rewrite a log with some of its lines; an incomplete last line and lines that are too long are removed.

    Args:
        path: the log.
        keep: called with each whole line, without its newline; returns whether to keep it.
        max_bytes: largest log that is read.
        max_line: largest line that is kept, in bytes.

    Raises:
        FileFormatError: the log is no regular file or larger than `max_bytes`.
        OSError: it could not be read or rewritten. It is unchanged.
    """
    lines = read_lines(path, max_bytes=max_bytes, max_line=max_line)
    kept = [line + b"\n" for line in lines if line is not None and keep(line)]
    if sum(map(len, kept)) < Path(path).stat().st_size:
        write_file(path, kept)
