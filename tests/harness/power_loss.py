"""A disk that loses power: what may be on it after a crash, as adversarial as POSIX allows.

`recorded` notes the system calls of real work. `Disk` replays the first n of them and says what had not been
made durable: a file's data is durable by fsync of the file, a name by fsync of its directory. Each write that
is not may be there, missing, torn at any byte, or have left zeros or garbage; of the names that are not, any
subset may be there, applied in order, with impossible ones skipped (a rename is one of them, by itself).
After an fsync that failed, the writes before it never come to the disk, whatever a later one says.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

__all__ = ["Disk", "Operation", "Recording", "Tree", "recorded"]

# A test may replace the functions of `os` once more, to kill at one of them: the recorder's own calls are not
# among them.
_stat, _fstat, _lstat = os.stat, os.fstat, os.lstat

Tree: TypeAlias = Mapping[str, bytes | None]
"""What stands on a disk: contents by path, None for a directory."""


@dataclass(frozen=True)
class Operation:
    """One call that changed something, made something durable, or was noted by the test.

    Files and directories go by numbers of their own, which are never used again.
    """

    kind: str
    """"create", "mkdir", "rename", "remove", "write", "cut", "sync", "lose", or "note"."""
    inode: int = 0
    """What is written, cut or synced; for a name, the directory that holds it."""
    name: str = ""
    """The name that is made, renamed or removed."""
    target: str = ""
    """What it is renamed to."""
    made: int = 0
    """The new file or directory of a "create" or "mkdir"."""
    offset: int = 0
    data: bytes = b""
    note: object = None


@dataclass
class Recording:
    """The operations of some work under one directory, which is number 0 and was empty."""

    root: Path
    operations: list[Operation] = field(default_factory=list)
    inodes: dict[int, int] = field(default_factory=dict)
    """Own numbers by those of the real file system, which uses them again."""

    def note(self, value: object) -> None:
        """Note what is true from here on."""
        self.operations.append(Operation("note", note=value))

    def lose(self, descriptor: int) -> None:
        """Note that an fsync of this file has failed."""
        self.operations.append(Operation("lose", self.inodes[_fstat(descriptor).st_ino]))

    def of_directory(self, path: Path, descriptor: int | None = None) -> int | None:
        """Return the number of the directory that holds a path, or None outside of the root."""
        found = _stat(path.parent) if descriptor is None else _fstat(descriptor)
        return self.inodes.get(found.st_ino)

    def new(self, kind: str, directory: int | None, path: Path) -> None:
        """Note a new file or directory."""
        if directory is not None:
            made = 1 + sum(operation.made > 0 for operation in self.operations)
            self.inodes[_lstat(path).st_ino] = made
            self.operations.append(Operation(kind, directory, path.name, made=made))


@contextlib.contextmanager
def recorded(root: Path) -> Iterator[Recording]:
    """Record what the block does under an empty directory."""
    real: dict[str, Callable[..., Any]] = {}
    recording = Recording(root, inodes={_stat(root).st_ino: 0})
    log, inodes = recording.operations, recording.inodes

    def open_(path: Any, flags: int, *args: Any, dir_fd: int | None = None) -> int:
        is_new = False
        if flags & os.O_CREAT:
            try:
                _lstat(path)
            except FileNotFoundError:
                is_new = True
        descriptor: int = real["open"](path, flags, *args, dir_fd=dir_fd)
        if is_new:
            recording.new("create", recording.of_directory(Path(path)), Path(path))
        return descriptor

    def write(descriptor: int, data: Any) -> int:
        status = _fstat(descriptor)
        written: int = real["write"](descriptor, data)
        if status.st_ino in inodes and stat.S_ISREG(status.st_mode):
            # All files here are written at their end.
            kept = bytes(memoryview(data).cast("B")[:written])
            log.append(Operation("write", inodes[status.st_ino], offset=status.st_size, data=kept))
        return written

    def ftruncate(descriptor: int, length: int) -> None:
        real["ftruncate"](descriptor, length)
        log.append(Operation("cut", inodes[_fstat(descriptor).st_ino], offset=length))

    def fsync(descriptor: int) -> None:
        real["fsync"](descriptor)
        inode = inodes.get(_fstat(descriptor).st_ino)
        if inode is not None:
            log.append(Operation("sync", inode))

    def mkdir(path: Any, *args: Any) -> None:
        real["mkdir"](path, *args)
        recording.new("mkdir", recording.of_directory(Path(path)), Path(path))

    def rename(source: Any, target: Any) -> None:
        directory = recording.of_directory(Path(source))
        if recording.of_directory(Path(target)) != directory:
            raise NotImplementedError("a rename from one directory into another is two operations")
        real["rename"](source, target)
        if directory is not None and Path(source) != Path(target):
            log.append(Operation("rename", directory, Path(source).name, Path(target).name))

    def remove(call: str) -> Callable[..., None]:
        def removing(path: Any, *, dir_fd: int | None = None) -> None:
            directory = recording.of_directory(Path(path), dir_fd)
            real[call](path, dir_fd=dir_fd)
            if directory is not None:
                log.append(Operation("remove", directory, Path(path).name))

        return removing

    replacements: dict[str, Callable[..., Any]] = {
        "open": open_,
        "write": write,
        "ftruncate": ftruncate,
        "fsync": fsync,
        "mkdir": mkdir,
        "rename": rename,
        "replace": rename,
        "unlink": remove("unlink"),
        "rmdir": remove("rmdir"),
    }
    with contextlib.ExitStack() as stack:
        for name, replacement in replacements.items():
            real[name] = getattr(os, name)
            stack.enter_context(mock.patch.object(os, name, replacement))
        yield recording


class Disk:
    """What a disk holds for sure, and what it may hold beside that."""

    def __init__(self) -> None:
        self.names: dict[int, dict[str, int]] = {0: {}}
        self.data: dict[int, bytes] = {}
        self.pending: list[Operation] = []

    def apply(self, operation: Operation) -> None:
        """Do one more operation: it stays pending until it is synced."""
        if operation.kind == "sync":
            durable = [other for other in self.pending if other.inode == operation.inode]
            self.pending = [other for other in self.pending if other.inode != operation.inode]
            for other in durable:
                _put(other, "durable", self.names, self.data, None)
        elif operation.kind == "lose":
            kept = [
                other for other in self.pending if (other.kind, other.inode) != ("write", operation.inode)
            ]
            self.pending = kept
        elif operation.kind != "note":
            if operation.kind == "mkdir":
                self.names[operation.made] = {}
            elif operation.kind == "create":
                self.data[operation.made] = b""
            self.pending.append(operation)

    def after_crash(self, fates: list[str], draw: random.Random | None = None) -> dict[str, bytes | None]:
        """Return what is found if each pending operation is "kept", "dropped", or for a write otherwise."""
        names = {inode: dict(entries) for inode, entries in self.names.items()}
        data = dict(self.data)
        for operation, fate in zip(self.pending, fates, strict=True):
            _put(operation, fate, names, data, draw)
        tree: dict[str, bytes | None] = {}

        def walk(inode: int, path: str) -> None:
            for name, below in sorted(names[inode].items()):
                tree[path + name] = data.get(below)
                if below in names:
                    walk(below, f"{path}{name}/")

        walk(0, "")
        return tree

    def systematic_fates(self) -> Iterator[list[str]]:
        """Yield all dropped, all kept, and each single one dropped, kept, or replaced by zeros."""
        count = len(self.pending)
        yield ["dropped"] * count
        yield ["kept"] * count
        for i in range(count):
            yield ["kept"] * i + ["dropped"] + ["kept"] * (count - i - 1)
            yield ["dropped"] * i + ["kept"] + ["dropped"] * (count - i - 1)
            if self.pending[i].kind == "write":
                yield ["kept"] * i + ["zeros"] + ["kept"] * (count - i - 1)

    def random_fates(self, draw: random.Random) -> list[str]:
        """Return a fate for each pending operation."""
        of_a_write = ["kept", "dropped", "torn", "zeros", "garbage"]
        return [
            draw.choice(of_a_write if operation.kind == "write" else of_a_write[:2])
            for operation in self.pending
        ]


def _put(
    operation: Operation,
    fate: str,
    names: dict[int, dict[str, int]],
    data: dict[int, bytes],
    draw: random.Random | None,
) -> None:
    """Change names and data as an operation does that has this fate."""
    if fate == "dropped":
        return
    inode = operation.inode
    if operation.kind == "write":
        piece = operation.data
        if fate == "zeros":
            piece = bytes(len(piece))
        elif fate == "garbage" and draw is not None:
            piece = draw.randbytes(len(piece))
        elif fate == "torn" and draw is not None:
            end = draw.randrange(len(piece) + 1)
            piece = piece[:end] + draw.choice([b"", bytes(len(piece) - end)])
        before = data[inode].ljust(operation.offset, b"\0")
        data[inode] = before[: operation.offset] + piece + before[operation.offset + len(piece) :]
    elif operation.kind == "cut":
        data[inode] = data[inode][: operation.offset].ljust(operation.offset, b"\0")
    elif operation.kind in {"create", "mkdir"}:
        names[inode][operation.name] = operation.made
    elif operation.kind == "remove":
        if fate == "durable" or not names.get(names[inode].get(operation.name, -1)):  # else it is not empty
            names[inode].pop(operation.name, None)
    # A rename: impossible from where nothing is, or onto a directory that is not empty.
    elif operation.name in names[inode] and (
        fate == "durable" or not names.get(names[inode].get(operation.target, -1))
    ):
        names[inode][operation.target] = names[inode].pop(operation.name)
