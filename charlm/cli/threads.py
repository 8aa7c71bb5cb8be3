"""Sets the number of torch's threads, and shortens their waits when other processes want the same cores.

The threads of a matrix product wait for one another by spinning, which is fastest if each has its own core.
On a core that another process also wants, a spinning thread may waste the whole time slice: two trainings at
once then run at a fifteenth of their speed (docs/experiments.md). GNU's OpenMP, which torch uses on Linux,
spins only a thousandth as long if it manages more threads than cores. So while threads of this process queue
for a core, one more team of sleeping threads is kept. The number of torch's threads, and with it every bit of
a training, does not change. No torch here. Only the command does this, not the library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from charlm.backends import host

__all__ = ["sharing_cores"]

_TASKS = Path("/proc/self/task")
_MAPS = Path("/proc/self/maps")
_DECIDED_BY_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_PERIOD = 0.25  # seconds between two looks
_CROWDED = 0.15  # cores are shared if all threads together queue for so many seconds per second
_FREE, _FREE_LOOKS = 0.05, 4  # they are free again if it is less than this, so many times in a row


@contextlib.contextmanager
def sharing_cores() -> Iterator[None]:
    """Let torch's threads share the cores with other processes inside the block.

    Enter it before torch is imported: then torch also starts no more threads than the quota of a control
    group allows. The user's own environment variables are respected.
    """
    quota = host.processors()
    if quota is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(quota))
    if any(name in os.environ for name in _DECIDED_BY_THE_USER) or _queued_seconds() is None:
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done,), name="charlm-cores", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _watch(done: threading.Event) -> None:
    """Keep one more team of threads whenever the process queues for cores, until `done`."""
    team: threading.Event | None = None
    queued, at, free_looks = _queued_seconds() or 0.0, time.perf_counter(), 0
    while not done.wait(_PERIOD):
        before, since = queued, at
        queued, at = _queued_seconds() or 0.0, time.perf_counter()
        share = (queued - before) / (at - since)
        free_looks = free_looks + 1 if share < _FREE else 0
        if team is None and share > _CROWDED:
            team = _one_more_team()
        elif team is not None and free_looks >= _FREE_LOOKS:
            team.set()
            team = None
    if team is not None:
        team.set()


def _one_more_team() -> threading.Event | None:
    """Let GNU's OpenMP start an idle team that lives until the event is set; None: it is not loaded."""
    path = next((line.split(maxsplit=5)[-1] for line in _lines(_MAPS) if "/libgomp" in line), None)
    if path is None:
        return None
    gomp, end = ctypes.CDLL(path), threading.Event()
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing

    def team() -> None:
        gomp.GOMP_parallel(nothing, None, os.cpu_count() or 1, 0)
        end.wait()

    threading.Thread(target=team, name="charlm-team", daemon=True).start()
    return end


def _queued_seconds() -> float | None:
    """Return the total time that this process's threads have waited for a core; None: unknown.

    It is the second number of each `schedstat`: https://docs.kernel.org/scheduler/sched-stats.html.
    """
    lines = [line.split() for task in _entries(_TASKS) for line in _lines(task / "schedstat")]
    return sum(int(numbers[1]) for numbers in lines) / 1e9 if lines else None


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # not Linux
        return []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux, or a thread that has ended meanwhile
        return []
