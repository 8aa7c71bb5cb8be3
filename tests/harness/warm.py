"""A process that has torch and charlm loaded, and forks in place of a new Python, which takes two seconds.

A fork has arguments, variables, a working directory and streams of its own, as a new Python has. It inherits
the modules: what is about them, or about how Python begins, decodes and ends, needs a new Python. A command
that asks for a fork cannot pass signals on to it; `start` gives a process that can be sent them. This file is
also the program of the warm process.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
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
import time
import traceback
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

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

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start what Python would do with these arguments, in a process that signals can be sent to.

        Args:
            arguments: as above.
            options: those of `subprocess.Popen`: variables, directory, streams.
        """
        if not sys.platform.startswith("linux"):  # there, another's child cannot become one's own
            return subprocess.Popen([sys.executable, *arguments], **options)
        return _Adopted([self._socket, *arguments], **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=60)
        self._folder.cleanup()


class _Adopted(subprocess.Popen[bytes]):
    """A fork of the warm process that is a child of this one: when its parent ends, it goes to this one."""

    def _execute_child(self, args: list[str], *given: Any) -> None:
        """Take the place of what `subprocess.Popen` does to start a process."""
        folder, variables = given[4] or Path.cwd(), given[5] or os.environ
        pipes = given[9:15]  # the two ends of standard input, then those of output, then those of errors
        streams = [pipes[at] if pipes[at] != -1 else own for own, at in enumerate((0, 3, 5))]
        request = json.dumps([args[1:], os.fspath(folder), dict(variables), "adopted"]).encode() + b"\n"
        _adopt(True)
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(args[0])
                socket.send_fds(connection, [request[:1]], streams)
                connection.sendall(request[1:])
                with connection.makefile("rb") as said:
                    self.pid = int(said.readline())
            stat = Path(f"/proc/{self.pid}/stat")
            while int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1]) != os.getpid():
                time.sleep(0.001)
        finally:
            _adopt(False)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]  # of this process


def _adopt(wanted: bool) -> None:
    """Become, or no longer be, the process that gets the children of descendants that end."""
    if ctypes.CDLL(None, use_errno=True).prctl(36, int(wanted), 0, 0, 0):  # PR_SET_CHILD_SUBREAPER
        raise OSError(ctypes.get_errno(), "prctl")


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
        arguments, folder, variables, *adopted = json.loads(first + rest.readline())
    if adopted and (pid := os.fork()):
        connection.sendall(b"%d\n" % pid)
        os._exit(0)
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
            if not adopted:
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
