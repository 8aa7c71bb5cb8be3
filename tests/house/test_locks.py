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
    with lock.lock:
        held.set()
        over.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    with lock.lock:
        os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
over.set()
thread.join()
with lock.lock:
    print("open")
"""
INSIDE = """
import os, threading
from charlm.locks import ForkLock

lock = ForkLock()

def take():
    with lock.lock:
        print("open", flush=True)

with lock.lock, lock.lock:
    child = os.fork()
    with lock.lock:
        pass
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
else:
    thread = threading.Thread(target=take)
    thread.start()
    thread.join(20)
    with lock.lock:
        os._exit(thread.is_alive())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("program", [FORKING, INSIDE], ids=["another thread", "the thread that forks"])
def test_a_lock_that_is_held_while_a_process_is_forked_is_open_in_the_child(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.stdout, done.returncode) == ("open\n", 0), done.stderr
