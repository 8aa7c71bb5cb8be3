"""A process that has torch and charlm loaded, and forks in place of a new Python, which takes two seconds.

A fork has arguments, variables, a working directory and streams of its own, as a new Python has. It inherits
the modules, and whoever asks for it cannot send it signals: what is about either, or about how Python begins,
decodes and ends, needs a new Python. This file is also the program of that process.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Self

__all__ = ["WarmPython"]

_ASK = Path(__file__).with_name("ask_warm.py")


class WarmPython:
    """The process; it ends with the `with` block, and whenever this process ends.

    Args:
        environment: its variables; those of a fork are the ones of who asks for it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._socket = str(Path(self._folder.name, "socket"))
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def __call__(self, *arguments: str | Path) -> list[str]:
        """Return a command that does what Python would do with these arguments.

        Args:
            arguments: `-W error` or nothing; `-c code`, `-m module` or a file; what that gets.
        """
        return [sys.executable, "-IS", str(_ASK), self._socket, *map(str, arguments)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=10)
        self._folder.cleanup()


def _serve(path: str) -> None:
    """Fork for everyone who asks, until standard input ends."""
    import charlm

    del sys.path[0]  # this file's folder
    for module in pkgutil.walk_packages(charlm.__path__, "charlm."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        assert threading.active_count() == 1
        while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
            connection, _ = listener.accept()
            with contextlib.suppress(ChildProcessError):  # there is none
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass  # the forks that have ended
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Run what is asked for, say with which code it ended, and end this process."""
    first, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as rest:
        arguments, folder, variables = json.loads(first + rest.readline())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = [
        path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path
    ]
    coded, code = variables.get("PYTHONIOENCODING", "utf-8"), 1
    with (
        open(0, encoding=coded, closefd=False) as sys.stdin,
        open(1, "w", encoding=coded, closefd=False) as sys.stdout,
        open(2, "w", 1, encoding=coded, errors="backslashreplace", closefd=False) as sys.stderr,
    ):
        try:
            code = _run(arguments)
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does at its end
            atexit._run_exitfuncs()
            sys.stdout.flush()
            connection.sendall(bytes([code & 255]))
        finally:
            os._exit(code)


def _run(arguments: list[str]) -> int:
    """Do what Python would do with these arguments; return its exit code."""
    try:
        while arguments[0] == "-W":
            warnings.simplefilter(arguments[1])  # type: ignore[arg-type]  # one of Python's
            del arguments[:2]
        if arguments[0] == "-c":
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            sys.argv, code = ["-c", *arguments[2:]], arguments[1]
            sys.path.insert(0, "")
            exec(compile(code, "<string>", "exec"), vars(main))
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 - as Python does
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1])
