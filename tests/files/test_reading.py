"""Only regular files of the right size are read, and nothing is waited for."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import tracemalloc
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.errors import FileFormatError
from charlm.files import reading
from charlm.files.reading import read_file, read_lines, read_together


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
    with pytest.raises(FileFormatError, match=r"must have 2 bytes, got 4\."):
        read_file(tmp_path / "f", max_bytes=3, exact_size=2)
    with pytest.raises(FileFormatError, match=r"must have at most 3 bytes, got 4\."):
        read_file(tmp_path / "f", max_bytes=3, exact_size=4)


def test_a_larger_file_is_read_if_the_disk_holds_it_and_refused_if_it_has_holes(tmp_path: Path) -> None:
    path, data = tmp_path / "f", os.urandom(1 << 16)
    path.write_bytes(data)
    assert read_file(path, max_bytes=9, larger_if_stored=True) == data
    os.truncate(path, 1 << 40)
    with pytest.raises(FileFormatError, match=r"must have at most \d+ bytes, got 1099511627776\."):
        read_file(path, max_bytes=9, larger_if_stored=True)


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


def test_a_socket_is_refused_by_what_macos_says_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object, **__: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported on socket")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", unsupported)
        with pytest.raises(FileFormatError, match="must be a regular file, got another kind"):
            read_file(tmp_path / "f", max_bytes=1)


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


@pytest.mark.parametrize("size", [0, 5, (2 << 20) + 2])
def test_of_a_log_that_grows_what_was_there_before_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1\n" * (size // 2))
    real = os.read

    def read(descriptor: int, count: int) -> bytes:
        with path.open("ab") as log:
            log.write(b"new\n")
        return real(descriptor, count)

    monkeypatch.setattr(os, "read", read)
    assert list(read_lines(path, max_bytes=1 << 30, max_line=9)) == [b"1"] * (size // 2)


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
        list(read_lines(path, max_bytes=1 << 30, max_line=9))


@given(
    st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line), max_size=9),
    st.binary(max_size=12).filter(lambda line: b"\n" not in line),
    st.integers(1, 9),
)
def test_lines_are_those_between_the_newlines_however_they_are_cut_into_pieces(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], torn: bytes, piece: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "f"
    path.write_bytes(b"".join(line + b"\n" for line in lines) + torn)
    with mock.patch.object(reading, "_PIECE", piece):
        found = list(read_lines(path, max_bytes=1 << 30, max_line=7))
    assert found == [line if len(line) <= 7 else None for line in lines]


def test_a_line_without_end_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(1 << 28)
        file.seek(1 << 28)
        file.write(b"\nlast\n")
    tracemalloc.start()
    assert list(read_lines(tmp_path / "f", max_bytes=1 << 30, max_line=1 << 18)) == [None, b"last"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20


# Files that belong together


@pytest.mark.parametrize("other", ["another directory", "a link elsewhere", "the old one, put back"])
def test_files_that_are_read_together_are_of_one_directory(tmp_path: Path, other: str) -> None:
    for number in "12":
        (tmp_path / number).mkdir()
        for name in "ab":
            (tmp_path / number / name).write_text(number)
    there = tmp_path / "there"
    there.symlink_to("1")
    calls = []

    def read(directory: Path, descriptor: int | None) -> bytes:
        data = bytes(read_file(directory / "a", max_bytes=1, inside=descriptor))
        calls.append(data)
        if len(calls) == 1:
            there.unlink()
            if other == "a link elsewhere":
                there.symlink_to("2")
            else:
                (tmp_path / "2").rename(there)
        data += read_file(directory / "b", max_bytes=1, inside=descriptor)
        if len(calls) == 1 and other == "the old one, put back":
            there.rename(tmp_path / "2")
            there.symlink_to("1")
        return data

    assert read_together(lambda: there, read) == (b"11" if other == "the old one, put back" else b"22")
    assert len(calls) == 1 + (other != "the old one, put back")


def test_what_is_missing_from_a_directory_that_is_replaced_is_looked_for_in_the_new_one(
    tmp_path: Path,
) -> None:
    there = tmp_path / "there"
    there.mkdir()

    def read(directory: Path, descriptor: int | None) -> bytearray:
        try:
            return read_file(directory / "a", max_bytes=1, inside=descriptor)
        finally:
            if not (tmp_path / "old").exists():
                there.rename(tmp_path / "old")
                there.mkdir()
                (there / "a").write_bytes(b"1")

    assert read_together(lambda: there, read) == b"1"


@pytest.mark.parametrize("can_open", [True, False], ids=["as on Linux", "as on Windows"])
def test_a_directory_that_is_gone_before_it_is_opened_is_looked_for_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_open: bool
) -> None:
    if not can_open:
        monkeypatch.setattr(reading, "_DIRECTORY", None)
    (tmp_path / "a").write_bytes(b"1")
    places = [tmp_path / "moved", *(tmp_path for _ in range(3))]
    found = read_together(
        lambda: places.pop(0), lambda where, fd: read_file(where / "a", max_bytes=1, inside=fd)
    )
    assert found == b"1"


@pytest.mark.parametrize("kind", ["nothing", "a dangling link", "a file", "an empty directory"])
def test_where_nothing_can_be_read_together_the_system_s_error_goes_up(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "d"
    if kind == "a dangling link":
        path.symlink_to("nowhere")
    elif kind == "a file":
        path.touch()
    elif kind == "an empty directory":
        path.mkdir()
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        read_together(lambda: path, lambda where, fd: read_file(where / "a", max_bytes=1, inside=fd))


def test_an_error_names_the_whole_path_of_a_file_that_is_read_together(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        read_together(lambda: tmp_path, lambda where, fd: read_file(where / "a", max_bytes=1, inside=fd))
    assert str(tmp_path / "a") in str(caught.value)


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


@pytest.mark.parametrize("has_preadv", [True, False])
def test_an_open_file_is_read_at_any_place(
    has_preadv: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "digits"
    path.write_bytes(b"0123456789")
    if not has_preadv:  # as on Windows
        monkeypatch.delattr(os, "preadv", raising=False)
    file = reading.OpenFile(path, 10)
    for offset in (7, 0, 3):
        found = bytearray(3)
        file.read_into(found, offset)
        assert found == b"0123456789"[offset : offset + 3]
    sizes, read = [], reading.OpenFile._read

    def reading_at_once(self: reading.OpenFile, buffer: memoryview, offset: int) -> int:
        sizes.append(len(buffer))
        return read(self, buffer, offset)

    monkeypatch.setattr(reading, "_AT_ONCE", 4)  # as much as macOS reads in one call
    monkeypatch.setattr(reading.OpenFile, "_read", reading_at_once)
    found = bytearray(9)
    file.read_into(found, 1)
    assert found == b"123456789"
    assert sizes == [4, 4, 1]
    path.write_bytes(b"01234")
    with pytest.raises(FileFormatError, match="must keep its 10 bytes, and has become shorter"):
        file.read_into(bytearray(4), 3)
