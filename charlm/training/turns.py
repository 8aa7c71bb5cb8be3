"""`Turns`: whose turn it is to touch a run, the thread that steps or one that saves.

A checkpoint is of a step's end, whoever asks for it. So the thread that steps holds the run from the
beginning of a step to its end, and whoever else wants to save or to score waits until then. A signal handler
runs in the middle of whatever its thread was doing: in a thread that steps it cannot wait, and is refused.

An interrupt may come at any line. So a turn is held by a lock of C, which a `with` always gives back, and a
note of whose it is counts only while that lock is held.
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
    """One thread at a time touches a run.

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
        self._queue = threading.RLock()  # who visits holds it, too, so that the next step waits
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._is_between = False  # the holder has nothing half done

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        """Copy and pickle as new ones."""
        return Turns, ()

    def step(self, work: Callable[[], T]) -> T:
        """Do a part of a run, after those that wait to visit."""
        if self._is_mine():  # the garbage collector ends an abandoned loop wherever it likes
            return work()
        with self._queue:
            pass
        with self._lock:
            self._holder, self._is_between = threading.get_ident(), False
            return work()

    @contextmanager
    def between(self) -> Iterator[None]:
        """Let the holder itself visit inside the block, where the step's arithmetic is done."""
        before, self._is_between = self._is_between, True
        try:
            yield
        finally:
            self._is_between = before

    def visit(self, what: str, work: Callable[[], T], instead: str = "") -> T:
        """Touch the run at the end of a step: wait for it, or be refused.

        Args:
            what: the method that was called, for the message.
            work: what is done.
            instead: advice for who cannot wait.

        Raises:
            InputError: this very thread is in the middle of a step.
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
    """Open in a forked process what a thread holds that it does not have."""
    for turns in list(_all):
        turns._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
