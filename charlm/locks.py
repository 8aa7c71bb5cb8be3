"""`ForkLock`: a lock that a forked process finds open, and `GENERATORS`, the one of torch's own generators.

The child of `os.fork` has none of its parent's other threads, so a lock that one of them held would stay shut
in it for ever.
"""

from __future__ import annotations

import os
from threading import RLock, local

__all__ = ["GENERATORS", "ForkLock"]


class ForkLock:
    """A `threading.RLock` for `with`, made anew in each forked process.

    It is reentrant, since a signal handler may need what its own thread holds just then. A child that is
    forked inside the block leaves it as its parent does.

    Example:
        >>> lock = ForkLock()
        >>> with lock:
        ...     pass
    """

    def __init__(self) -> None:
        self._held = _Held()
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> None:
        lock = self._lock
        lock.acquire()
        self._held.locks.append(lock)

    def __exit__(self, *_: object) -> None:
        self._held.locks.pop().release()


class _Held(local):
    """What this thread has acquired, innermost last: after a fork, not what the next block would acquire."""

    def __init__(self) -> None:
        self.locks: list[RLock] = []


GENERATORS = ForkLock()
"""Held while torch's global generators, which belong to the caller, are in other hands for a moment."""
