"""Ctrl-C and SIGTERM.

A first signal ends the command with `Interrupted`, or, while a training runs, asks that training to save
and stop; where a person writes with a model, each Ctrl-C stops what the model writes, and no more. Else a
second Ctrl-C ends the process at once, even in the middle of a long operation of torch: Python calls its
handlers between two instructions only, so a thread watches the signals as they arrive. (Nothing is damaged
by that, files appear whole or not at all.)
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interrupted", "Signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# `timeout`, process managers and shells may send one signal to a process twice within a moment.
_SAME_KEYPRESS_SECONDS = 0.1


class Interrupted(BaseException):
    """A signal came while nothing had to be saved. It is no `Exception`, so no handler of errors takes it."""


class Signals:
    """Handlers of SIGINT and SIGTERM inside a `with` block; the previous ones are restored after it.

    They raise only inside `raising`, since an exception during the change of handlers would leave some
    behind. Outside the main thread, where Python has no handlers, nothing is done. An ignored signal, as
    under `nohup`, stays ignored.

    Attributes:
        received: the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._stop: Callable[[], None] | None = None
        self._announce: Callable[[], None] | None = None
        self._before: dict[int, Any] = {}
        self._thread: threading.Thread | None = None
        self._at_once, self._last_words = False, ""
        self._raises = False
        self._each: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="charlm-signals", daemon=True)
        self._thread.start()
        self._hook_before = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        sys.unraisablehook = self._hook_before
        signal.set_wakeup_fd(self._fd_before)
        self._writer.close()
        self._thread.join()
        self._reader.close()
        for number, handler in reversed(self._before.items()):  # SIGINT last: its old handler may raise
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """Exit code of a command that a signal ended: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self.received or signal.SIGINT)

    def check(self) -> None:
        """Raise Interrupted if a signal came and its exception was lost, for example inside an import."""
        if self.received is not None:
            raise Interrupted

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let the first signal raise Interrupted inside the block, even if it came before."""
        try:
            self._raises = True
            self.check()
            yield
        finally:
            self._raises = False

    @contextmanager
    def ending_at_once(self, last_words: str = "") -> Iterator[None]:
        """Let a signal end the process without an exception inside the block, for imports.

        Nothing has to be saved yet, and an exception inside the import of torch may abort the process with a
        message of C++.

        Args:
            last_words: for the user of a process that ends so.
        """
        self._at_once, self._last_words = True, last_words
        try:
            yield
        finally:
            self._at_once = False

    @contextmanager
    def calling(self, each: Callable[[], None]) -> Iterator[None]:
        """Let every Ctrl-C inside the block call `each`, in the main thread, and end nothing itself."""
        self._each = each
        try:
            yield
        finally:
            self._each = None

    def stop_gently(self, stop: Callable[[], None], announce: Callable[[], None]) -> None:
        """From now on, the first signal calls `stop` instead of raising.

        Args:
            stop: called in the main thread, between two instructions.
            announce: called at once, in another thread; for a message.
        """
        self._stop, self._announce = stop, announce
        self.check()

    def raise_again(self) -> None:
        """From now on, the first signal raises Interrupted."""
        self._stop = self._announce = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._each is not None:
            self._each()
            return
        if self.received is not None:
            return
        if self._at_once:
            try:
                print(self._last_words, end="", file=sys.stderr, flush=True)
            finally:  # even if standard error was just being written
                os._exit(128 + number)
        self.received = number
        if self._stop is not None:
            self._stop()
        elif self._raises:
            raise Interrupted

    def _unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        """Ignore an Interrupted that was lost in the callback of a weak reference: `check` raises it."""
        if lost.exc_type is not Interrupted:
            self._hook_before(lost)

    def _next(self, repeat: bool) -> bytes:
        """Return the signals that come next; until Python has seen the last one, send it again if `repeat`.

        Python's readline overlooks a signal that comes in the moment before it waits for a key.
        """
        while True:
            self._reader.settimeout(0.1 if repeat and self.received is None else None)
            try:
                return self._reader.recv(64)
            except TimeoutError:
                if self.received is None:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _watch(self) -> None:
        first_at: float | None = None
        while arrived := self._next(repeat=self._each is not None and first_at is not None):
            now = time.monotonic()
            if not set(arrived).intersection(_SIGNALS):  # the program's own handler of another signal
                continue
            if self._each is not None and signal.SIGTERM not in arrived:
                continue
            if first_at is None:
                first_at = now
                if self._announce is not None:
                    self._announce()
            elif signal.SIGINT in arrived and now - first_at > _SAME_KEYPRESS_SECONDS:
                os._exit(128 + signal.SIGINT)
