"""Conversion of arguments to a plain bool, int, float, str or Path of Python.

Callers pass numbers of numpy, fractions, or members of an Enum. A value is a number if it is a
`numbers.Integral` or `numbers.Real`, and a text if it is a `str` or of a subclass. The plain value can be
written as JSON, hashed and shown like any other. 2.0 is no int, and True is no number. This module imports
neither numpy nor torch.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from os import PathLike
from pathlib import Path

from charlm.errors import InputError, shown

__all__ = ["as_bool", "as_float", "as_int", "as_path", "as_text", "blocks_in_epoch", "int_from", "share_of"]

_ROUNDING = 2**-51  # largest error of a float between 0 and 1, of one minus it, and of their products


def as_bool(value: object) -> bool | None:
    """Return a bool of Python or numpy as Python's bool; None for anything else.

    Example:
        >>> as_bool(True), as_bool(1)
        (True, None)
    """
    if isinstance(value, bool):
        return value
    kind = type(value)  # numpy's bool is no subclass of Python's; its name identifies it without an import
    return bool(value) if kind.__module__ == "numpy" and kind.__name__ in {"bool", "bool_"} else None


def as_int(value: object) -> int | None:
    """Return an integer of any type as Python's int; None for anything else, a bool included.

    Example:
        >>> as_int(5), as_int(5.0), as_int(True)
        (5, None, None)
    """
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def as_float(value: object) -> float | None:
    """Return a real number of any type as Python's float, or None for anything else.

    A number that is too large for a float becomes infinite.

    Example:
        >>> from fractions import Fraction
        >>> as_float(1), as_float(Fraction(1, 4)), as_float(10**400), as_float("1")
        (1.0, 0.25, inf, None)
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def as_text(value: object) -> str | None:
    """Return a text as Python's str; None for anything else.

    The text that an object of a subclass holds is returned. `str()` may return something else: for an Enum,
    the name of the member.

    Example:
        >>> from enum import Enum
        >>> class Kind(str, Enum):
        ...     FAST = "fast"
        >>> as_text(Kind.FAST), as_text(b"fast")
        ('fast', None)
    """
    return str.__str__(value) if isinstance(value, str) else None


def as_path(value: str | PathLike[str]) -> Path:
    """Return a path. A member of an Enum of texts stands for its text, where `Path` would take its name."""
    return Path(value if isinstance(value, PathLike) else as_text(value) or value)


def int_from(least: int, value: object, name: str) -> int:
    """Return an integer as Python's int, checked against a lower bound.

    Args:
        least: the bound.
        value: the argument.
        name: the argument's name, for the message.

    Raises:
        InputError: it is no integer, or below the bound.

    Example:
        >>> int_from(1, 0, "rows")
        Traceback (most recent call last):
            ...
        charlm.errors.InputError: rows must be an int, 1 or more, got 0
    """
    number = as_int(value)
    if number is None or number < least:
        raise InputError(f"{name} must be an int, {least} or more, got {shown(value)}")
    return number


def share_of(count: int, share: float) -> int:
    """Return a share of a count, rounded down.

    A float is only close to the decimal or fraction that is meant. A product that is below a whole number by
    no more than this error counts as that number.

    Args:
        count: the number of things.
        share: from 0 to 1.

    Example:
        >>> share_of(1000, 1 - 0.07), int((1 - 0.07) * 1000)
        (930, 929)
        >>> share_of(1000, 0.0699)
        69
    """
    product = share * count
    nearest = round(product)
    return nearest if abs(product - nearest) <= count * _ROUNDING else int(product)


def blocks_in_epoch(n_ids: int, block_size: int) -> int:
    """Return the number of blocks in an epoch of a text, without an incomplete one at each end."""
    return max(1, n_ids // block_size - 1)
