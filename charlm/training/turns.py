"""`Turns`: whose turn it is to touch a run, the thread that steps or one that saves.

A checkpoint is of a step's end, whoever asks for it. So the thread that steps holds the run from the
beginning of a step to its end, and whoever else wants to save or to score waits until then. A signal handler
runs in the middle of whatever its thread was doing: in a thread that steps it cannot wait, and is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from charlm.errors import InputError

__all__ = ["Turns"]


class Turns:
    """One thread at a time touches a run.

    Attributes:
        holder: the thread whose turn it is, or None.

    Example:
        >>> turns = Turns()
        >>> with turns.of_step():
        ...     with turns.between(), turns.of_guest("save"):  # as a callback saves
        ...         pass
        >>> turns.holder is None
        True
    """

    holder: int | None

    def __init__(self) -> None:
        # Reentrant, since a signal handler may come while its own thread is in here.
        self._changed = threading.Condition(threading.RLock())
        self.holder = None
        self._guests = 0  # that wait: they come before the next step, or might wait for ever
        self._is_between = False  # the holder has nothing half done

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """Hold the run inside the block; wait before it for those that save."""
        me = threading.get_ident()
        if self.holder == me:  # the garbage collector ends an abandoned loop wherever it likes
            yield
            return
        try:
            with self._changed:
                self._changed.wait_for(lambda: self.holder is None and not self._guests)
                self.holder = me
            yield
        finally:
            self._leave(me)

    @contextmanager
    def between(self) -> Iterator[None]:
        """Let the holder itself save and score inside the block, where the step's arithmetic is done."""
        before, self._is_between = self._is_between, True
        try:
            yield
        finally:
            self._is_between = before

    @contextmanager
    def of_guest(self, what: str, instead: str = "") -> Iterator[None]:
        """Touch the run inside the block, at the end of a step: wait for it, or be refused.

        Args:
            what: the method that was called, for the message.
            instead: advice for who cannot wait.

        Raises:
            InputError: this very thread is in the middle of a step.
        """
        me = threading.get_ident()
        if self.holder == me:
            if not self._is_between:
                raise InputError(
                    f"{what}() was called in the middle of a step, by a signal handler or from inside the "
                    f"model, and can be answered only at a step's end{instead}"
                )
            self._is_between = False
            try:
                yield
            finally:
                self._is_between = True
            return
        try:
            with self._changed:
                self._guests += 1
                try:
                    self._changed.wait_for(lambda: self.holder is None)
                    self.holder = me
                finally:
                    self._guests -= 1
            yield
        finally:
            self._leave(me)

    def _leave(self, me: int) -> None:
        with self._changed:
            if self.holder == me:
                self.holder = None
                self._changed.notify_all()
