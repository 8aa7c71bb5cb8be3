"""Texts of any length that look like prose, and what a command took of memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from harness.command import ROOT, environment

import charlm

__all__ = ["peak_of", "write_prose"]

_AT_ONCE = 2_000_000  # words

_PEAK = "[int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')][0] / 1024"
_COMMAND = f"""
import sys
from charlm.cli.__main__ import main
code = main(sys.argv[1:])
print("peak", {_PEAK}, file=sys.stderr)
sys.exit(code)
"""
_TORCH = f"import sys, torch; print('peak', {_PEAK}, file=sys.stderr)"


def write_prose(path: Path, megabytes: int, seed: int = 1) -> int:
    """Write words of Python's documentation, each as often as there, in lines, and return how many bytes."""
    words = np.array(charlm.load_corpus("python-docs").split())
    generator = np.random.default_rng(seed)
    count = min(_AT_ONCE, megabytes * 1_000_000 // 6 + 1)
    drawn = words[generator.integers(len(words), size=count)].tolist()
    lines = [" ".join(drawn[i : i + 12]) for i in range(0, count, 12)]
    written = 0
    with path.open("wb") as file:
        while written < megabytes * 1_000_000:
            generator.shuffle(lines)
            written += file.write(("\n".join(lines) + "\n").encode())
    return written


def peak_of(words: Sequence[str] | None) -> float:
    """Return the peak of resident memory of a command in a process of its own, in MB of 2**20 bytes.

    Args:
        words: of the command, as after `charlm`. None: a process that only imports torch.
    """
    code = _TORCH if words is None else _COMMAND
    done = subprocess.run(
        [sys.executable, "-c", code, *(words or ())],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stderr.rsplit("peak ", 1)[1])
