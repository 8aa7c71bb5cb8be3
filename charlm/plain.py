"""What counts as a number, a yes or no, or a text; and the plain Python value that is kept of it.

Callers bring numbers from numpy, from fractions, from an Enum. A number is what `numbers.Integral` or
`numbers.Real` says, a text is a `str` or of a subclass. What is kept is exactly a bool, int, float or str, so
that it can be written as JSON, hashed and shown like any other. 2.0 is no int, True is no number. This module
imports neither numpy nor torch.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from os import PathLike
from pathlib import Path

from charlm.errors import InputError, shown

__all__ = ["as_bool", "as_float", "as_int", "as_path", "as_text", "blocks_in_epoch", "int_from", "share_of"]

_ROUNDING = 2**-51  # what a float between 0 and 1, one minus it, and their product with a number may be off


def as_bool(value: object) -> bool | None:
    """Return a bool, or one of numpy's, as Python's; None for anything else.

    Example:
        >>> as_bool(True), as_bool(1)
        (True, None)
    """
    if isinstance(value, bool):
        return value
    kind = type(value)  # numpy's is no subclass of Python's, and is told by its name, without an import
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

    What is too large for a float is infinite.

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

    A subclass of str is taken as Python's own functions take it. The text that it holds is kept, and not the
    object, of which `str()` may give something else: of an Enum, its name.

    Example:
        >>> from enum import Enum
        >>> class Kind(str, Enum):
        ...     FAST = "fast"
        >>> as_text(Kind.FAST), as_text(b"fast")
        ('fast', None)
    """
    return str.__str__(value) if isinstance(value, str) else None


def as_path(value: str | PathLike[str]) -> Path:
    """Return a path; of a text of a subclass, that of the text, where `Path` takes an Enum's name."""
    return Path(value if isinstance(value, PathLike) else as_text(value) or value)


def int_from(least: int, value: object, name: str) -> int:
    """Return an integer that has a lower bound as Python's int.

    Args:
        least: the bound.
        value: what was given.
        name: what the argument is called.

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
    """Return how many of some things a share of them is, rounded down.

    A float is only near the decimal or the fraction that is meant. So a product that lies below a whole
    number by no more than that is this number.

    Args:
        count: how many there are.
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
    """Return how many blocks an epoch of a text has: less than one at each end is left out."""
    return max(1, n_ids // block_size - 1)
