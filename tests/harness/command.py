"""Running the command `charlm` in tests: in this process, or as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from harness.warm import WarmPython

from charlm.cli.__main__ import main

ROOT = Path(__file__).resolve().parents[2]

TEXT = "".join(f"{i} green bottles, hanging on the wall\n" for i in range(60))
MIXING = (
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "2"),
    *(
        "--max-steps",
        "20",
        "--eval-interval",
        "10",
        "--log-interval",
        "5",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ),
)
"""Flags of a training that takes a moment, and mixes its GPT with its n-gram model."""
TINY = (*MIXING, "--no-mixture")
"""The same without the mixture: a run's result is its GPT."""


def environment(**changes: str) -> dict[str, str]:
    """Return this process's variables without those that would change the command, but with `changes`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CHARLM_", "PYTEST_")) and name not in {"CI", "COLUMNS", "LC_ALL", "TERM"}
    }
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def start(
    *args: str, env: Mapping[str, str] | None = None, python: WarmPython | None = None, **options: int
) -> subprocess.Popen[bytes]:
    """Start the command as a process of its own, with pipes unless `options` say otherwise.

    Args:
        args: the words after `charlm`.
        env: its variables; None: those of `environment()`.
        python: whose fork it is; None: a new Python.
        options: descriptors.
    """
    pipes: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        **options,
    }
    words, variables = ("-m", "charlm.cli", *args), environment() if env is None else dict(env)
    if python is not None:
        return python.start(*words, env=variables, **pipes)
    return subprocess.Popen([sys.executable, *words], env=variables, **pipes)


def processor_seconds(pid: int) -> float:
    """Return what a process has had of the processor, on Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def await_handlers(process: subprocess.Popen[bytes]) -> None:
    """Wait until a command that was just started has its own handler for SIGTERM; without /proc, a while."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        time.sleep(1)
    while status.exists() and process.poll() is None:
        lines = status.read_text(encoding="ascii").splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt:"))
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.005)


def end_at_once(process: subprocess.Popen[bytes]) -> tuple[float, bytes]:
    """Send Ctrl-C to a command, and wait for its end.

    Returns:
        Seconds that it still had of the processor, whose time others may want, too (without /proc: seconds),
        and what it wrote to standard error.
    """
    status = Path(f"/proc/{process.pid}/stat")
    before, used = os.times(), 0.0
    if status.exists():
        fields = status.read_text(encoding="utf-8").rpartition(")")[2].split()
        used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=300)[1]
    after = os.times()
    if not used:
        return after.elapsed - before.elapsed, message
    return sum(after[2:4]) - sum(before[2:4]) - used, message


class Command:
    """The command, called inside this process; `out` and `err` are what it wrote last."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = ""
        self.err = ""

    def __call__(self, *args: str | Path) -> int:
        self._capsys.readouterr()
        code = main([str(arg) for arg in args])
        self.out, self.err = self._capsys.readouterr()
        return code

    def train(self, *args: str | Path) -> int:
        """Call `charlm train` with the flags of a tiny model before those given."""
        return self("train", *TINY, *args)


def text_file(folder: Path, text: str = TEXT) -> Path:
    """Write the text to train on."""
    path = folder / "text.txt"
    path.write_bytes(text.encode())
    return path
