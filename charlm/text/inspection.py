"""Figures of a text that a person should know before training on it. No model, no torch, no random numbers.

They are: the characters and their counts, line ends, invisible characters, how well the one or two characters
before predict the next one, and how much of the validation text the training text contains. `charlm inspect`
shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charlm.errors import InputError, shown
from charlm.plain import as_float, share_of
from charlm.text.checks import check_text
from charlm.text.overlap import find_overlap
from charlm.text.tokenizer import CharTokenizer

__all__ = ["RARE_BELOW", "SHARED_WIDTH", "TextReport", "inspect_text", "remarks"]

RARE_BELOW = 10
"""A character that occurs fewer times than this is rare."""
SHARED_WIDTH = 50
"""Length of the shortest run that counts as shared, in characters."""

_MOST_IN_ENTROPY = 10_000_000  # characters: 1 s
_MOST_COMPARED = 5_000_000  # characters of validation
_STRETCH = 2**22  # characters counted at once

_PIECES = 100  # of the validation text, looked for in the training text
_FEW_EACH = 100  # occurrences per character: with fewer on average, a large vocabulary is remarked on

_SPACES = frozenset("\t\n\r ")  # invisible, too, but expected in a text


@dataclass(frozen=True, kw_only=True)
class TextReport:
    """The figures of `inspect_text`. Lengths are in characters (code points) unless another unit is named."""

    n_chars: int
    """Length of the text."""
    n_bytes: int
    """Length of its UTF-8, in bytes."""
    n_lines: int
    """Number of lines, with any line end; the last one needs none."""
    counts: Mapping[str, int]
    """The vocabulary: each character with its number of occurrences, in the order of code points."""
    lf: int
    r"""Line ends that are "\n", as on Linux and macOS."""
    crlf: int
    r"""Line ends that are "\r\n", as on Windows."""
    cr: int
    r"""Line ends that are "\r" alone."""
    has_bom: bool
    """Whether the first character is U+FEFF, a byte order mark."""
    entropy_bits: tuple[float | None, float | None, float | None]
    """Average bits per character when the 0, 1 and 2 characters before it are known: the conditional
    entropies of the text's own counts. They get more optimistic with each known character: after a pair that
    occurs once, the next character counts as certain. None if the text is too short."""
    entropy_chars: int
    """The entropies are those of so many characters at the beginning of the text."""
    train_chars: int
    """Length of the training part, which comes first."""
    val_chars: int
    """Length of the validation part, which follows."""
    only_in_val: str
    """Characters that occur in the validation part alone, in the order of code points."""
    compared_chars: int
    """So many characters at the beginning of the validation part were looked for in the training part."""
    shared_chars: int
    """So many of these lie in a run of at least `SHARED_WIDTH` that the training part contains, too."""
    longest_shared: str
    """The longest such run, the first if there are several; empty if there is none."""
    longest_shared_lines: tuple[int, int] | None
    r"""The line where this run begins in the validation part, and the line of its first occurrence in the
    training part; only "\n" ends a line here, as in error messages. None if there is no run."""

    @property
    def vocab_size(self) -> int:
        """The number of different characters."""
        return len(self.counts)

    @property
    def rare(self) -> dict[str, int]:
        """The characters that occur fewer than `RARE_BELOW` times, with their counts, rarest first."""
        return {c: n for c, n in sorted(self.counts.items(), key=lambda item: item[1]) if n < RARE_BELOW}

    @property
    def invisible(self) -> dict[str, int]:
        r"""The invisible characters with their counts, without space, "\t", "\n" and "\r".

        These are control characters, no-break and zero-width spaces, direction marks and unassigned code
        points. U+FFFD counts, too: it replaces bytes that were decoded wrongly.
        """
        return {
            c: n for c, n in self.counts.items() if c == "\ufffd" or not (c.isprintable() or c in _SPACES)
        }

    @property
    def shared(self) -> float:
        """`shared_chars` as a share of `compared_chars`, from 0 to 1; 0 if nothing was compared."""
        return self.shared_chars / max(self.compared_chars, 1)


def inspect_text(text: str, *, val_fraction: float = 0.1) -> TextReport:
    r"""Count the figures of a text that are worth knowing before training.

    Memory grows with the text, by a few bytes per character. The slow figures are those of the beginning of a
    long text, and the report says of how much of it.

    Args:
        text: any text; it may be empty.
        val_fraction: share of the text, at its end, for validation, as in `charlm train`; 0: none.

    Raises:
        InvalidTextError: the text holds a lone surrogate.
        InputError: `text` is no string, or `val_fraction` is not in [0, 1).

    Example:
        >>> report = inspect_text("one\r\ntwo\nthree")
        >>> report.n_lines, report.crlf, report.lf, report.vocab_size
        (3, 1, 1, 9)
    """
    check_text(text)
    share = as_float(val_fraction)
    if share is None or not 0 <= share < 1:
        raise InputError(f"val_fraction must be at least 0 and below 1, got {shown(val_fraction)}")
    cut = share_of(len(text), 1 - share)
    vocab: str = ""
    ids: NDArray[np.unsignedinteger[Any]] = np.zeros(0, dtype=np.uint8)
    if text:
        tokenizer = CharTokenizer.from_text(text)
        vocab, ids = "".join(tokenizer.vocab), tokenizer.encode_array(text)
    in_train = _counted(ids[:cut], len(vocab))
    counts = in_train + _counted(ids[cut:], len(vocab))
    crlf = text.count("\r\n")
    lf, cr = text.count("\n") - crlf, text.count("\r") - crlf
    compared = ids[cut:][:_MOST_COMPARED]
    overlap = find_overlap(compared, ids[:cut], SHARED_WIDTH)
    longest = "".join(vocab[i] for i in overlap.longest.tolist())
    lines = None
    if longest:
        lines = _line(text, text.index(longest, cut)), _line(text, text.index(longest))
    for_entropy = ids[:_MOST_IN_ENTROPY]
    return TextReport(
        n_chars=len(text),
        n_bytes=sum(n * len(c.encode()) for c, n in zip(vocab, counts.tolist(), strict=True)),
        n_lines=crlf + lf + cr + (text[-1:] not in ("", "\n", "\r")),
        counts=MappingProxyType(dict(zip(vocab, counts.tolist(), strict=True))),
        lf=lf,
        crlf=crlf,
        cr=cr,
        has_bom=text.startswith("\ufeff"),
        entropy_bits=(
            _entropy_bits(for_entropy, len(vocab), 0),
            _entropy_bits(for_entropy, len(vocab), 1),
            _entropy_bits(for_entropy, len(vocab), 2),
        ),
        entropy_chars=len(for_entropy),
        train_chars=cut,
        val_chars=len(text) - cut,
        only_in_val="".join(c for c, n in zip(vocab, in_train.tolist(), strict=True) if n == 0),
        compared_chars=len(compared),
        shared_chars=overlap.shared,
        longest_shared=longest,
        longest_shared_lines=lines,
    )


def remarks(text: str, vocab_size: int, *, val_fraction: float) -> list[str]:
    r"""Return one sentence for each thing that a person should mend in a text, or know, before training.

    This is quick for a long text, too: only a hundred pieces of the validation text are looked for in the
    training text. `inspect_text` gives the exact share.

    Args:
        text: the text.
        vocab_size: the number of different characters; 256 with a `ByteTokenizer`.
        val_fraction: share of the text, at its end, for validation.

    Example:
        >>> remarks("one\r\ntwo\n", 8, val_fraction=0.0)
        ['its line ends are of several kinds, all of which are learnt: make them one kind']
    """
    sentences = []
    if text.startswith("\ufeff"):
        sentences.append(
            "it begins with a byte order mark, which is learnt like any other character: take it out"
        )
    crlf = text.count("\r\n")
    if sum(count > 0 for count in (crlf, text.count("\n") - crlf, text.count("\r") - crlf)) > 1:
        sentences.append("its line ends are of several kinds, all of which are learnt: make them one kind")
    if vocab_size > 256 and len(text) < _FEW_EACH * vocab_size:
        sentences.append(
            f"it has {vocab_size:,} different characters, each {len(text) // vocab_size} times on average, "
            "which is little to learn from: bytes (--tokenizer byte) are 256 at most"
        )
    cut = int((1 - val_fraction) * len(text))
    places = range(cut, len(text) - SHARED_WIDTH + 1, SHARED_WIDTH)
    places = places[:: max(1, len(places) // _PIECES)]
    shared = sum(text.find(text[place : place + SHARED_WIDTH], 0, cut) >= 0 for place in places)
    if 10 * shared > len(places):
        sentences.append(
            "much of its end, which is kept for validation, stands in the training text, too: a loss on it "
            "says little of new text"
        )
    return sentences


def _counted(ids: NDArray[Any], V: int) -> NDArray[np.int64]:
    """Return the number of occurrences of each id, (V,)."""
    counts = np.zeros(V, dtype=np.int64)
    for start in range(0, len(ids), _STRETCH):  # bincount takes eight bytes per id
        counts += np.bincount(ids[start : start + _STRETCH], minlength=V)
    return counts


def _entropy_bits(ids: NDArray[Any], V: int, order: int) -> float | None:
    """Return H(next id | the `order` ids before it) of the counts of a text, in bits."""
    N = len(ids) - order
    if N < 1:
        return None
    codes = np.zeros(N, dtype=np.int64)  # one number for each run of order + 1 ids: V**3 is below 2**63
    for i in range(order + 1):
        codes *= V
        codes += ids[i : i + N]
    grams, counts = np.unique(codes, return_counts=True)
    contexts = np.flatnonzero(np.diff(grams // V, prepend=-1))
    totals = np.add.reduceat(counts, contexts)
    # A gram that occurs c times has probability c / t after its context, which occurs t times. So it
    # contributes c (log t - log c).
    bits = float((totals * np.log2(totals)).sum() - (counts * np.log2(counts)).sum()) / N
    return max(bits, 0.0)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
