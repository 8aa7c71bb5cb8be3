"""Whatever fails, and whenever the process dies, the old content or the new one stands whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
from harness.failing_calls import Killed, failing
from hypothesis import given
from hypothesis import strategies as st

from charlm.files import atomic
from charlm.files.atomic import (
    FileDigest,
    check_writable,
    make_directory,
    remove_directory,
    remove_file,
    replace_directory,
    standing_directory,
    write_directory,
    write_file,
)

OLD = {"config.json": b"{}", "model.safetensors": b"old weights"}
NEW = {"config.json": b"{ }", "model.safetensors": b"new weights", "tokenizer.json": b"abc"}


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def temporaries(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".tmp-")]


def seal(digests: Mapping[str, FileDigest]) -> tuple[str, bytes]:
    return "manifest.json", ",".join(f"{name}:{digest.sha256}" for name, digest in digests.items()).encode()


SEALED = {
    **NEW,
    "manifest.json": seal({k: FileDigest(len(v), hashlib.sha256(v).hexdigest()) for k, v in NEW.items()})[1],
}


@pytest.mark.parametrize(
    "data", [b"", b"one", bytearray(b"one"), memoryview(b"one"), [b"on", memoryview(b""), bytearray(b"e")]]
)
def test_write_file_writes_bytes_in_one_piece_or_several(tmp_path: Path, data: bytes | list[bytes]) -> None:
    write_file(tmp_path / "f", data)
    write_file(str(tmp_path / "f"), data)
    assert (tmp_path / "f").read_bytes() == (b"".join(data) if isinstance(data, list) else bytes(data))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize(
    "name", ["new", "file", "folder", "new/new", "file/new", "folder/new", "dangling", "x" * 300]
)
def test_whether_a_target_can_be_written_is_known_beforehand(
    tmp_path: Path, name: str, directory: bool
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    before = sorted(os.walk(tmp_path))
    try:
        check_writable(tmp_path / name, directory=directory)
        refused = False
    except OSError:
        refused = True
    assert sorted(os.walk(tmp_path)) == before
    with pytest.raises(OSError, match=r"\[Errno") if refused else contextlib.nullcontext():
        if directory:
            make_directory(tmp_path / name)
            write_file(tmp_path / name / "file", b"")
        else:
            write_file(tmp_path / name, b"")


def test_a_file_gets_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "f", b"")
        write_directory(tmp_path / "d", {"f": b""})
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("f", "d", "d/f")]
    assert modes == [0o640, 0o750, 0o640]


@given(st.integers(0, 0o777), st.integers(0, 0o777), st.integers(0, 0o77), st.integers(0, 0o77))
def test_what_is_replaced_keeps_its_mode_and_what_is_new_gets_that_of_the_umask(
    tmp_path_factory: pytest.TempPathFactory, file: int, inner: int, folder: int, umask: int
) -> None:
    place = tmp_path_factory.mktemp("place")
    folder |= stat.S_IRWXU
    write_file(place / "f", b"old")
    (place / "f").chmod(file)
    write_directory(place / "d", OLD)
    (place / "d" / "config.json").chmod(inner)
    (place / "d").chmod(folder)
    before = os.umask(umask)
    try:
        write_file(place / "f", b"new")
        write_file(place / "g", b"new")
        replace_directory(place / "d", NEW, owned=NEW)
        replace_directory(place / "e", NEW, owned=NEW)
    finally:
        os.umask(before)
    new_file, new_folder = 0o666 & ~umask, 0o777 & ~umask
    names = ("f", "g", "d", "d/config.json", "d/tokenizer.json", "e", "e/config.json")
    modes = [stat.S_IMODE((place / name).stat().st_mode) for name in names]
    assert modes == [file, new_file, folder, inner, new_file, new_folder, new_file]
    assert content(place / "d") == NEW


def test_nobody_can_read_a_private_file_while_it_is_written_anew(tmp_path: Path) -> None:
    seen: set[int] = set()

    def pieces() -> Iterator[bytes]:
        yield b"1"
        seen.update(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob(".tmp-*"))
        seen.update(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob(".tmp-*/*"))

    write_file(tmp_path / "f", b"old")
    (tmp_path / "f").chmod(0o600)
    write_file(tmp_path / "f", pieces())
    assert seen == {0o600}
    write_directory(tmp_path / "d", {"f": b"old"})
    (tmp_path / "d").chmod(0o700)
    (tmp_path / "d" / "f").chmod(0o600)
    replace_directory(tmp_path / "d", {"f": pieces()}, owned={"f"})
    assert seen == {0o600, 0o700}


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    write_file(tmp_path / "f", b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_a_write_of_nothing_is_an_error_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda fd, data: 0)
    with pytest.raises(OSError, match="wrote nothing"):
        write_file(tmp_path / "f", b"0123456789")
    assert list(tmp_path.iterdir()) == []


def test_an_iterable_that_raises_calls_the_write_off(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise ValueError("wrong checksum")

    write_file(tmp_path / "f", b"old")
    with pytest.raises(ValueError, match="wrong checksum"):
        write_file(tmp_path / "f", pieces())
    assert content(tmp_path) == {"f": b"old"}


def test_write_file_replaces_a_symbolic_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "outside").read_bytes() == b"mine"
    assert not (tmp_path / "link").is_symlink()


def test_a_temporary_name_that_is_taken_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda n: "taken")
    taken = tmp_path / f".tmp-{os.getpid()}-taken"
    taken.write_bytes(b"of another thread")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "f", b"new")
    with pytest.raises(FileExistsError):
        write_directory(tmp_path / "d", NEW, temporary="taken")
    assert content(tmp_path) == {taken.name: b"of another thread"}


def test_data_and_names_are_synced_in_the_order_that_survives_a_loss_of_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        log.append("fsync " + path.removeprefix(str(tmp_path)))
        fsync(descriptor)

    def noting_rename(source: Path, target: Path) -> None:
        log.append("rename")
        rename(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name an open file")
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    write_directory(tmp_path / "d", {"a": b"1", "b": b"2"}, seal=seal, temporary="x")
    staging = f"/.tmp-{os.getpid()}-x"
    assert log == [
        *(f"fsync {staging}/{name}" for name in ("a", "b", "manifest.json")),
        *(f"fsync {staging}", "rename", "fsync "),
    ]


def test_write_directory_returns_size_and_hash_of_every_file_and_seals_last(tmp_path: Path) -> None:
    digests = write_directory(tmp_path / "d", {k: [v[:1], v[1:]] for k, v in NEW.items()}, seal=seal)
    assert content(tmp_path / "d") == SEALED
    assert list(digests) == [*NEW, "manifest.json"]
    for name, data in SEALED.items():
        assert digests[name] == FileDigest(len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_write_directory_refuses_a_name_that_is_taken(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "d"
    if kind == "file":
        target.touch()
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="something here"):
        write_directory(target, NEW)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def file_written(directory: Path) -> None:
    write_file(directory / "f", [b"new ", b"content"])


def directory_written(directory: Path) -> None:
    write_directory(directory / "d", NEW, seal=seal)


def directory_replaced(directory: Path) -> None:
    replace_directory(directory / "d", NEW, owned=NEW)


def state_of_file(directory: Path) -> object:
    return (directory / "f").read_bytes()


def state_of_directory(directory: Path) -> object:
    standing = standing_directory(directory / "d")
    return content(standing) if standing.exists() else None


ACTIONS: dict[str, tuple[Callable[[Path], None], Callable[[Path], object], list[object]]] = {
    "file": (file_written, state_of_file, [b"old", b"new content"]),
    "directory": (directory_written, state_of_directory, [None, SEALED]),
    "replaced": (directory_replaced, state_of_directory, [OLD, NEW]),
}


@pytest.mark.parametrize("how", ["once", "always", "kill"])
@pytest.mark.parametrize("name", ACTIONS)
def test_old_or_new_stands_whichever_call_fails(tmp_path: Path, name: str, how: str) -> None:
    action, state, allowed = ACTIONS[name]
    states: list[object] = []
    for at in range(1000):  # until the failing call is never reached
        place = tmp_path / str(at)
        place.mkdir()
        if name == "file":
            write_file(place / "f", b"old")
        if name == "replaced":
            write_directory(place / "d", OLD)
        raised = False
        with failing(at, how=how) as calls:
            try:
                action(place)
            except (OSError, Killed):
                raised = True
        states.append(state(place))
        assert states[-1] in allowed
        if not raised:
            assert states[-1] == allowed[1]
        if how != "kill":
            assert temporaries(place) == []
        if how == "once" and name == "replaced":
            assert (place / "d").exists()
        # The next save gets through, and a replacement cleans up after the one that was cut short.
        if name == "directory":
            if states[-1] is None:
                action(place)
        else:
            action(place)
        assert state(place) == allowed[1]
        assert not list(place.glob(".old-*"))
        if calls.failed is None:
            break
    assert len(states) > 6
    assert allowed[0] in states
    assert states[-1] == allowed[1]


def test_an_fsync_that_fails_is_not_repeated(tmp_path: Path) -> None:
    write_file(tmp_path / "f", b"old")
    with failing(-1) as calls:
        write_file(tmp_path / "f", b"new")
    with failing(calls.names.index("fsync")) as calls, pytest.raises(OSError, match="on purpose"):
        write_file(tmp_path / "f", b"new")
    assert calls.names.count("fsync") == 1


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_directories_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, "no fsync here")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_file(tmp_path / "f", b"new")
    assert content(tmp_path) == {"f": b"new"}


def test_where_directories_cannot_be_opened_they_are_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_DIRECTORY", None)  # as on Windows
    with failing(-1) as calls:
        write_file(tmp_path / "f", b"new")
    assert calls.names.count("fsync") == 1


def test_where_there_are_no_modes_what_is_replaced_needs_no_chmod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chmod(path: object, mode: int) -> None:
        raise TypeError("chmod: path should be string, bytes or os.PathLike, not int")  # before 3.13

    write_file(tmp_path / "script.cmd", b"old")
    (tmp_path / "script.cmd").chmod(0o777)  # by its name Windows calls it a program
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_HAS_MODES", False)
        patch.setattr(os, "chmod", chmod)
        write_file(tmp_path / "script.cmd", b"new")
    assert content(tmp_path) == {"script.cmd": b"new"}


def test_a_drive_that_is_missing_is_an_error_and_no_endless_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: object, *_: object, **__: object) -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, "there is no such drive", str(path))

    with monkeypatch.context() as patch:
        for name in ("lstat", "stat", "open", "mkdir"):
            patch.setattr(os, name, missing)
        for call in (partial(check_writable, directory=True), make_directory):
            with pytest.raises(FileNotFoundError):
                call("/runs/one")


def test_replace_directory_writes_where_nothing_stands(tmp_path: Path) -> None:
    digests = replace_directory(tmp_path / "d", NEW, owned=NEW)
    assert content(tmp_path / "d") == NEW
    assert digests["config.json"].size == 3


def test_what_a_crash_left_of_the_old_directory_is_deleted_only_once_the_new_one_is_durable(
    tmp_path: Path,
) -> None:
    write_directory(tmp_path / ".old-d", OLD)
    write_directory(tmp_path / "d", NEW)
    with failing(-1) as calls:
        replace_directory(tmp_path / "d", NEW, owned=NEW)
    assert calls.names.index("fsync") < calls.names.index("unlink")


def test_replace_directory_leaves_no_file_of_the_old_one(tmp_path: Path) -> None:
    write_directory(tmp_path / "d", NEW)
    replace_directory(tmp_path / "d", OLD, owned=NEW)
    assert content(tmp_path / "d") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_replace_directory_refuses_a_directory_with_files_of_others(tmp_path: Path) -> None:
    write_directory(tmp_path / "d", {**OLD, "thesis\n.txt": b"mine"})
    with pytest.raises(FileExistsError, match=r"files of others \('thesis\\n.txt'\)") as error:
        replace_directory(tmp_path / "d", NEW, owned=NEW)
    assert error.value.filename == str(tmp_path / "d")
    assert content(tmp_path / "d") == {**OLD, "thesis\n.txt": b"mine"}
    assert temporaries(tmp_path) == []


def test_replace_directory_keeps_a_file_that_arrives_during_the_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_directory(tmp_path / "d", OLD)
    real = os.unlink

    def unlink(path: Path) -> None:
        (path.parent / "thesis.txt").write_bytes(b"mine")
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(OSError, match="not empty"):
        replace_directory(tmp_path / "d", NEW, owned=NEW)
    assert content(tmp_path / "d") == NEW
    assert content(tmp_path / ".old-d") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("name", ["d", ".old-d"])
def test_replace_directory_follows_no_symbolic_link(tmp_path: Path, name: str) -> None:
    write_directory(tmp_path / "elsewhere", OLD)
    if name != "d":
        write_directory(tmp_path / "d", OLD)
    (tmp_path / name).symlink_to("elsewhere")
    with pytest.raises(FileExistsError, match="not a directory"):
        replace_directory(tmp_path / "d", NEW, owned=NEW)
    assert content(tmp_path / "elsewhere") == OLD


def test_make_directory_makes_all_parents_and_accepts_one_that_exists(tmp_path: Path) -> None:
    for _ in range(2):
        make_directory(str(tmp_path / "a" / "b" / "c"))
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_make_directory_syncs_each_parent(tmp_path: Path) -> None:
    with failing(-1) as calls:
        make_directory(tmp_path / "a" / "b")
    assert [name for name in calls.names if name in {"mkdir", "fsync"}] == ["fsync", *["mkdir", "fsync"] * 2]


def test_a_directory_that_a_killed_process_has_made_is_synced_into_its_parent(tmp_path: Path) -> None:
    with failing(-1) as calls:
        make_directory(tmp_path / "a")
    with failing(calls.names.index("mkdir") + 1, how="kill"), pytest.raises(Killed):
        make_directory(tmp_path / "b")
    assert (tmp_path / "b").is_dir()
    with failing(-1) as calls:
        make_directory(tmp_path / "b")
    assert calls.names == ["stat", "open", "fsync", "close"]
    with failing(1, code=errno.EACCES):  # a parent that may not be read
        make_directory(tmp_path / "b")
    with failing(2), pytest.raises(OSError, match="on purpose"):
        make_directory(tmp_path / "b")


def test_make_directory_refuses_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(NotADirectoryError, match="not a directory"):
        make_directory(tmp_path / "a")


def test_remove_directory_deletes_a_tree_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "d" / "below").mkdir(parents=True)
    (tmp_path / "d" / "below" / "f").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine").touch()
    (tmp_path / "d" / "link").symlink_to(tmp_path / "outside")
    remove_directory(tmp_path / "d", tmp_path / ".trash-1")
    assert [path.name for path in tmp_path.rglob("*")] == ["outside", "mine"]


def test_remove_directory_refuses_a_file_and_a_link(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    (tmp_path / "f").touch()
    for name in ("link", "f"):
        with pytest.raises(NotADirectoryError, match="not a directory"):
            remove_directory(tmp_path / name, tmp_path / ".trash-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "f", "link"]


def test_a_removal_that_is_cut_short_shows_nothing_or_all_and_can_be_finished(tmp_path: Path) -> None:
    for at in range(1000):
        place = tmp_path / str(at)
        place.mkdir()
        write_directory(place / "d", OLD)
        finished = True
        with failing(at, how="kill") as calls:
            try:
                remove_directory(place / "d", place / ".trash-1")
            except Killed:
                finished = False
        if (place / "d").exists():
            assert content(place / "d") == OLD
        elif not finished and (place / ".trash-1").exists():
            remove_directory(place / ".trash-1", place / ".trash-1")
            assert list(place.iterdir()) == []
        if calls.failed is None:
            break
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("threads", [True, False])
def test_large_pieces_are_hashed_as_small_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: bool
) -> None:
    """They are hashed while they are written, in a thread where the system gives one."""
    if not threads:

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
    pieces: list[bytes | memoryview] = [
        bytes(3_000_000),
        b"small",
        bytes(range(256)) * 8_192,
        memoryview(b"end"),
    ]
    digests = write_directory(tmp_path / "d", {"f": pieces})
    whole = b"".join(pieces)
    assert (tmp_path / "d" / "f").read_bytes() == whole
    assert digests["f"] == FileDigest(len(whole), hashlib.sha256(whole).hexdigest())


def test_a_write_that_fails_while_its_piece_is_hashed_is_an_error_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, piece: object) -> int:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "write", fail)
    threads = threading.active_count()
    with pytest.raises(OSError, match="no room"):
        write_file(tmp_path / "f", bytes(3_000_000))
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_only_a_regular_file_is_removed_as_one(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "link").symlink_to("f")
    (tmp_path / "d").mkdir()
    for path in list(tmp_path.iterdir()):
        remove_file(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "link"]


def test_an_error_says_which_file_could_not_be_written(tmp_path: Path) -> None:
    with failing(-1) as calls:
        write_file(tmp_path / "f", b"1")
    for at, name in enumerate(calls.names):
        if name in {"write", "fsync"}:
            with failing(at, code=errno.ENOSPC), pytest.raises(OSError, match=r"\[Errno 28\] .*: '.*/f'"):
                write_file(tmp_path / "f", b"1")


def test_what_killed_writes_left_goes_with_a_write_a_day_later(tmp_path: Path) -> None:
    def left(name: str, days: float, *, holding: str | None = None) -> Path:
        path = tmp_path / f".tmp-4711-{name}"
        if holding is None:
            path.write_bytes(b"part")
        else:
            path.mkdir()
            (path / holding).write_bytes(b"part")
            os.utime(path / holding, times=(0, time.time() - days * 86_400))
        os.utime(path, times=(0, time.time() - days * 86_400))
        return path

    gone = {left("00000001", 1.01), left("00000002", 400)}
    directories = {left("00000003", 1.01, holding="config.json")}
    being_written = left("00000004", 400, holding="model.safetensors")
    (being_written / "model.safetensors").write_bytes(b"more")  # it is large, and still being written
    stay = {
        *(left("00000005", 0.99), left("00000006", 0.99, holding="config.json"), being_written),
        left("00000007", 400, holding="thesis.txt"),
        *(left("0000000", 400), left("0000000g", 400), left("00000008.txt", 400)),  # of other names
    }
    (tmp_path / ".tmp-1-00000009").symlink_to("thesis")
    os.mkfifo(tmp_path / ".tmp-1-0000000a")
    stay |= {tmp_path / ".tmp-1-00000009", tmp_path / ".tmp-1-0000000a"}
    write_file(tmp_path / "f", b"new")
    assert set(tmp_path.iterdir()) == {tmp_path / "f", *stay, *directories}
    assert gone
    replace_directory(tmp_path / "d", NEW, owned=NEW)
    assert set(tmp_path.iterdir()) == {tmp_path / "d", tmp_path / "f", *stay}


def test_what_cannot_be_cleaned_up_is_in_nobody_s_way(tmp_path: Path) -> None:
    for number in range(100):
        old = tmp_path / f".tmp-1-{number:08x}"
        old.mkdir(exist_ok=True)
        (old / "config.json").touch()
        for path in (old / "config.json", old):
            os.utime(path, times=(0, 0))
        with failing(number, code=errno.EACCES) as calls:
            atomic._remove_abandoned(tmp_path, OLD)
        if calls.failed is None:
            break
    assert {"scandir", "listdir", "lstat", "unlink", "rmdir"} <= set(calls.names)
    for path in tmp_path.iterdir():  # only those whose directory could not be deleted when its files were
        assert list(path.iterdir()) == []


def test_what_a_process_left_stays_while_it_may_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is asked for by its number: on Windows that would end it, and not each number is one."""
    assert atomic._lives(os.getpid())
    assert atomic._lives(2**80)
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        lives = atomic._lives(1)
    assert lives
