"""Whether standard error is a terminal on which a bar can move, and what draws it: tqdm, if installed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["bar_class", "wants_bar"]


def wants_bar(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether standard error is a terminal on which a bar can move."""
    ci = environment.get("CI", "").lower() not in {"", "0", "false"}
    return sys.stderr.isatty() and not ci and environment.get("TERM") != "dumb"


def bar_class() -> Any:
    """Return tqdm's bar, or None where tqdm is not installed."""
    try:
        return importlib.import_module("tqdm").tqdm
    except ImportError:
        return None
