"""System calls that fail on command, or stop the world as a kill does.

`failing(...)` replaces functions of the `os` module for the length of a block and counts the calls. At one
of them it raises. An `OSError` may come once or go on for that function; a `Killed` goes on for every
function, so that what a killed process would leave on the disk is left. A close that fails has closed, as on
Linux.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

__all__ = ["Calls", "Killed", "failing"]

NAMES = (
    *("open", "write", "fsync", "close", "fstat", "lstat", "stat", "listdir", "scandir"),
    *("mkdir", "rename", "replace", "unlink", "rmdir", "ftruncate"),
)


class Killed(BaseException):
    """Stands for the end of the process."""


class Calls:
    """The calls of one block, what each was about, and whether the failing one was reached."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.first_arguments: list[object] = []
        self.failed: str | None = None


@contextlib.contextmanager
def failing(at: int, *, how: str = "once", code: int = errno.EIO) -> Iterator[Calls]:
    """Fail call number `at` of the block (-1: none), "once", "always" (that function) or "kill" (all)."""
    calls = Calls()

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if _is_of_coverage():
                return real(*args, **kwargs)
            calls.names.append(name)
            calls.first_arguments.append(args[0] if args else None)
            first = len(calls.names) - 1 == at
            again = calls.failed is not None and (how == "kill" or (how == "always" and calls.failed == name))
            if not (first or again):
                return real(*args, **kwargs)
            calls.failed = calls.failed or name
            if name == "close":
                with contextlib.suppress(OSError):  # rmtree closes again after a close that failed
                    real(*args, **kwargs)
            raise Killed if how == "kill" else OSError(code, "failed on purpose")

        return call

    with contextlib.ExitStack() as stack:
        for name in NAMES:
            stack.enter_context(mock.patch.object(os, name, wrapped(name, getattr(os, name))))
        yield calls


def _is_of_coverage() -> bool:
    """Whether coverage.py asks, which looks at a source file when a line of it first runs."""
    frame = sys._getframe(2)
    for _ in range(8):
        if f"{os.sep}coverage{os.sep}" in frame.f_code.co_filename:
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False
