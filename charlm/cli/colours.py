"""A text on a terminal, each character with the colour of its surprisal, or with its bits below it.

The colours are the 256 of most terminals. `NO_COLOR` (no-color.org) switches them off and `FORCE_COLOR` on.
Without either, a terminal has them unless it is dumb.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

from charlm.terminal import escaped

__all__ = ["annotated", "coloured", "wants_colour"]

_LEVELS = (0.5, 1, 2, 3, 4, 6, 8, 12)  # least bits of each colour, as on the page
_ON_LIGHT, _ON_DARK = "30;48;5;{}".format, "97;48;5;{}".format
_COLOURS = ("", *map(_ON_LIGHT, (230, 223, 221, 215, 209, 167)), *map(_ON_DARK, (125, 53)))
_RESET = "\x1b[0m"


def wants_colour(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether text for a stream may be coloured."""
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR", "0") not in {"", "0"}:
        return True
    return stream.isatty() and environment.get("TERM", "dumb") != "dumb"


def coloured(cells: Sequence[tuple[str, float]], newline: str) -> Iterator[str]:
    """Yield a legend, and then the lines of a text in colours.

    Args:
        cells: characters with their bits; NaN for one that was not predicted.
        newline: a sign for the end of a line, which has a surprisal, too.
    """
    steps = ["0", *(f"{least:g}" for least in _LEVELS)]
    scale = "".join(_painted(f" {step} ", level) for level, step in enumerate(steps))
    yield f"bits {scale}\n\n"
    line, level = [], -1
    for char, bits in cells:
        now = _level(bits)
        if now != level:
            line.append(_RESET * (level > 0) + (f"\x1b[{_COLOURS[now]}m" if now else ""))
            level = now
        if char == "\n":
            yield "".join(line) + newline + _RESET * (level > 0) + "\n"
            line, level = [], -1
        else:
            line.append(escaped(char))
    if line:
        yield "".join(line) + _RESET * (level > 0) + "\n"


def annotated(cells: Sequence[tuple[str, float]], newline: str, width: int) -> Iterator[str]:
    """Yield a legend, and then the lines of a text, each with the bits of its characters below it.

    Args:
        cells: as in `coloured`.
        newline: as in `coloured`.
        width: the most columns of a line; longer lines are broken.
    """
    yield "below each character its bits, rounded; + from 9.5 on, - where it was not predicted\n\n"
    text: list[str] = []
    digits: list[str] = []
    used = 0
    for char, bits in cells:
        shown = newline if char == "\n" else escaped(char).replace("\t", " ")
        columns = sum(map(_columns, shown))
        if used + columns > width:
            yield "".join(text) + "\n" + "".join(digits) + "\n"
            text, digits, used = [], [], 0
        text.append(shown)
        digits.append(_digit(bits).ljust(columns) if columns else "")
        used += columns
        if char == "\n":
            yield "".join(text) + "\n" + "".join(digits) + "\n"
            text, digits, used = [], [], 0
    if text:
        yield "".join(text) + "\n" + "".join(digits) + "\n"


def _level(bits: float) -> int:
    return sum(bits >= least for least in _LEVELS)


def _painted(text: str, level: int) -> str:
    return f"\x1b[{_COLOURS[level]}m{text}{_RESET}" if level else text


def _digit(bits: float) -> str:
    if math.isnan(bits):
        return "-"
    return "+" if bits >= 9.5 else str(round(bits))


def _columns(char: str) -> int:
    """Return the number of columns of a character on a terminal; combining characters take none."""
    if unicodedata.combining(char) or unicodedata.category(char) in {"Cf", "Me", "Mn"}:
        return 0
    if "\u1160" <= char <= "\u11ff" or "\ud7b0" <= char <= "\ud7ff":  # vowels and finals of Hangul in NFD
        return 0
    return 2 if unicodedata.east_asian_width(char) in {"F", "W"} else 1
