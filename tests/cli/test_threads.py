"""How the command shares cores: what it looks at, when it lets threads sleep, and what it leaves alone."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from charlm.backends import host
from charlm.cli import threads

VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {name: os.environ.pop(name, None) for name in VARIABLES}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def tasks(folder: Path, *queued_seconds: float) -> Path:
    for number, seconds in enumerate(queued_seconds):
        task = folder / str(100 + number)
        task.mkdir(parents=True, exist_ok=True)
        (task / "schedstat").write_text(f"123 {round(seconds * 1e9)} 7\n", encoding="utf-8")
    return folder


def names_of_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_the_queueing_of_all_threads_is_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_TASKS", tasks(tmp_path, 1.5, 0.25))
    (tmp_path / "102").mkdir()  # a thread that has just ended
    assert threads._queued_seconds() == pytest.approx(1.75)
    monkeypatch.setattr(threads, "_TASKS", tmp_path / "nowhere")
    assert threads._queued_seconds() is None


def watched(monkeypatch: pytest.MonkeyPatch, shares: Sequence[float]) -> list[str]:
    """Return what happens to the additional team while these shares of the time are spent in queues."""
    told: list[str] = []
    now, queued = 0.0, 0.0
    rest = iter(shares)

    class Team(threading.Event):
        def set(self) -> None:
            told.append("ends")
            super().set()

    class Done:
        def wait(self, timeout: float) -> bool:
            nonlocal now, queued
            share = next(rest, None)
            if share is None:
                return True
            now += timeout
            queued += share * timeout
            told.append(f"{share}")
            return False

    def team() -> Team:
        told.append("begins")
        return Team()

    with monkeypatch.context() as patch:
        patch.setattr(threads, "_queued_seconds", lambda: queued)
        patch.setattr(threads, "_one_more_team", team)
        patch.setattr(time, "perf_counter", lambda: now)
        threads._watch(Done())  # type: ignore[arg-type]
    return told


def test_while_there_is_no_queue_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, [0.0, 0.02, 0.1, 0.14]) == ["0.0", "0.02", "0.1", "0.14"]


def test_a_queue_brings_the_team_and_a_lasting_quiet_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [0.5, 0.6, 0.01, 0.01, 0.3, 0.01, 0.01, 0.01, 0.01, 0.0]
    told = watched(monkeypatch, shares)
    assert told == ["0.5", "begins", "0.6", "0.01", "0.01", "0.3", *["0.01"] * 4, "ends", "0.0"]


def test_it_comes_again_and_never_outlives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    told = watched(monkeypatch, [1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert [word for word in told if not word[0].isdigit()] == ["begins", "ends", "begins", "ends"]


def test_the_team_is_a_sleeping_thread_until_its_event(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.ones(10).sum()  # OpenMP is loaded
    if not any("/libgomp" in line for line in threads._lines(threads._MAPS)):
        pytest.skip("torch stands on another OpenMP here")
    end = threads._one_more_team()
    assert end is not None
    team = next(thread for thread in threading.enumerate() if thread.name == "charlm-team")
    assert team.is_alive()
    end.set()
    team.join(10)
    assert not team.is_alive()


def test_without_gnus_openmp_there_is_no_team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "maps").write_text("7f00-7f01 r-xp 00000000 00:00 0 /lib/libc.so.6\n", encoding="utf-8")
    monkeypatch.setattr(threads, "_MAPS", tmp_path / "maps")
    assert threads._one_more_team() is None
    monkeypatch.setattr(threads, "_MAPS", tmp_path / "nothing")
    assert threads._one_more_team() is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how long threads queue")
def test_inside_the_block_somebody_watches_and_afterwards_nobody() -> None:
    with threads.sharing_cores():
        assert "charlm-cores" in names_of_threads()
    assert "charlm-cores" not in names_of_threads()


@pytest.mark.parametrize("variable", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_decided_stays(variable: str) -> None:
    os.environ[variable] = "1"
    with threads.sharing_cores():
        assert "charlm-cores" not in names_of_threads()
    assert os.environ[variable] == "1"


def test_a_quota_limits_the_threads_unless_the_user_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "processors", lambda: 3)
    with threads.sharing_cores():
        assert os.environ["OMP_NUM_THREADS"] == "3"
    os.environ["OMP_NUM_THREADS"] = "5"
    with threads.sharing_cores():
        assert os.environ["OMP_NUM_THREADS"] == "5"


def test_without_a_quota_no_variable_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "processors", lambda: None)
    with threads.sharing_cores():
        assert not any(name in os.environ for name in VARIABLES)
