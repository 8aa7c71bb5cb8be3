"""Only regular files of the right size are read, and nothing is waited for."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import tracemalloc
from pathlib import Path

import pytest

from charlm.errors import FileFormatError
from charlm.files import reading
from charlm.files.reading import read_file


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_a_file_is_read_whole(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    assert read_file(tmp_path / "f", max_bytes=size) == data
    assert read_file(str(tmp_path / "f"), max_bytes=size + 1, exact_size=size) == data


def test_a_wrong_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1234")
    with pytest.raises(FileFormatError, match=r"'.*/f' must have at most 3 bytes, got 4\.") as error:
        read_file(tmp_path / "f", max_bytes=3)
    assert error.value.path == str(tmp_path / "f")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    with pytest.raises(FileFormatError, match=r"must have 5 bytes, got 4\."):
        read_file(tmp_path / "f", max_bytes=9, exact_size=5)


def test_a_missing_file_and_a_locked_one_keep_their_own_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "f", max_bytes=3)
    (tmp_path / "g").touch()
    with pytest.raises(NotADirectoryError):
        read_file(tmp_path / "g" / "f", max_bytes=3)


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory", "pipe", "socket", "device", "loop"])
def test_anything_but_a_regular_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("f")
    if kind == "link":
        Path("outside").write_bytes(b"secret")
        path.symlink_to("outside")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to("f")
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("f")
    else:
        path = Path("/dev/zero")
    with pytest.raises(FileFormatError, match="must be a regular file"):
        read_file(path, max_bytes=1 << 50)


def test_a_sparse_terabyte_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    with pytest.raises(FileFormatError, match="at most"):
        read_file(tmp_path / "f", max_bytes=1 << 30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("change", ["grows", "shrinks"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1" * (2 << 20))
    real = os.read

    def read(descriptor: int, count: int) -> bytes:
        piece = real(descriptor, count)
        os.truncate(path, (1 << 20) if change == "shrinks" else (3 << 20))
        return piece

    monkeypatch.setattr(os, "read", read)
    with pytest.raises(FileFormatError, match="must keep its 2097152 bytes"):
        read_file(path, max_bytes=1 << 30)


@pytest.mark.parametrize("size", [0, 5, (2 << 20) + 1])
def test_of_a_log_that_grows_what_was_there_before_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1" * size)
    real = os.read

    def read(descriptor: int, count: int) -> bytes:
        with path.open("ab") as log:
            log.write(b"new")
        return real(descriptor, count)

    monkeypatch.setattr(os, "read", read)
    assert read_file(path, max_bytes=1 << 30, growing=True) == b"1" * size


def test_a_log_that_is_cut_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1" * 100)
    real = os.read

    def read(descriptor: int, count: int) -> bytes:
        os.truncate(path, 50)
        return real(descriptor, count)

    monkeypatch.setattr(os, "read", read)
    with pytest.raises(FileFormatError, match="must keep its 100 bytes while it is read, got 50"):
        read_file(path, max_bytes=1 << 30, growing=True)


def test_an_error_while_reading_goes_up_and_the_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"1")
    descriptors: list[int] = []

    def read(descriptor: int, count: int) -> bytes:
        descriptors.append(descriptor)
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(os, "read", read)
    with pytest.raises(OSError, match="bad sector"):
        read_file(tmp_path / "f", max_bytes=1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])


def test_a_file_beyond_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(size: int) -> bytearray:
        raise MemoryError

    (tmp_path / "f").write_bytes(b"1234")
    monkeypatch.setattr(reading, "bytearray", no_memory, raising=False)
    with pytest.raises(FileFormatError, match=r"must fit into memory, got 4 bytes\."):
        read_file(tmp_path / "f", max_bytes=4)
