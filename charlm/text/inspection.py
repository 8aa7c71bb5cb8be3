"""What a person should know of a text before training on it, counted: no model, no torch, no random numbers.

Characters and how rare they are, line ends, what cannot be seen, how well a character can be guessed from the
one or two before it, and whether the text for validation is new to a model that has seen the rest.
`charlm inspect` shows it.
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
"""A character is rare that occurs fewer times than this."""
SHARED_WIDTH = 50
"""Characters in the shortest run that counts as shared."""

_MOST_IN_ENTROPY = 10_000_000  # characters: 1 s
_MOST_COMPARED = 5_000_000  # characters of validation
_STRETCH = 2**22  # characters counted at once

_PIECES = 100  # of the validation text, looked for in the training text
_FEW_EACH = 100  # occurrences of a character, on average, in a text that has many

_WITHOUT_PICTURE = frozenset("\t\n\r ")  # cannot be seen either, and belong into a text


@dataclass(frozen=True, kw_only=True)
class TextReport:
    """What `inspect_text` counted. Lengths are in characters (code points) unless said otherwise."""

    n_chars: int
    """Length of the text."""
    n_bytes: int
    """Length of its UTF-8, in bytes."""
    n_lines: int
    """Lines, whatever they end with; the last one needs no end."""
    counts: Mapping[str, int]
    """How often each character occurs, in the order of code points: the vocabulary."""
    lf: int
    r"""Line ends that are "\n", as on Linux and macOS."""
    crlf: int
    r"""Line ends that are "\r\n", as on Windows."""
    cr: int
    r"""Line ends that are "\r" alone."""
    has_bom: bool
    """Whether the first character is U+FEFF, a byte order mark."""
    entropy_bits: tuple[float | None, float | None, float | None]
    """Bits a character has on average when the 0, 1 and 2 characters before it are known: conditional
    entropies of this text's own counts, and so the more optimistic, the more are known: what follows a pair
    that occurs once counts as certain. None where the text is too short."""
    entropy_chars: int
    """How many characters, from the first on, the entropies are of."""
    train_chars: int
    """Length of the first part, which is trained on."""
    val_chars: int
    """Length of the rest, which is kept for validation."""
    only_in_val: str
    """Characters that occur in the validation part alone, in the order of code points."""
    compared_chars: int
    """How many characters of the validation part, from its first on, were looked for in the training part."""
    shared_chars: int
    """How many of these lie in a run of at least `SHARED_WIDTH` that occurs in the training part, too."""
    longest_shared: str
    """The longest such run, the first if there are several; empty if there is none."""
    longest_shared_lines: tuple[int, int] | None
    r"""The lines where it begins, first in the validation part and in the training part; only "\n" ends a
    line here, as in error messages. None if there is none."""

    @property
    def vocab_size(self) -> int:
        """The number of different characters."""
        return len(self.counts)

    @property
    def rare(self) -> dict[str, int]:
        """The characters that occur fewer than `RARE_BELOW` times, with their counts, the rarest first."""
        return {c: n for c, n in sorted(self.counts.items(), key=lambda item: item[1]) if n < RARE_BELOW}

    @property
    def invisible(self) -> dict[str, int]:
        r"""The characters that cannot be seen, with their counts, but for space, "\t", "\n" and "\r".

        Control characters, spaces that do not break or have no width, marks of direction, code points that
        Unicode has given to nothing; and U+FFFD, which stands where a text was decoded wrongly.
        """
        return {
            c: n
            for c, n in self.counts.items()
            if c == "\ufffd" or not (c.isprintable() or c in _WITHOUT_PICTURE)
        }

    @property
    def shared(self) -> float:
        """`shared_chars` as a share of `compared_chars`, from 0 to 1; 0 if nothing was compared."""
        return self.shared_chars / max(self.compared_chars, 1)


def inspect_text(text: str, *, val_fraction: float = 0.1) -> TextReport:
    r"""Count what there is to know of a text before training.

    Time and memory grow with the text: a few bytes for each character beside it. What would take longer looks
    at the beginning only, and the report says at how much of it.

    Args:
        text: any text, also the empty one.
        val_fraction: the share of the end that is kept for validation, as in `charlm train`; 0: none.

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
    r"""Return what a person should change in a text, or know of it, before training: a sentence for each.

    Takes a moment even for a long text. Of the validation text only a hundred pieces are looked for in the
    training text; `inspect_text` says exactly how much of it is there.

    Args:
        text: the text.
        vocab_size: how many different characters it has; 256 with a `ByteTokenizer`, never too many.
        val_fraction: the share of the end that is kept for validation.

    Example:
        >>> remarks("one\r\ntwo\n", 8, val_fraction=0.0)
        ['its line ends are of several kinds, all of which are learnt: make them one kind']
    """
    found = []
    if text.startswith("\ufeff"):
        found.append(
            "it begins with a byte order mark, which is learnt like any other character: take it out"
        )
    crlf = text.count("\r\n")
    if sum(count > 0 for count in (crlf, text.count("\n") - crlf, text.count("\r") - crlf)) > 1:
        found.append("its line ends are of several kinds, all of which are learnt: make them one kind")
    if vocab_size > 256 and len(text) < _FEW_EACH * vocab_size:
        found.append(
            f"it has {vocab_size:,} different characters, each {len(text) // vocab_size} times on average, "
            "which is little to learn from: bytes (--tokenizer byte) are 256 at most"
        )
    cut = int((1 - val_fraction) * len(text))
    places = range(cut, len(text) - SHARED_WIDTH + 1, SHARED_WIDTH)
    places = places[:: max(1, len(places) // _PIECES)]
    shared = sum(text.find(text[place : place + SHARED_WIDTH], 0, cut) >= 0 for place in places)
    if 10 * shared > len(places):
        found.append(
            "much of its end, which is kept for validation, stands in the training text, too: a loss on it "
            "says little of new text"
        )
    return found


def _counted(ids: NDArray[Any], V: int) -> NDArray[np.int64]:
    """Return how often each id occurs, (V,)."""
    counts = np.zeros(V, dtype=np.int64)
    for start in range(0, len(ids), _STRETCH):  # numpy's count makes eight bytes of each id
        counts += np.bincount(ids[start : start + _STRETCH], minlength=V)
    return counts


def _entropy_bits(ids: NDArray[Any], V: int, order: int) -> float | None:
    """Return H(next id | the `order` ids before it) of the pairs that occur, each weighing the same."""
    N = len(ids) - order
    if N < 1:
        return None
    codes = np.zeros(N, dtype=np.int64)  # of the order + 1 ids from each place on: V**3 is below 2**63
    for i in range(order + 1):
        codes *= V
        codes += ids[i : i + N]
    grams, counts = np.unique(codes, return_counts=True)
    contexts = np.flatnonzero(np.diff(grams // V, prepend=-1))
    totals = np.add.reduceat(counts, contexts)
    # A gram of count c has probability c / t behind its context of count t: its share is c (log t - log c).
    bits = float((totals * np.log2(totals)).sum() - (counts * np.log2(counts)).sum()) / N
    return max(bits, 0.0)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
