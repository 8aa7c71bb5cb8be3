"""Where a progress bar can move, what draws it (tqdm, if installed), and text that cannot move a cursor."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

__all__ = ["bar_class", "escaped", "in_notebook", "wants_bar"]


def wants_bar(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether standard error is a terminal on which a bar can move."""
    ci = environment.get("CI", "").lower() not in {"", "0", "false"}
    return sys.stderr.isatty() and not ci and environment.get("TERM") != "dumb"


def in_notebook() -> bool:
    """Return whether what is written to standard output stands below a notebook's cell."""
    return type(sys.stdout).__module__.partition(".")[0] == "ipykernel"


def bar_class() -> Any:
    """Return tqdm's bar, a notebook's own where ipywidgets are there; None where tqdm is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets it is the bar made of text, and that will do
            return importlib.import_module("tqdm.auto").tqdm
    except ImportError:
        return None


def escaped(text: str) -> str:
    r"""Return a text that a model wrote without what nobody sees, and what could move a terminal's cursor.

    Example:
        >>> escaped("one\n\x1b[2Jtwo")
        'one\n\\x1b[2Jtwo'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
