"""What of a text stands word for word in another one: of a generated text, what was learnt by heart."""

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
    """The passages of a text that stand in another one, too."""

    n_chars: int
    """Length of the text."""
    n_shared: int
    """How many of its characters lie in such a passage."""
    longest: str
    """The longest run of characters that both have; empty: none is long enough."""
    passages: Sequence[tuple[int, int]]
    """Where they begin and end in the text. One may be put together from several places of the other."""

    @property
    def share(self) -> float:
        """The shared part, from 0 to 1."""
        return self.n_shared / self.n_chars if self.n_chars else 0.0


def verbatim(text: str, source: str, *, least: int = 50) -> Verbatim:
    """Find what of a text stands verbatim in another, such as what a model wrote in what it was trained on.

    Args:
        text: which is looked through; the prompt is better left out.
        source: where its parts may come from.
        least: the shortest run that counts, in characters.

    Returns:
        Exact figures.

    Raises:
        InputError: `least` is no int of 1 or more, or a text is no str.

    Example:
        >>> found = verbatim("once in the end", "at the end of the day", least=5)
        >>> found.longest, found.n_shared, found.passages
        (' the end', 8, [(7, 15)])
    """
    check_text(text)
    check_text(source)
    found = find_overlap(_codes(text), _codes(source), int_from(1, least, "least"))
    return Verbatim(
        n_chars=len(text),
        n_shared=found.shared,
        longest=found.longest.astype("<u4").tobytes().decode("utf-32-le"),
        passages=list(zip(found.begins.tolist(), found.stops.tolist(), strict=True)),
    )


def _codes(text: str) -> NDArray[np.uint32]:
    """Return the code points of a text."""
    return np.frombuffer(encoded(text, "utf-32-le", text=text), "<u4")
