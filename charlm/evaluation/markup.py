"""How results look in a notebook, which asks them for HTML; elsewhere they are the text that `repr` gives.

Everything that comes from a text or a model is escaped, and the style reaches no further than its own
elements. Tables follow the notebook's theme; colours mean the same in each, and so stand on white.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from charlm.terminal import escaped

__all__ = ["char_bits", "coloured_text", "figure", "table"]

_LEVELS = (0.5, 1, 2, 3, 4, 6, 8, 12)  # bits at which the next colour begins, as on the page
_COLOURS = ("fff3d6", "ffe2a6", "fdc974", "f9a65c", "ee8051", "d95b50", "b02f5b", "6b1b5c")
_DARK = 7  # from this level on, letters are white
_MOST_SHOWN = 5_000  # characters
_TABLE_STYLE = (
    ".charlm-table{border-collapse:collapse;margin:.3em 0;font-variant-numeric:tabular-nums}"
    ".charlm-table caption{text-align:left;font-weight:600;padding:.1em 0 .35em;color:inherit}"
    ".charlm-table td,.charlm-table th{text-align:right;padding:.15em .8em .15em 0;border:0;"
    "background:none;font-weight:400}"
    ".charlm-table td:last-child,.charlm-table thead th:last-child{text-align:left;opacity:.75}"
    ".charlm-table th:first-child{text-align:left}"
    ".charlm-table thead th{border-bottom:1px solid currentColor;opacity:.75}"
)


def table(
    rows: Sequence[Sequence[str]], *, title: str = "", head: Sequence[str] = (), folded: str = ""
) -> str:
    """Return a table as HTML.

    Args:
        rows: of cells, which are escaped here; the first of each is its name.
        title: what stands above it.
        head: names of the columns.
        folded: the table is opened by a click on these words; empty: it is open.
    """
    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    made = (
        f'<style>{_TABLE_STYLE}</style><table class="charlm-table">{caption}'
        f"{f'<thead><tr>{names}</tr></thead>' if names else ''}<tbody>{body}</tbody></table>"
    )
    return f"<details><summary>{html.escape(folded)}</summary>{made}</details>" if folded else made


def figure(value: float) -> str:
    """Return a number of a result as it is written for people."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "NaN"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def char_bits(text: str, bits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the bits of each character of a text, which has all those of its bytes if they are of these."""
    if len(bits) == len(text):
        return bits
    lengths = np.array([len(char.encode()) for char in text])
    found: NDArray[np.float64] = np.add.reduceat(bits, lengths.cumsum() - lengths)
    return found


def coloured_text(text: str, bits: NDArray[np.float64], ranks: NDArray[np.int64] | None = None) -> str:
    """Return a text as HTML, each character on the colour of its surprisal, up to a sensible length.

    Args:
        text: N characters.
        bits: (N,) of each; NaN where it was not predicted.
        ranks: (N,) the place of each among all; None: not known.
    """
    levels = "".join(
        f".charlm-text .l{level}{{background:#{colour};color:#{'fff' if level >= _DARK else '111'}}}"
        for level, colour in enumerate(_COLOURS, 1)
    )
    style = (
        ".charlm-text{font:14px/1.7 ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;"
        "white-space:pre-wrap;overflow-wrap:anywhere;max-height:32em;overflow-y:auto;margin:.3em 0;"
        "padding:.6em .8em;border-radius:4px;background:#fff;color:#111}"
        ".charlm-text div{min-height:1.7em;unicode-bidi:plaintext}"
        ".charlm-text .key{font-size:12px;opacity:.9;margin-bottom:.4em}"
        ".charlm-text .key i{padding:.1em .5em}"
        f".charlm-text i{{font-style:normal}}{levels}"
    )
    steps = "".join(f'<i class="l{level}">{least:g}</i>' for level, least in enumerate(_LEVELS, 1))
    rest = f"<div>… and {len(text) - _MOST_SHOWN:,} more characters</div>" if len(text) > _MOST_SHOWN else ""
    lines = "".join(f"<div>{line}</div>" for line in _lines(text[:_MOST_SHOWN], bits, ranks))
    return (
        f'<style>{style}</style><div class="charlm-text"><div class="key">bits of a character, from {steps}'
        f" on</div>{lines}{rest}</div>"
    )


def _lines(text: str, bits: NDArray[np.float64], ranks: NDArray[np.int64] | None) -> Iterator[str]:
    line: list[str] = []
    for begin, end in _signs(text):
        sign, value = text[begin:end], float(np.nansum(bits[begin:end]))
        if np.isnan(bits[begin:end]).all():
            title = "not predicted"
        else:
            place = f", rank {ranks[begin]:,}" if ranks is not None and ranks[begin] else ""
            title = f"{figure(value)} bits{place}"
        level = sum(value >= least for least in _LEVELS)
        shown = "↵" if sign == "\n" else html.escape(escaped(sign))
        line.append(f'<i class="l{level}" title="{title}">{shown}</i>')
        if sign == "\n":
            yield "".join(line)
            line = []
    if line:
        yield "".join(line)


def _signs(text: str) -> Iterator[tuple[int, int]]:
    """Yield where each sign of a text begins and ends: a character, and marks that are joined to it."""
    begin = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or not (text[begin] != "\n" and unicodedata.category(text[end])[0] == "M"):
            yield begin, end
            begin = end
