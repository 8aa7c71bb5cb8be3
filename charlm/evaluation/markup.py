"""HTML of results for a notebook; elsewhere `repr` shows them.

Everything from a text or a model is escaped, and the style affects its own elements only. Tables follow the
notebook's theme; coloured texts have a white background, so that colours always mean the same.
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

_LEVELS = (0.5, 1, 2, 3, 4, 6, 8, 12)  # least bits of each colour, as on the page
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
        rows: of cells, which are escaped here; the first cell is the name of the row.
        title: the title above the table.
        head: names of the columns.
        folded: a click on these words opens the table; empty: it is open.
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
    """Return a number of a result for people to read."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "NaN"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def char_bits(text: str, bits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the bits of each character of a text; bits of bytes are summed over each character."""
    if len(bits) == len(text):
        return bits
    lengths = np.array([len(char.encode()) for char in text])
    sums: NDArray[np.float64] = np.add.reduceat(bits, lengths.cumsum() - lengths)
    return sums


def coloured_text(text: str, bits: NDArray[np.float64], ranks: NDArray[np.int64] | None = None) -> str:
    """Return the beginning of a text as HTML, each character with the colour of its surprisal.

    Args:
        text: N characters.
        bits: (N,) surprisal of each; NaN if it was not predicted.
        ranks: (N,) rank of each among all; None: unknown.
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
    """Yield begin and end of each sign of a text: a character with the combining marks that follow it."""
    begin = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or not (text[begin] != "\n" and unicodedata.category(text[end])[0] == "M"):
            yield begin, end
            begin = end
