"""Facts from the operating system: memory, cores, and whether torchrun started this process. No torch.

Linux reports memory in `/proc/meminfo`. Its control groups (of containers and batch systems) may set a lower
limit: https://docs.kernel.org/admin-guide/cgroup-v2.html, and the older version 1. Other systems report the
total or nothing; an unknown fact is None, and then no check fails.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = [
    "available_bytes",
    "is_under_torchrun",
    "process_bytes",
    "processes_here",
    "processors",
    "total_bytes",
]

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60  # version 1 writes "no limit" as the largest number of whole pages below 2**63


def is_under_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun, or a program that sets the same variables, started this process."""
    return all(name in environment for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def processes_here(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes of torchrun on this machine; without it, 1."""
    size = environment.get("LOCAL_WORLD_SIZE", "")
    return max(int(size), 1) if size.isdecimal() and is_under_torchrun(environment) else 1


def total_bytes() -> int | None:
    """Return the memory of the machine, or the limit of a control group if it is lower; None: unknown."""
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows; a system without these names
        return None
    limits = [limit for limit, _ in _control_groups()]
    return min([installed, *limits]) if installed > 0 else None


def available_bytes() -> int | None:
    """Return the memory that is available now; None: unknown.

    Memory of the file cache counts as available, and so does free swap. In a control group it is at most the
    rest of the limit.
    """
    machine = _fields(_PROC / "meminfo")
    if "MemAvailable" not in machine:
        return None
    left = [limit - in_use for limit, in_use in _control_groups()]
    return max(0, min([1024 * (machine["MemAvailable"] + machine.get("SwapFree", 0)), *left]))


def process_bytes() -> tuple[int, int] | None:
    """Return the memory of this process, now and at its peak; None: unknown."""
    own = _fields(_PROC / "self" / "status")
    if "VmRSS" in own:
        return 1024 * own["VmRSS"], 1024 * max(own["VmRSS"], own.get("VmHWM", 0))
    try:
        import resource  # noqa: PLC0415 - Windows has no such module
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak  # the present memory is unknown, but at most the peak


def processors() -> int | None:
    """Return the number of cores that this process's control group may use, rounded up; None: no limit."""
    shares: list[float] = []
    files: tuple[str, ...]
    for line in _text(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = _CGROUPS, ("cpu.max",)
        elif "cpu" in controllers.split(","):
            root, files = _CGROUPS / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        own = Path(path.lstrip("/"))
        for group in (root / own, *(root / parent for parent in own.parents)):
            words = " ".join(_text(group / name) for name in files).split()
            # "max" and -1 mean no limit.
            if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) > 0:
                shares.append(int(words[0]) / int(words[1]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(shares))) if shares and min(shares) <= cores - 1 else None


def _control_groups() -> Iterator[tuple[int, int]]:
    """Yield limit and use in bytes of each control group of this process with a limit."""
    for line in _text(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_file, use_file, cache = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            limit_file, use_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # In a container the path may be that of the host and not exist: then its own group is the root.
        own = Path(path.lstrip("/"))
        for group in (root / own, *(root / parent for parent in own.parents)):
            limit = _text(group / limit_file).strip()  # "max": none
            if limit.isdigit() and int(limit) < _NO_LIMIT:
                in_use = _text(group / use_file).strip()
                freed = _fields(group / "memory.stat").get(cache, 0)
                yield int(limit), max(0, int(in_use) - freed) if in_use.isdigit() else 0


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines like "MemTotal:   24684100 kB", without their unit."""
    words = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system, or a file without permission
        return ""
