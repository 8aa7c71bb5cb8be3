"""Terminals and notebooks: whether a progress bar can be shown, tqdm's class for it, and escaped text."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

__all__ = ["bar_class", "escaped", "in_notebook", "wants_bar"]


def wants_bar(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether standard error is a terminal that can show a progress bar."""
    ci = environment.get("CI", "").lower() not in {"", "0", "false"}
    return sys.stderr.isatty() and not ci and environment.get("TERM") != "dumb"


def in_notebook() -> bool:
    """Return whether standard output goes below a notebook's cell."""
    return type(sys.stdout).__module__.partition(".")[0] == "ipykernel"


def bar_class() -> Any:
    """Return tqdm's class (a widget in a notebook with ipywidgets), or None if tqdm is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets, tqdm warns and draws with text
            return importlib.import_module("tqdm.auto").tqdm
    except ImportError:
        return None


def escaped(text: str) -> str:
    r"""Return a generated text with escapes for invisible characters and those that could move a cursor.

    Example:
        >>> escaped("one\n\x1b[2Jtwo")
        'one\n\\x1b[2Jtwo'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
