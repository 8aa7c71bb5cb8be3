"""Reading of regular files into memory, with the size checked before memory is taken.

Symbolic links, directories, devices and pipes are refused without waiting for them. A file is never
memory-mapped (access to a mapping of a shortened file kills the process) and never opened twice. Files of one
directory can be read together, even if another directory may replace it meanwhile. Files larger than memory
are read at offsets (`OpenFile`). `strict_json` and `safetensors` parse the bytes.
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
# Windows cannot open a directory, and only Linux can open one without the right to list it.
_DIRECTORY: int | None = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY if os.name == "posix" else None
_PIECE = 1 << 20
_AT_ONCE = 1 << 30  # bytes: macOS refuses to read 2 GiB in one call
_BEGINNING = 4096  # bytes that identify the kind of a file with a wrong size

T = TypeVar("T")


def refusal(path: str | Path, reason: str) -> FileFormatError:
    """Return the error for a file, with its name and the reason."""
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
        exact_size: the required size, or None for any up to `max_bytes`.
        inside: the open directory of the file, from `read_together`; None: that of `path`.
        larger_if_stored: read more than `max_bytes`, too, if the file takes as much on the disk. So only
            files with holes, or compressed by the file system, are refused.

    Returns:
        Its bytes, in a new buffer.

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
        # One more byte than is left is requested, to notice a file that grows.
        while piece := os.read(descriptor, min(_PIECE, size - end + 1)):
            start, end = end, end + len(piece)
            if end > size:
                break
            data[start:end] = piece
        if end != size:
            raise refusal(path, f"must keep its {size} bytes while it is read, got {end} or more. Try again.")
        return data


def read_lines(path: str | Path, *, max_bytes: int, max_line: int) -> Iterator[bytes | None]:
    """Yield the lines of a log while it is read, without newlines and without an incomplete last line.

    Args:
        path: the log. Lines that another process adds meanwhile are ignored.
        max_bytes: largest size that is read.
        max_line: largest line in bytes; None is yielded in place of a longer one.

    Raises:
        FileFormatError: no regular file, too large, or shortened while it is read.
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
    """Read several files of one directory, none of them from a directory that replaces it meanwhile.

    Args:
        find: returns the present path of the directory.
        read: reads the files by `read_file(directory / name, inside=descriptor)`. If the directory was
            replaced meanwhile, the result or error is dropped and `read` is called with the new one.

    Returns:
        The result of `read`.

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
            with contextlib.suppress(FileNotFoundError):  # it is being replaced
                is_same = find() == directory and os.path.samestat(directory.stat(), status)
        if is_same and failure is not None:
            raise failure
        if is_same:
            return result


class OpenFile:
    """A regular file of a known size that stays open. Any number of threads may read it at any offset.

    Args:
        path: the file. A symbolic link as its last part is refused, not followed.
        size: the required size.

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
        """A text that changes if the file is written or replaced."""
        status = os.fstat(self._descriptor)
        return f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill a buffer with the bytes at an offset.

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
    """Open a regular file and check its size; yield its descriptor and size, then close it."""
    descriptor, size = _open(path, max_bytes, exact_size, inside, larger_if_stored)
    try:
        yield descriptor, size
    finally:
        os.close(descriptor)


def _open(
    path: str | Path, max_bytes: int, exact_size: int | None, inside: int | None, larger_if_stored: bool
) -> tuple[int, int]:
    """Open a regular file and check its size; return its descriptor and size."""
    try:
        descriptor = os.open(path if inside is None else Path(path).name, _FLAGS, dir_fd=inside)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EMLINK}:  # EMLINK on FreeBSD
            raise refusal(path, "must be a regular file, got a symbolic link.") from error
        # A socket, the second on macOS; or a device without a driver.
        if error.errno in {errno.ENXIO, errno.EOPNOTSUPP}:
            raise refusal(path, "must be a regular file, got another kind.") from error
        error.filename = str(path)  # not only its last part
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise refusal(path, "must be a regular file, got another kind.")
        size = status.st_size
        if larger_if_stored:  # Windows has no st_blocks
            max_bytes = max(max_bytes, status.st_blocks * 512 if hasattr(status, "st_blocks") else size)
        if size > max_bytes or (exact_size is not None and size != exact_size):
            limit = f"at most {max_bytes}" if exact_size in {None, size} else exact_size
            kind = other_than_data(os.read(descriptor, _BEGINNING))
            raise refusal(path, f"must have {limit} bytes, got {size}{f' of {kind}' if kind else ''}.")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, size
