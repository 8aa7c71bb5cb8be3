"""Processes that live through many trials.

`LongLived` begins such a process, asks it to call functions by name, with arguments and answers as JSON, and
restarts it if it was killed. This file is also the program that runs in it. Signals that reach the process
outside of what is tested are noted by handlers of its own, and do nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.command import environment
from harness.warm import WarmPython

__all__ = ["LongLived", "command"]


class LongLived:
    """A process that calls functions on request.

    Args:
        python: whose fork it is.
    """

    def __init__(self, python: WarmPython) -> None:
        self._process = subprocess.Popen(
            python("-W", "error", __file__),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        )
        self.pid: int = self.call("os:getpid")

    def ask(self, function: str, **arguments: object) -> None:
        """Request a call, `module:function`; the answer is fetched with `answer`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([function, arguments]).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Wait for the answer to the last request; an exception of the function fails the test."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process ended with {self._process.wait()}"
        answer = json.loads(line)
        assert "raised" not in answer, answer["raised"]
        return answer["returned"]

    def call(self, function: str, **arguments: object) -> Any:
        """Request a call and wait for its answer."""
        self.ask(function, **arguments)
        return self.answer()

    def kill(self) -> None:
        """End the process with SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


_stray: list[str] = []  # signals that came while no command had handlers


def _note(number: int, frame: FrameType | None) -> None:
    _stray.append(signal.Signals(number).name)


def command(args: list[str]) -> dict[str, object]:
    """Call the command in this process, and say what it did and where the signal, if one came, met it."""
    from charlm.cli.__main__ import main
    from charlm.cli.signals import Signals

    met: list[str] = []
    handle = Signals._handle

    def looking(self: Signals, number: int, frame: FrameType | None) -> None:
        met.append(_place(frame))
        handle(self, number, frame)

    _stray.clear()
    before = _handlers()
    out, err = io.StringIO(), io.StringIO()
    Signals._handle = looking  # type: ignore[method-assign]  # only looks, and goes on
    began = time.monotonic()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(args)
    finally:
        Signals._handle = handle  # type: ignore[method-assign]
    return {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "met": met,
        "stray": list(_stray),
        "restored": _handlers() == before,
        "seconds": time.monotonic() - began,
    }


def _handlers() -> list[object]:
    """Return what a command must leave as it was: both handlers, and the descriptor for wake-ups."""
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    return [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), descriptor]


_PLACES = {
    ("writer.py", "write"): "a save",
    ("trainer.py", "evaluate"): "an evaluation",
    ("step.py", "take"): "a step",
    ("trainer.py", "_finish"): "the end of a run",
    ("trainer.py", "_begin"): "the beginning of a training",
    ("trainer.py", "_steps"): "a training",
    ("resume.py", "resume"): "a resume",
}


def _place(frame: FrameType | None) -> str:
    """Return the innermost known function that a signal met."""
    while frame is not None:
        place = _PLACES.get((Path(frame.f_code.co_filename).name, frame.f_code.co_name))
        if place is not None:
            return place
        frame = frame.f_back
    return "no training yet, or none any more"


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed is no answer
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _note)
    for line in sys.stdin.buffer:
        name, arguments = json.loads(line)
        module, _, function = name.partition(":")
        try:
            answer = {"returned": getattr(importlib.import_module(module), function)(**arguments)}
        except Exception as error:  # noqa: BLE001 - whatever it is, the other process says it
            import traceback

            answer = {"raised": "".join(traceback.format_exception(error))}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    sys.modules["harness.long_lived"] = sys.modules["__main__"]  # one module, under both names
    _serve()
