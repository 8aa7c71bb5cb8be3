"""Reading: one regular file, once, whole, into memory of a size that was checked before it was taken.

Symbolic links, directories, devices and pipes are refused without waiting on them; a file is never
memory-mapped (a mapping that gets shorter kills the process) and never opened twice. Knows nothing of what
the bytes mean: `strict_json` and `safetensors` parse the buffer that this module returns.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from charlm.errors import FileFormatError, quoted
from charlm.files.kinds import other_than_data

__all__ = ["read_file", "refusal"]

# Windows lacks O_NOFOLLOW and O_NONBLOCK; the others lack O_BINARY.
_FLAGS: int = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)
_PIECE = 1 << 20
_BEGINNING = 4096  # what a file of a wrong size is told by


def refusal(path: str | Path, reason: str) -> FileFormatError:
    """Return the error that says what a file must be and what was found, naming the file."""
    return FileFormatError(f"{quoted(str(path))} {reason}", path=str(path))


def read_file(
    path: str | Path, *, max_bytes: int, exact_size: int | None = None, growing: bool = False
) -> bytearray:
    """Read a whole regular file into memory.

    Args:
        path: the file. A symbolic link as its last part is refused, not followed.
        max_bytes: largest size that is read.
        exact_size: the only size that is read; None: any up to `max_bytes`.
        growing: it is a log, which another process may add to: what comes while it is read is left out.

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
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EMLINK}:  # EMLINK on FreeBSD
            raise refusal(path, "must be a regular file, got a symbolic link.") from error
        if error.errno == errno.ENXIO:  # a socket, or a device without a driver
            raise refusal(path, "must be a regular file, got another kind.") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise refusal(path, "must be a regular file, got another kind.")
        size = status.st_size
        if size > max_bytes or (exact_size is not None and size != exact_size):
            wanted = f"at most {max_bytes}" if exact_size is None else exact_size
            kind = other_than_data(os.read(descriptor, _BEGINNING))
            raise refusal(path, f"must have {wanted} bytes, got {size}{f' of {kind}' if kind else ''}.")
        try:
            data, end = bytearray(size), 0
        except MemoryError as error:
            raise refusal(path, f"must fit into memory, got {size} bytes.") from error
        # One byte more than is left is asked for, so that a file that grows is noticed.
        beyond = 0 if growing else 1
        while piece := os.read(descriptor, min(_PIECE, size - end + beyond)):
            start, end = end, end + len(piece)
            if end > size:
                break
            data[start:end] = piece
        if end != size:
            raise refusal(path, f"must keep its {size} bytes while it is read, got {end} or more. Try again.")
        return data
    finally:
        os.close(descriptor)
