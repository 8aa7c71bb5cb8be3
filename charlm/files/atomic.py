# ruff: noqa: PTH101, PTH102, PTH104, PTH105, PTH106, PTH108, PTH208 - system calls by their own names, to be
# counted and failed
"""Atomic, durable writing of files and directories.

New bytes go to a temporary name beside the target, are fsynced, and are renamed into place; then the
parent directory is fsynced. If a step fails, its `OSError` is raised, the temporary file is removed, and the
old content stays. An fsync that failed is never repeated, because the kernel may have dropped the pages.
A file that replaces another gets its mode, so nobody gains the right to read it. A write deletes what killed
processes left beside its target a day ago or earlier.
Every system call is reached as `os.name`, so that tests can make each one fail or kill the process there. The
method is that of SQLite ("Atomic Commit In SQLite", https://sqlite.org/atomiccommit.html).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from charlm.errors import quoted
from charlm.plain import as_path

__all__ = [
    "Content",
    "FileDigest",
    "check_writable",
    "is_left_behind",
    "make_directory",
    "remove_directory",
    "remove_file",
    "remove_left_behind",
    "rename_file",
    "replace_directory",
    "standing_directory",
    "sync_directory",
    "write_all",
    "write_directory",
    "write_file",
]

Piece: TypeAlias = bytes | bytearray | memoryview
Content: TypeAlias = Piece | Iterable[Piece]
"""The bytes of one file, in one piece or in several."""

# Windows has neither O_NOFOLLOW nor directories that can be opened; the others lack O_BINARY.
_NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_BINARY: int = getattr(os, "O_BINARY", 0)
_DIRECTORY: int | None = getattr(os, "O_DIRECTORY", None)
_HAS_MODES: bool = os.name == "posix"  # Windows has one bit of them, and no chmod of an open file before 3.13

_TEMPORARY = re.compile(r"\.tmp-\d+-[0-9a-f]{8}")
_LARGE = 1 << 20  # bytes of a piece that is worth a thread
_DAY = 24 * 60 * 60.0  # seconds; no write takes so long, and the clocks of two machines differ by less

# Errors of some network file systems for the fsync of a directory; PostgreSQL's fd.c ignores them, too.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP}


@dataclass(frozen=True)
class FileDigest:
    """The size of a written file in bytes and its sha256 in hexadecimal."""

    size: int
    sha256: str


def write_file(path: str | Path, data: Content) -> FileDigest:
    r"""Write a whole file, replacing one that is there.

    Args:
        path: the file, in a directory that exists. A symbolic link is replaced, not followed.
        data: its bytes; an iterable is consumed while writing, and may raise to cancel the write.

    Returns:
        Its size and sha256.

    Raises:
        OSError: the file could not be written; the error names it. The old content stays, unless only the
            fsync of the parent failed: then the new content is there, but may not survive a loss of power.

    Example:
        >>> path = Path(getfixture("tmp_path")) / "notes.txt"
        >>> write_file(path, [b"one\n", b"two\n"]).size
        8
        >>> path.read_bytes()
        b'one\ntwo\n'
    """
    target = as_path(path)
    _remove_abandoned(target.parent)
    try:
        temporary = _temporary_beside(target)
        digest = _write_new(temporary, data, like=target)
        with _removed_on_error(temporary):
            os.replace(temporary, target)
        sync_directory(target.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # after a write or fsync
            error.filename = str(target)
        raise
    return digest


def check_writable(target: str | Path, *, directory: bool = False) -> None:
    """Check before long work that its result can be written, by making a file there and removing it.

    Permissions are not enough: root has all of them, also where nothing can be written.

    Args:
        target: the path for `write_file`.
        directory: the target is a directory of files; `make_directory` makes it if it is missing.

    Raises:
        OSError: it cannot be written.
    """
    target = as_path(target)
    with contextlib.suppress(FileNotFoundError):
        os.lstat(target)  # a name that is too long, or below a file
    if directory:
        while not os.path.lexists(target) and target != target.parent:  # a drive may be missing altogether
            target = target.parent
        target /= "file"
    elif target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    probe = _temporary_beside(target)
    _write_new(probe, b"")
    os.unlink(probe)


def write_directory(
    target: str | Path,
    files: Mapping[str, Content],
    *,
    seal: Callable[[Mapping[str, FileDigest]], tuple[str, bytes]] | None = None,
    temporary: str | None = None,
) -> dict[str, FileDigest]:
    """Write a directory of files atomically.

    Args:
        target: the directory. Its parent must exist, and it must not.
        files: content by plain file name, written in this order.
        seal: returns the name and content of the last file, the commit record, from the digests of all
            others.
        temporary: the end of the temporary directory's name, `.tmp-<pid>-<temporary>`; None: a random number.

    Returns:
        The digest of every file by name, the seal's included.

    Raises:
        FileExistsError: `target` exists.
        OSError: the directory could not be written, and nothing is left of it, unless only the fsync of the
            parent failed: then it is there, but may not survive a loss of power.
    """
    target = as_path(target)
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "there is something here already", str(target))
    staging = _temporary_beside(target, temporary)
    digests = _fill_new(staging, files, seal)
    with _removed_on_error(staging):
        os.rename(staging, target)
    sync_directory(target.parent)
    return digests


def replace_directory(
    target: str | Path, files: Mapping[str, Content], *, owned: Collection[str]
) -> dict[str, FileDigest]:
    """Write a directory of files in place of an old one, if there is one.

    The old directory is renamed to `.old-<name>`, the new one is renamed into place, and the old one is
    deleted. A crash between the renames leaves the old one under its second name: `standing_directory` finds
    it there, and the next `replace_directory` restores it first.

    Args:
        target: the directory; its parent exists.
        files: content by plain file name, written in this order.
        owned: names of files that may be deleted from the old directory.

    Returns:
        The digest of every file by name.

    Raises:
        FileExistsError: `target` is no directory, or holds other files.
        OSError: the directory could not be written, and the old one is there; or the old one could not be
            deleted or the parent not be synced, and the new one is there.
    """
    target = as_path(target)
    _remove_abandoned(target.parent, owned)
    old = _second_name(target)
    if os.path.lexists(old):  # an earlier call ended before its second rename, or while it deleted
        if os.path.lexists(target):
            sync_directory(target.parent)
            _delete_owned(old, owned)
        else:
            os.rename(old, target)
    if not os.path.lexists(target):
        return write_directory(target, files)
    _refuse_foreign(target, owned)
    staging = _temporary_beside(target)
    digests = _fill_new(staging, files, like=target)
    with _removed_on_error(staging):
        os.rename(target, old)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(old, target)
            raise
    sync_directory(target.parent)
    _delete_owned(old, owned)
    return digests


def standing_directory(target: str | Path) -> Path:
    """Return the present path of a directory that `replace_directory` writes.

    Returns:
        `target`, or its second name if a crash left the directory only there.
    """
    target = as_path(target)
    # In this order: the target is missing between the two renames of another process.
    return target if os.path.lexists(target) or not os.path.lexists(old := _second_name(target)) else old


def make_directory(path: str | Path) -> None:
    """Make a directory and its missing parents, each durable. An existing directory is left as it is.

    Raises:
        OSError: it could not be made, or is something other than a directory.
    """
    path = as_path(path)
    if path.is_dir():  # perhaps made by a process that was killed before it was durable
        with contextlib.suppress(PermissionError):  # the parent of another user's directory, say
            sync_directory(path.parent)
        return
    if path != path.parent:  # the root of a drive that is missing
        make_directory(path.parent)
    with contextlib.suppress(FileExistsError):  # made by another process in between; or a file, seen below
        os.mkdir(path)
    sync_directory(path.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "this is not a directory", str(path))


def remove_directory(path: str | Path, trash: str | Path) -> None:
    """Delete a directory: rename it to `trash`, so that it is gone at once, then delete that.

    Symbolic links inside are deleted, not followed.

    Args:
        path: the directory. A symbolic link to one is refused.
        trash: a free name beside it, or `path` to finish a deletion that was interrupted.

    Raises:
        OSError: it could not be renamed or deleted.
    """
    path = as_path(path)
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "this is not a directory", str(path))
    os.rename(path, trash)
    sync_directory(path.parent)
    shutil.rmtree(trash)


def is_left_behind(name: str) -> bool:
    """Return whether this is the name of a temporary file or directory, which a killed write leaves.

    Example:
        >>> is_left_behind(".tmp-4711-5f3a9c1e")
        True
    """
    return _TEMPORARY.fullmatch(name) is not None


def remove_file(path: str | Path) -> None:
    """Delete a regular file; anything else is left alone.

    Raises:
        OSError: it could not be deleted.
    """
    if stat.S_ISREG(os.lstat(path).st_mode):
        os.unlink(path)


def remove_left_behind(directory: str | Path) -> None:
    """Delete temporary files of any age from a directory if their processes are dead.

    Only one machine at a time may write to the directory.
    """
    for name in os.listdir(directory):
        if is_left_behind(name) and not _lives(int(name.split("-")[1])):
            with contextlib.suppress(OSError):
                remove_file(as_path(directory) / name)


def _lives(pid: int) -> bool:
    if os.name != "posix":  # Windows would send a signal
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def rename_file(path: str | Path, name: str) -> None:
    """Rename a file in its directory; a file of the new name is replaced.

    Raises:
        OSError: it could not be renamed, or the new name may not survive a loss of power.
    """
    target = Path(path).with_name(name)
    os.replace(path, target)
    sync_directory(target.parent)


def write_all(descriptor: int, piece: Piece) -> int:
    """Write all bytes of one piece, in as many calls as it takes, and return their number.

    Raises:
        OSError: not all bytes were written.
    """
    rest = memoryview(piece).cast("B")
    size = len(rest)
    while rest:
        written = os.write(descriptor, rest)
        if written == 0:
            raise OSError(errno.EIO, "the file system wrote nothing and gave no reason")
        rest = rest[written:]
    return size


def sync_directory(path: Path) -> None:
    """Fsync a directory, so that changes of the names in it survive a loss of power.

    It does nothing where directories cannot be synced: on Windows, and on some network file systems.

    Raises:
        OSError: the sync failed; the changes may or may not be durable.
    """
    if _DIRECTORY is None:
        return
    descriptor = os.open(path, os.O_RDONLY | _DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def _temporary_beside(target: Path, suffix: str | None = None) -> Path:
    return target.parent / f".tmp-{os.getpid()}-{suffix or secrets.token_hex(4)}"


def _second_name(target: Path) -> Path:
    return target.parent / f".old-{target.name}"


def _remove_abandoned(directory: Path, owned: Collection[str] = ()) -> None:
    """Delete temporary files and directories that are a day old or older, as far as possible.

    Those of running writes are younger. A directory that holds other files stays.
    """
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if is_left_behind(entry.name):
                with contextlib.suppress(OSError):
                    path = Path(entry.path)
                    is_directory = entry.is_dir(follow_symlinks=False)
                    parts = [path / name for name in os.listdir(path)] if is_directory else []
                    if max(os.lstat(part).st_mtime for part in (path, *parts)) > time.time() - _DAY:
                        continue
                    if is_directory:
                        _delete_owned(path, owned)
                    else:
                        remove_file(path)


def _mode_of(path: Path | None) -> int | None:
    """Return the mode of a file or directory that will be replaced; None: the umask applies."""
    try:
        mode = 0 if path is None or not _HAS_MODES else os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    return stat.S_IMODE(mode) if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else None


def _write_new(path: Path, content: Content, like: Path | None = None) -> FileDigest:
    """Create, write, fsync and close one file; remove it if a step fails.

    Args:
        path: the file.
        content: its bytes.
        like: the path that it will replace; if this exists, the file gets its mode.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _BINARY
    mode = _mode_of(like)
    descriptor = os.open(path, flags, 0o666 if mode is None else mode)
    with _removed_on_error(path):
        try:
            if mode is not None and mode != stat.S_IMODE(os.fstat(descriptor).st_mode):
                os.chmod(descriptor, mode)
            digest, size = hashlib.sha256(), 0
            for piece in [content] if isinstance(content, (bytes, bytearray, memoryview)) else content:
                with _beside(digest.update, piece):
                    size += write_all(descriptor, piece)
            os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        os.close(descriptor)  # some file systems report a failed write only here
    return FileDigest(size, digest.hexdigest())


@contextlib.contextmanager
def _beside(work: Callable[[Piece], None], piece: Piece) -> Iterator[None]:
    """Call `work` with a piece beside the block, in a thread if the piece is large."""
    if memoryview(piece).nbytes < _LARGE:
        work(piece)
        yield
        return
    thread = threading.Thread(target=work, args=(piece,))
    try:
        thread.start()
    except RuntimeError:  # no more threads are to be had
        work(piece)
        yield
        return
    try:
        yield
    finally:
        thread.join()


def _fill_new(
    directory: Path,
    files: Mapping[str, Content],
    seal: Callable[[Mapping[str, FileDigest]], tuple[str, bytes]] | None = None,
    like: Path | None = None,
) -> dict[str, FileDigest]:
    """Create a directory and its files, all fsynced; remove it if a step fails."""
    mode = _mode_of(like)
    os.mkdir(directory, 0o777 if mode is None else mode | stat.S_IRWXU)
    with _removed_on_error(directory):
        digests = {
            name: _write_new(directory / name, content, None if like is None else like / name)
            for name, content in files.items()
        }
        if seal is not None:
            name, content = seal(digests)
            digests[name] = _write_new(directory / name, content)
        if mode is not None and mode != stat.S_IMODE(os.lstat(directory).st_mode):
            os.chmod(directory, mode)
        sync_directory(directory)
    return digests


def _refuse_foreign(directory: Path, owned: Collection[str]) -> None:
    if not stat.S_ISDIR(os.lstat(directory).st_mode):
        raise FileExistsError(errno.EEXIST, "this is not a directory", str(directory))
    foreign = sorted(set(os.listdir(directory)) - set(owned))
    if foreign:
        reason = f"this directory holds files of others ({quoted(foreign[0], 80)})"
        raise FileExistsError(errno.EEXIST, reason, str(directory))


def _delete_owned(directory: Path, owned: Collection[str]) -> None:
    """Delete a directory of owned files. If other files appear meanwhile, rmdir fails and they stay."""
    _refuse_foreign(directory, owned)
    for name in sorted(set(os.listdir(directory)) & set(owned)):
        os.unlink(directory / name)
    os.rmdir(directory)


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    """Remove a temporary file or flat directory by name if the block fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the first error says more
            if path.is_dir():
                for name in os.listdir(path):
                    os.unlink(path / name)
                os.rmdir(path)
            else:
                os.unlink(path)
        raise
