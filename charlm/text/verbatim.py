"""Finds the passages of a text that another text contains word for word.

In a generated text these are the passages that a model may have memorised from its training text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from charlm.plain import int_from
from charlm.text.checks import check_text, encoded
from charlm.text.overlap import find_overlap

__all__ = ["Verbatim", "verbatim"]


@dataclass(frozen=True, kw_only=True)
class Verbatim:
    """The passages of a text that another text contains, too."""

    n_chars: int
    """Length of the text."""
    n_shared: int
    """The number of its characters that lie in such a passage."""
    longest: str
    """The longest passage; empty if there is none."""
    passages: Sequence[tuple[int, int]]
    """Begin and end of each passage in the text. Passages that touch or overlap are merged into one."""

    @property
    def share(self) -> float:
        """The shared part, from 0 to 1."""
        return self.n_shared / self.n_chars if self.n_chars else 0.0


def verbatim(text: str, source: str, *, least: int = 50) -> Verbatim:
    """Find the passages of a text that a source contains, for example of a generated text in a training text.

    Args:
        text: the text to search through; leave the prompt out.
        source: the text that may contain its passages.
        least: length of the shortest passage that counts, in characters.

    Returns:
        Exact figures; nothing is estimated.

    Raises:
        InputError: `least` is no int of 1 or more, or a text is no str.

    Example:
        >>> found = verbatim("once in the end", "at the end of the day", least=5)
        >>> found.longest, found.n_shared, found.passages
        (' the end', 8, [(7, 15)])
    """
    check_text(text)
    check_text(source)
    overlap = find_overlap(_codes(text), _codes(source), int_from(1, least, "least"))
    return Verbatim(
        n_chars=len(text),
        n_shared=overlap.shared,
        longest=overlap.longest.astype("<u4").tobytes().decode("utf-32-le"),
        passages=list(zip(overlap.begins.tolist(), overlap.stops.tolist(), strict=True)),
    )


def _codes(text: str) -> NDArray[np.uint32]:
    """Return the code points of a text."""
    return np.frombuffer(encoded(text, "utf-32-le", text=text), "<u4")
