"""The log: whole lines at its end, cut back by a resume."""

from __future__ import annotations

import contextlib
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from harness.failing_calls import failing
from hypothesis import example, given
from hypothesis import strategies as st

import charlm.files.log
from charlm.errors import FileFormatError
from charlm.files.log import Appender, keep_lines
from charlm.runs.log import MetricsLog, read_metrics


def test_lines_are_appended_to_what_is_there(tmp_path: Path) -> None:
    for line in (b"one\n", b"two\n"):
        with Appender(tmp_path / "log") as log:
            log.append(line)
            log.flush()
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


def test_a_line_is_on_its_way_to_the_disk_without_a_flush(tmp_path: Path) -> None:
    log = Appender(str(tmp_path / "log"))
    log.append(b"one\n")
    assert (tmp_path / "log").read_bytes() == b"one\n"
    log.close()


def test_the_new_log_is_synced_into_its_directory(tmp_path: Path) -> None:
    with failing(-1) as calls:
        Appender(tmp_path / "log").close()
    assert "fsync" in calls.names


def test_a_closed_log_says_so_and_closes_once(tmp_path: Path) -> None:
    log = Appender(tmp_path / "log")
    log.close()
    log.close()
    with pytest.raises(OSError, match="closed"):
        log.append(b"one\n")
    with pytest.raises(OSError, match="closed"):
        log.flush()


def test_a_torn_line_is_cut_off_before_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Appender(tmp_path / "log")
    log.append(b"one\n")
    real = os.write
    room = [2, 0]

    def write(descriptor: int, data: memoryview) -> int:
        left = room.pop(0)
        if left == 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:left])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(OSError, match="No space"):
            log.append(b"two\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntw"
    with failing(0) as calls, pytest.raises(OSError, match="on purpose"):
        log.append(b"three\n")
    assert calls.names == ["ftruncate"]
    log.append(b"four\n")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"one\nfour\n"


def test_a_log_that_cannot_be_opened_leaves_no_descriptor(tmp_path: Path) -> None:
    with failing(-1) as calls:
        Appender(tmp_path / "log").close()
    for at in range(len(calls.names)):
        with failing(at) as seen, contextlib.suppress(OSError):
            Appender(tmp_path / "log").close()
        assert seen.failed is not None
        opened = seen.names.count("open") - (seen.failed == "open")
        assert seen.names.count("close") == opened


def test_a_symbolic_link_or_a_pipe_is_refused_as_a_log(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=r"symbolic|No such device"):
            Appender(tmp_path / name)
    assert not (tmp_path / "elsewhere").exists()


def test_after_a_failed_fsync_its_lines_are_written_anew_through_another_descriptor(tmp_path: Path) -> None:
    log = Appender(tmp_path / "log")
    log.append(b"one\n")
    log.flush()
    log.append(b"two\n")
    with failing(0), pytest.raises(OSError, match="on purpose"):
        log.flush()
    with failing(-1) as calls:
        log.append(b"three\n")
    assert calls.names == ["open", "close", "ftruncate", "write", "write"]
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\n"
    with failing(-1) as calls:
        log.flush()
    assert calls.names == ["fsync"]
    log.append(b"four\n")
    with failing(0), pytest.raises(OSError, match="on purpose"):
        log.flush()
    with failing(-1) as calls:
        log.close()
    assert calls.names == ["open", "close", "ftruncate", "write", "close"]
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\nfour\n"


def test_the_lines_that_are_held_for_a_failed_fsync_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charlm.files.log, "_MOST_UNSYNCED", 5)
    with failing(-1) as calls, Appender(tmp_path / "log") as log:
        for _ in range(6):
            log.append(b"one\n")
    assert calls.names.count("fsync") == 2 + 3
    assert (tmp_path / "log").read_bytes() == 6 * b"one\n"


@given(st.text())
@example("\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r\n\x7f")
def test_a_record_is_one_line_to_whoever_reads_it(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    log = MetricsLog(path, step=0)
    log.write("sample", 1, {"text": text, text: 0})
    log.close()
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"kind": "sample", "step": 1, "text": text, text: 0} | {"text": text}
    assert [record["text"] for record in read_metrics(path)] == [text]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b"1\n2\n3\n", b"1\n2\n"),
        (b"1\n2\n3", b"1\n2\n"),
        (b"1\n2\n2", b"1\n2\n"),
        (b"1\r\n", b"1\r\n"),
        (b"1", b""),
    ],
)
def test_keep_lines_keeps_what_is_wanted_and_drops_a_torn_end(
    tmp_path: Path, before: bytes, after: bytes
) -> None:
    (tmp_path / "log").write_bytes(before)
    keep_lines(tmp_path / "log", lambda line: int(line) < 3)
    assert (tmp_path / "log").read_bytes() == after


def test_keep_lines_writes_nothing_where_nothing_goes(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"1\n2\n")
    with failing(-1) as calls:
        keep_lines(tmp_path / "log", lambda line: True)
    assert set(calls.names) == {"open", "fstat", "close", "stat"}


def test_keep_lines_refuses_a_log_beyond_its_limit(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"1\n2\n")
    with pytest.raises(FileFormatError, match="at most 3 bytes"):
        keep_lines(tmp_path / "log", lambda line: True, max_bytes=3)


def test_a_line_without_end_is_cut_off_and_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, step=0)
    log.write("step", 1, {"loss": 1.0})
    log.close()
    whole = path.read_bytes()
    os.truncate(path, 1 << 28)
    tracemalloc.start()
    assert [record["step"] for record in read_metrics(path)] == [1]
    MetricsLog(path, step=1).close()
    assert path.read_bytes() == whole
    with path.open("ab") as file:
        file.truncate(1 << 28)
        file.write(b"\n")
    with pytest.raises(
        FileFormatError, match=r"metrics\.jsonl' must have lines of at most 262144 bytes, got a"
    ):
        list(read_metrics(path))
    MetricsLog(path, step=1).close()
    assert path.read_bytes() == whole
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
