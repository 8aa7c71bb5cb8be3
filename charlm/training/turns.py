"""`Turns`: at any time one thread works on a run, the training thread or one that saves or evaluates.

A checkpoint belongs to the end of a step. So the training thread holds the run during each step, and other
threads that want to save or evaluate wait for its end. A signal handler runs inside a thread: in the training
thread it cannot wait, so its call is refused.

An interrupt may come at any line. So a turn is held by a lock of C, which a `with` always releases, and
`_holder` counts only while that lock is held.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakSet

from charlm.errors import InputError

__all__ = ["Turns"]

T = TypeVar("T")


class Turns:
    """Lets one thread at a time work on a run.

    Example:
        >>> turns = Turns()
        >>> def save_in_a_callback():
        ...     with turns.between():
        ...         return turns.visit("save", lambda: "saved")
        >>> turns.step(save_in_a_callback)
        'saved'
    """

    def __init__(self) -> None:
        self._renew()
        _all.add(self)

    def _renew(self) -> None:
        self._queue = threading.RLock()  # a visitor holds it, too, so that the next step waits
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._is_between = False  # whether the holder is between two steps

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        """Copy and pickle as new ones."""
        return Turns, ()

    def step(self, work: Callable[[], T]) -> T:
        """Do a part of a run, after the waiting visitors."""
        if self._is_mine():  # the garbage collector may end an abandoned loop at any place
            return work()
        with self._queue:
            pass
        with self._lock:
            self._holder, self._is_between = threading.get_ident(), False
            return work()

    @contextmanager
    def between(self) -> Iterator[None]:
        """Let the holder itself visit inside the block, when the step's update is done."""
        before, self._is_between = self._is_between, True
        try:
            yield
        finally:
            self._is_between = before

    def visit(self, what: str, work: Callable[[], T], instead: str = "") -> T:
        """Work on the run at the end of a step: wait for it, or be refused.

        Args:
            what: the method that was called, for the message.
            work: the function to call.
            instead: advice for a caller that cannot wait.

        Raises:
            InputError: this thread is in the middle of a step.
        """
        if self._is_mine():
            if not self._is_between:
                raise InputError(
                    f"{what}() was called in the middle of a step, by a signal handler or from inside the "
                    f"model, and can be answered only at a step's end{instead}"
                )
            self._is_between = False
            try:
                return work()
            finally:
                self._is_between = True
        with self._queue, self._lock:
            self._holder, self._is_between = threading.get_ident(), False
            return work()

    def _is_mine(self) -> bool:
        return self._lock.locked() and self._holder == threading.get_ident()


_all: WeakSet[Turns] = WeakSet()


def _renew_all() -> None:
    """Renew the locks in a forked process, which does not have the threads that hold them."""
    for turns in list(_all):
        turns._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
