"""The memory of the machine: as the system tells it, and as files of other systems would."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from charlm.backends import host
from charlm.backends.base import MemoryStats
from charlm.backends.cpu import CPUBackend
from charlm.errors import BackendError

pytestmark = pytest.mark.slow

MEMINFO = "MemTotal:  16000000 kB\nMemFree:  1000000 kB\nMemAvailable:  4000000 kB\nSwapFree:  500000 kB\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with `proc` and `cgroups`, which the module reads in place of the machine's own."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "cgroups").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO, encoding="utf-8")
    monkeypatch.setattr(host, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "_CGROUPS", tmp_path / "cgroups")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="what other systems tell differs")
def test_the_processor_tells_its_memory_and_a_large_tensor_shows_in_it() -> None:
    before = CPUBackend().memory()
    large = torch.ones(2**25)  # 128 MiB
    after = CPUBackend().memory()
    assert before is not None
    assert after is not None
    assert after.allocated - before.allocated > 100 * 2**20
    assert after.peak >= after.allocated
    assert large.nbytes < after.free <= after.total + 2**40
    assert after.available is not None


def test_free_is_what_is_left_of_the_total_where_the_device_does_not_tell_more() -> None:
    assert MemoryStats(allocated=3, peak=4, total=10).free == 7
    assert MemoryStats(allocated=3, peak=4, total=10, available=0).free == 0


def test_free_swap_counts_and_a_machine_without_groups_has_all(machine: Path) -> None:
    assert host.available_bytes() == 4_500_000 * 1024


@pytest.mark.parametrize("group", ["/", "/user/job"])
def test_a_limit_of_a_control_group_is_heeded(machine: Path, group: str) -> None:
    write(machine / "proc" / "self" / "cgroup", f"0::{group}\n")
    folder = machine / "cgroups" / group.lstrip("/")
    write(folder / "memory.max", "3000000\n")
    write(folder / "memory.current", "2000000\n")
    write(folder / "memory.stat", "anon 1200000\ninactive_file 700000\n")  # files can be dropped
    assert host.available_bytes() == 1_700_000
    assert host.total_bytes() == 3_000_000


def test_the_limit_of_a_parent_group_is_heeded_too(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "0::/user/job\n")
    write(machine / "cgroups" / "user" / "job" / "memory.max", "max\n")
    write(machine / "cgroups" / "user" / "memory.max", "5000\n")
    write(machine / "cgroups" / "user" / "memory.current", "6000\n")
    assert host.total_bytes() == 5000
    assert host.available_bytes() == 0


def test_in_a_container_that_sees_the_outer_path_the_root_is_its_own_group(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "0::/docker/0123456789\n")
    write(machine / "cgroups" / "memory.max", "9000\n")
    assert host.total_bytes() == 9000


def test_the_older_control_groups_are_heeded(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "5:devices:/\n4:cpu,memory:/job\n0::/\n")
    folder = machine / "cgroups" / "memory"
    write(folder / "memory.limit_in_bytes", f"{2**63 - 4096}\n")
    write(folder / "job" / "memory.limit_in_bytes", "8000\n")
    write(folder / "job" / "memory.usage_in_bytes", "5000\n")
    write(folder / "job" / "memory.stat", "total_inactive_file 1000\n")
    assert host.total_bytes() == 8000
    assert host.available_bytes() == 4000


def test_a_system_that_tells_nothing_gives_none(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "proc" / "meminfo").unlink()
    assert host.available_bytes() is None
    monkeypatch.delattr(os, "sysconf")
    assert host.total_bytes() is None
    assert CPUBackend().memory() is None


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_without_proc_the_peak_stands_for_the_present(
    machine: Path, monkeypatch: pytest.MonkeyPatch, platform: str, unit: int
) -> None:
    import resource

    monkeypatch.setattr(sys, "platform", platform)
    known = host.process_bytes()
    assert known is not None
    assert known[0] == known[1] == unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows
    assert host.process_bytes() is None


def test_compiling_without_a_compiler_is_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    model = nn.Linear(2, 2)
    with pytest.raises(BackendError, match=r"C\+\+ compiler '/nowhere/g\+\+', which is not found.*CXX"):
        CPUBackend().prepare(model, compile=True)
    assert CPUBackend().prepare(model) is model


def test_reading_the_memory_needs_no_torch() -> None:
    code = (
        "import runpy, sys, charlm\n"
        "runpy.run_path(sys.argv[1])['available_bytes']()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, host.__file__], check=True)


MAPPED = """
import ctypes, sys, torch
from torch import nn
from charlm.backends.cpu import CPUBackend
fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in fields]})
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
if sys.argv[1] == "prepared":
    CPUBackend().prepare(nn.Linear(1, 1))
before = mallinfo().hblkhd  # bytes in blocks that go back to the system when they are freed
large = torch.ones(6 * 2**20)  # 24 MiB
print(mallinfo().hblkhd - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 to look inside")
def test_a_prepared_process_keeps_the_memory_of_large_tensors_that_it_frees() -> None:
    mapped = {}
    for how in ("plain", "prepared"):
        done = subprocess.run([sys.executable, "-c", MAPPED, how], capture_output=True, text=True, check=True)
        mapped[how] = int(done.stdout)
    assert mapped["plain"] >= 24 * 2**20
    assert mapped["prepared"] <= 0


def test_without_a_quota_all_processors_may_be_used(machine: Path) -> None:
    assert host.processors() is None
    write(machine / "proc" / "self" / "cgroup", "0::/some/group\n")
    write(machine / "cgroups" / "some" / "group" / "cpu.max", "max 100000\n")
    assert host.processors() is None


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("150000 100000", 2),
        ("100000 100000", 1),
        ("20000 100000", 1),
        ("1 0", None),
        ("torn", None),
        ("", None),
    ],
)
def test_a_quota_is_rounded_up_to_whole_processors(
    machine: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    write(machine / "proc" / "self" / "cgroup", "0::/some/group\n")
    write(machine / "cgroups" / "some" / "group" / "cpu.max", limit + "\n")
    assert host.processors() == expected


def test_the_lowest_quota_on_the_way_to_the_root_counts(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    write(machine / "proc" / "self" / "cgroup", "0::/some/group\n")
    write(machine / "cgroups" / "some" / "group" / "cpu.max", "max 100000\n")
    write(machine / "cgroups" / "some" / "cpu.max", "300000 100000\n")
    assert host.processors() == 3


def test_a_quota_above_what_there_is_limits_nothing(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))
    write(machine / "proc" / "self" / "cgroup", "0::/\n")
    write(machine / "cgroups" / "cpu.max", "900000 100000\n")
    assert host.processors() is None


def test_the_older_kind_of_group_has_its_quota_in_two_files(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    write(machine / "proc" / "self" / "cgroup", "4:cpu,cpuacct:/box\n3:memory:/box\n")
    write(machine / "cgroups" / "cpu" / "box" / "cpu.cfs_quota_us", "250000\n")
    write(machine / "cgroups" / "cpu" / "box" / "cpu.cfs_period_us", "100000\n")
    assert host.processors() == 3
    write(machine / "cgroups" / "cpu" / "box" / "cpu.cfs_quota_us", "-1\n")
    assert host.processors() is None
