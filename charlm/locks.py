"""`ForkLock`: a lock that a forked process finds open, and `GENERATORS`, the one of torch's own generators.

The child of `os.fork` has none of its parent's other threads, so a lock that one of them held would stay shut
in it for ever.
"""

from __future__ import annotations

import os
from threading import RLock

__all__ = ["GENERATORS", "ForkLock"]


class ForkLock:
    """A lock that is made anew in each forked process.

    It is reentrant, since a signal handler may need what its own thread holds just then. The block is entered
    with the lock of C itself: it is given back wherever an interrupt comes, and a child that is forked inside
    the block leaves it as its parent does.

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
"""Held while torch's global generators, which belong to the caller, are in other hands for a moment."""
