"""What stands in for a new Python in tests does what that does."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness.command import environment
from harness.warm import WarmPython

pytestmark = pytest.mark.slow

PROGRAM = """
import os, subprocess, sys, warnings
print(sys.argv, __name__, os.getcwd(), os.environ["WORD"], sys.stdin.read(), flush=True)
print("é😀", file=sys.stderr)
match sys.argv[-1]:
    case "a code": sys.exit(3)
    case "a sentence": sys.exit("it ends")
    case "an error": raise ValueError("no")
    case "a warning": warnings.warn("careful")
    case "a child": subprocess.run(["echo", "out"], check=True)
"""


@pytest.mark.parametrize("how", ["", "a code", "a sentence", "an error", "a warning", "a child"])
@pytest.mark.parametrize("given", ["code", "file"])
def test_a_fork_does_what_python_does(tmp_path: Path, warm_python: WarmPython, how: str, given: str) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM, encoding="utf-8")
    what = ["-c", PROGRAM] if given == "code" else [str(file)]
    ended = [
        subprocess.run(
            command,
            cwd=tmp_path,
            env=environment(WORD="größer", PYTHONIOENCODING="utf-8"),
            input="given",
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        for command in ([sys.executable, "-W", "error", *what, how], warm_python("-W", "error", *what, how))
    ]
    wanted, got = ended
    assert (got.returncode, got.stdout) == (wanted.returncode, wanted.stdout)
    assert [line for line in got.stderr.splitlines() if line[:1] != " "] == [
        line for line in wanted.stderr.splitlines() if line[:1] != " "
    ]


def test_forks_share_nothing_with_each_other(tmp_path: Path, warm_python: WarmPython) -> None:
    change = "import os, charlm; charlm.changed = True; os.environ['CHANGED'] = '1'; os.chdir('/')"
    look = "import os, charlm; print(hasattr(charlm, 'changed'), 'CHANGED' in os.environ, os.getcwd())"
    subprocess.run(warm_python("-c", change), check=True)
    done = subprocess.run(warm_python("-c", look), check=True, cwd=tmp_path, stdout=subprocess.PIPE)
    assert done.stdout.decode() == f"False False {tmp_path}\n"


def test_a_fork_that_is_killed_is_a_failure(warm_python: WarmPython) -> None:
    done = subprocess.run(
        warm_python("-c", "import os; os.kill(os.getpid(), 9)"), check=False, stderr=subprocess.PIPE
    )
    assert (done.returncode, done.stderr) == (1, b"the fork was killed\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="`start` starts a new Python there")
def test_a_fork_that_was_started_gets_signals_and_ends_as_any_child(
    tmp_path: Path, warm_python: WarmPython
) -> None:
    code = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        "print(os.getpid(), os.getcwd(), os.environ['WORD'], flush=True); sys.stdin.read(); signal.pause()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    for number, wanted in ((signal.SIGTERM, 7), (signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 1)):
        process = warm_python.start("-c", code, env=environment(WORD="it"), cwd=tmp_path, **pipes)
        assert process.stdout is not None
        assert process.stdout.readline() == f"{process.pid} {tmp_path} it\n".encode()
        assert process.poll() is None
        process.send_signal(number)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == wanted, out
