"""`StopMatcher`: ends a text at a stop string, even if the string arrives in pieces.

It works on text alone. An end of the text that may be the beginning of a stop string is held back until the
next piece decides, so a stream never shows a part of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from charlm.errors import InputError, shown
from charlm.plain import as_bool, as_text

__all__ = ["StopMatcher"]


class StopMatcher:
    """Passes text through up to the first stop string.

    Args:
        stop: strings that end the text. The first complete one counts; of several that are complete with the
            same character, the longest. The text ends before it.
        keep: keep the stop string as the end of the text.

    Attributes:
        stopped: whether a stop string has been met.

    Raises:
        InputError: a stop string is empty or no string, or `stop` is a lone string.

    Example:
        >>> matcher = StopMatcher(["END"])
        >>> [matcher.feed(piece) for piece in ("one E", "NE", "ND!")]
        ['one ', 'EN', '']
        >>> matcher.stopped
        True
    """

    def __init__(self, stop: Sequence[str], *, keep: bool = False) -> None:
        several = isinstance(stop, Sequence) and not isinstance(stop, str)
        texts = [as_text(one) for one in stop] if several else [None]
        if not all(texts):
            raise InputError(f"stop must be a sequence of non-empty strings, got {shown(stop)}")
        keeps = as_bool(keep)
        if keeps is None:
            raise InputError(f"keep_stop must be True or False, got {shown(keep)}")
        self._stop = tuple(text for text in texts if text)
        self._keep = keeps
        self._held = ""
        self.stopped: bool = False

    def feed(self, piece: str) -> str:
        """Take the next piece, and return the characters that are now known to belong to the text."""
        if self.stopped:
            return ""
        if not self._stop:
            return piece
        text = self._held + piece
        first_new = len(self._held)
        for end in range(first_new + 1, len(text) + 1):
            met = [len(s) for s in self._stop if text.endswith(s, 0, end)]
            if met:
                self.stopped, self._held = True, ""
                return text[first_new:end] if self._keep else text[: end - max(met)]
        undecided = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - undecided :]  # with `keep` it is also returned at once
        return piece if self._keep else text[: len(text) - undecided]

    def finish(self) -> str:
        """Return the characters that were held back, at the end of the text."""
        held, self._held = self._held, ""
        return "" if self._keep else held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`, shorter than `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
