"""`ForkLock`: a lock that is open in a forked process; `GENERATORS`: the lock of torch's own generators.

The child of `os.fork` has none of its parent's other threads. A lock that one of them held would stay closed
in the child for ever.
"""

from __future__ import annotations

import os
from threading import RLock

__all__ = ["GENERATORS", "ForkLock"]


class ForkLock:
    """A lock that is made anew in each forked process.

    It is reentrant, because a signal handler may need the lock that its own thread holds. `with` takes the
    lock of C itself, so an interrupt at any place releases it, and a child that is forked inside the block
    leaves the block as its parent does.

    Attributes:
        lock: the lock of this process, for `with`.

    Example:
        >>> guarded = ForkLock()
        >>> with guarded.lock:
        ...     pass
    """

    lock: RLock

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.lock = RLock()


GENERATORS = ForkLock()
"""Held while charlm uses torch's global generators, which belong to the caller."""
