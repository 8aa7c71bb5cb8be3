"""`charlm train` in several processes under torchrun: only the first one writes, and all end together."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from charlm.backends.registry import get_backend
from charlm.backends.world import World, join, leave
from charlm.cli.output import Console
from charlm.cli.signals import Signals
from charlm.errors import PeerError

__all__ = ["together"]

_PERIOD = 1.0  # seconds between two looks


@contextmanager
def together(device: str | None, console: Console, signals: Signals) -> Iterator[World]:
    """Yield the world of torchrun; an error inside the block in one process ends all.

    Args:
        device: the option.
        console: silent in all processes but the first, or but the one that reports that another is gone.
        signals: they end the process at once while it waits for the others.
    """
    console.silent = os.environ["RANK"] != "0"
    done = threading.Event()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(), done), name="charlm-parent", daemon=True).start()
    with signals.ending_at_once():
        world = join(get_backend(device or "auto"))
    try:
        with world.telling():
            yield world
    except PeerError as error:
        if error.rank is None:
            console.silent = not world.is_spokesman()
        raise
    finally:
        done.set()
        leave()


def _watch(parent: int, done: threading.Event) -> None:
    """Send this process a SIGTERM when its parent torchrun is gone, which could not end it any more."""
    while not done.wait(_PERIOD):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            return
