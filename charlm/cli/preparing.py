"""The progress of a preparation, an evaluation or a compression: a bar on a terminal, else lines."""

from __future__ import annotations

import sys
import time
from typing import Any, Literal, Self

from charlm.cli.output import Console
from charlm.terminal import bar_class, wants_bar

__all__ = ["Bar"]

_SECONDS = 10.0  # between two lines
_LABELS = {
    "reading": "read",
    "writing": "write",
    "scoring": "score",
    "compressing": "compress",
    "decompressing": "decompress",
}
_What = Literal["reading", "writing", "scoring", "compressing", "decompressing"]


class Bar:
    """Shows the progress on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._what = ""
        self._told_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def tell(self, what: _What, done: int, total: int) -> None:
        """Show the amount done of a pass."""
        if what != self._what:
            self._close()
            self._what = what
            if wants_bar() and not self._console.quiet:
                self._console.bar = _new_bar(_LABELS[what], total)
        bar: Any = self._console.bar
        if bar is not None:
            bar.update(done - bar.n)
        elif time.monotonic() - self._told_at >= _SECONDS:
            self._told_at = time.monotonic()
            digits = 0 if what in {"reading", "writing"} else 2  # these are quicker
            self._console.say(
                f"{_LABELS[what]:<7} {done / 1e6:,.{digits}f} of {total / 1e6:,.{digits}f} million"
            )

    def _close(self) -> None:
        bar, self._console.bar = self._console.bar, None
        if bar is not None:
            bar.close()


def _new_bar(label: str, total: int) -> Any:
    tqdm = bar_class()
    if tqdm is None:
        return None
    return tqdm(
        desc=label,
        total=total,
        unit_scale=True,
        ascii=True,
        dynamic_ncols=True,
        leave=False,
        file=sys.stderr,
        bar_format="{desc} {n_fmt}/{total_fmt} {elapsed}<{remaining} |{bar}|",
    )
