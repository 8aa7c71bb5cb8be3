"""Locks in a process that is forked while another of its threads holds them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FORKING = """
import os, threading
from charlm.locks import ForkLock

lock, held, over = ForkLock(), threading.Event(), threading.Event()

def hold():
    with lock:
        held.set()
        over.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    with lock:
        os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
over.set()
thread.join()
with lock:
    print("open")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_lock_that_another_thread_holds_is_open_in_the_child() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("open\n", 0), done.stderr
