"""Ways to break charlm, from breaks.toml. `reliability/broken_versions.py` tries them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

__all__ = ["BREAKS", "Break"]


class Break(NamedTuple):
    """One way to break charlm: a piece of its source that stands there once, and what takes its place."""

    what: str
    """What is wrong with the broken version."""
    file: str
    old: str
    new: str
    test: str
    """What must fail, as pytest takes it."""


BREAKS = [
    Break(**fields)
    for fields in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["break"]
]
