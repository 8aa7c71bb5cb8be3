"""Reading: a regular file, once, into memory of a size that was checked before it was taken.

Symbolic links, directories, devices and pipes are refused without waiting on them; a file is never
memory-mapped (a mapping that gets shorter kills the process) and never opened twice. The files of one
directory are read together, though another may take its place meanwhile. What is larger than memory is read
at offsets (`OpenFile`). Knows nothing of what the bytes mean: `strict_json` and `safetensors` parse what this
module returns.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from charlm.errors import CharLMError, FileFormatError, quoted
from charlm.files.kinds import other_than_data

__all__ = ["OpenFile", "read_file", "read_lines", "read_together", "refusal"]

# Windows lacks O_NOFOLLOW and O_NONBLOCK; the others lack O_BINARY.
_FLAGS: int = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)
# Windows cannot open a directory; and only Linux can without the right to list it.
_DIRECTORY: int | None = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY if os.name == "posix" else None
_PIECE = 1 << 20
_AT_ONCE = 1 << 30  # bytes: macOS refuses to read 2 GiB in one call
_BEGINNING = 4096  # what a file of a wrong size is told by

T = TypeVar("T")


def refusal(path: str | Path, reason: str) -> FileFormatError:
    """Return the error that says what a file must be and what was found, naming the file."""
    return FileFormatError(f"{quoted(str(path))} {reason}", path=str(path))


def read_file(
    path: str | Path,
    *,
    max_bytes: int,
    exact_size: int | None = None,
    inside: int | None = None,
    larger_if_stored: bool = False,
) -> bytearray:
    """Read a whole regular file into memory.

    Args:
        path: the file. A symbolic link as its last part is refused, not followed.
        max_bytes: largest size that is read.
        exact_size: the only size that is read; None: any up to `max_bytes`.
        inside: the open directory that holds the file, from `read_together`; None: the one that `path` names.
        larger_if_stored: read more than `max_bytes`, too, if the disk holds as much for the file: only what
            has holes, which nobody wrote, or was compressed by the file system is refused.

    Returns:
        Its bytes, in a buffer that belongs to the caller.

    Raises:
        FileFormatError: no regular file, a wrong size, or a size that changed while reading.
        OSError: it is missing or cannot be read.

    Example:
        >>> path = Path(getfixture("tmp_path")) / "notes.txt"
        >>> _ = path.write_bytes(b"one")
        >>> read_file(path, max_bytes=1024)
        bytearray(b'one')
    """
    with _opened(path, max_bytes, exact_size, inside, larger_if_stored) as (descriptor, size):
        try:
            data, end = bytearray(size), 0
        except MemoryError as error:
            raise refusal(path, f"must fit into memory, got {size} bytes.") from error
        # One byte more than is left is asked for, so that a file that grows is noticed.
        while piece := os.read(descriptor, min(_PIECE, size - end + 1)):
            start, end = end, end + len(piece)
            if end > size:
                break
            data[start:end] = piece
        if end != size:
            raise refusal(path, f"must keep its {size} bytes while it is read, got {end} or more. Try again.")
        return data


def read_lines(path: str | Path, *, max_bytes: int, max_line: int) -> Iterator[bytes | None]:
    """Yield the lines of a log as they are read, without their newlines and without a torn last one.

    Args:
        path: the log. What another process adds to it meanwhile is left out.
        max_bytes: largest size that is read.
        max_line: most bytes of a line; None is yielded in the place of one that has more.

    Raises:
        FileFormatError: no regular file, too large a one, or one that is cut while it is read.
        OSError: it is missing or cannot be read.
    """
    with _opened(path, max_bytes) as (descriptor, size):
        rest, too_long, left = b"", False, size
        while left and (piece := os.read(descriptor, min(_PIECE, left))):
            left -= len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield None if too_long or len(line) > max_line else line
                too_long = False
            if len(rest) > max_line:
                rest, too_long = b"", True
        if left:
            raise refusal(path, f"must keep its {size} bytes while it is read, got {size - left}. Try again.")


def read_together(find: Callable[[], Path], read: Callable[[Path, int | None], T]) -> T:
    """Read files of one directory, none of them from another that takes its place meanwhile.

    Args:
        find: says where the directory stands now.
        read: reads the files by `read_file(directory / name, inside=descriptor)`. It is called again with
            the new directory, whatever came of the call, if another stands there when it returns.

    Returns:
        What `read` returned.

    Raises:
        OSError: there is no such directory, or what `read` raised.
    """
    while True:
        directory = find()
        failure, is_same = None, False
        with contextlib.ExitStack() as stack:
            descriptor = None
            try:
                if _DIRECTORY is not None:
                    descriptor = os.open(directory, _DIRECTORY)
                    stack.callback(os.close, descriptor)
                status = directory.stat() if descriptor is None else os.fstat(descriptor)
            except FileNotFoundError:
                if find() == directory and not directory.exists():
                    raise
                continue
            try:
                result = read(directory, descriptor)
            except (CharLMError, OSError) as error:
                failure = error
            with contextlib.suppress(FileNotFoundError):  # it is being replaced this moment
                is_same = find() == directory and os.path.samestat(directory.stat(), status)
        if is_same and failure is not None:
            raise failure
        if is_same:
            return result


class OpenFile:
    """A regular file of a known size that stays open, to be read at any place by any number of threads.

    Args:
        path: the file. A symbolic link as its last part is refused, not followed.
        size: the only size that it may have.

    Raises:
        FileFormatError: no regular file, or another size.
        OSError: it is missing or cannot be read.

    Example:
        >>> path = Path(getfixture("tmp_path")) / "notes.txt"
        >>> _ = path.write_bytes(b"one two")
        >>> word = bytearray(3)
        >>> OpenFile(path, 7).read_into(word, 4)
        >>> word
        bytearray(b'two')
    """

    path: Path
    size: int

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._descriptor, _ = _open(path, size, size, None, False)
        self._place = threading.Lock()  # where a file has one place alone, on Windows
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def stamp(self) -> str:
        """What changes when anybody writes to the file, or puts another in its place."""
        status = os.fstat(self._descriptor)
        return f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill a buffer with what stands at an offset in bytes.

        Raises:
            FileFormatError: the file has become shorter.
        """
        rest = memoryview(buffer).cast("B")
        while rest:
            got = self._read(rest[:_AT_ONCE], offset)
            if not got:
                raise refusal(self.path, f"must keep its {self.size} bytes, and has become shorter.")
            rest, offset = rest[got:], offset + got

    def _read(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [buffer], offset)
        with self._place:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            piece = os.read(self._descriptor, len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def sha256(self) -> str:
        """Return the sha256 of the whole file in hexadecimal, read in little memory."""
        digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
        for offset in range(0, self.size, _PIECE):
            part = piece[: self.size - offset]
            self.read_into(part, offset)
            digest.update(part)
        return digest.hexdigest()


@contextlib.contextmanager
def _opened(
    path: str | Path,
    max_bytes: int,
    exact_size: int | None = None,
    inside: int | None = None,
    larger_if_stored: bool = False,
) -> Iterator[tuple[int, int]]:
    """Open a regular file of the right size, yield its descriptor and its size, and close it."""
    descriptor, size = _open(path, max_bytes, exact_size, inside, larger_if_stored)
    try:
        yield descriptor, size
    finally:
        os.close(descriptor)


def _open(
    path: str | Path, max_bytes: int, exact_size: int | None, inside: int | None, larger_if_stored: bool
) -> tuple[int, int]:
    """Open a regular file of the right size, and return its descriptor and its size."""
    try:
        descriptor = os.open(path if inside is None else Path(path).name, _FLAGS, dir_fd=inside)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EMLINK}:  # EMLINK on FreeBSD
            raise refusal(path, "must be a regular file, got a symbolic link.") from error
        # A socket, the second on macOS; or a device without a driver.
        if error.errno in {errno.ENXIO, errno.EOPNOTSUPP}:
            raise refusal(path, "must be a regular file, got another kind.") from error
        error.filename = str(path)  # not the last part of it alone
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise refusal(path, "must be a regular file, got another kind.")
        size = status.st_size
        if larger_if_stored:  # Windows does not tell it
            max_bytes = max(max_bytes, status.st_blocks * 512 if hasattr(status, "st_blocks") else size)
        if size > max_bytes or (exact_size is not None and size != exact_size):
            wanted = f"at most {max_bytes}" if exact_size in {None, size} else exact_size
            kind = other_than_data(os.read(descriptor, _BEGINNING))
            raise refusal(path, f"must have {wanted} bytes, got {size}{f' of {kind}' if kind else ''}.")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, size
