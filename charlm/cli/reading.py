"""How texts become ids and documents, with notes for the user and values for a run's record. No torch.

`charlm.cli.encoded` reads and encodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from charlm.cli.output import UsageError
from charlm.errors import quoted
from charlm.plain import share_of
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer, OnUnknown, Tokenizer

__all__ = [
    "VAL_FRACTION",
    "Reading",
    "begins_with",
    "joined_notes",
    "known_text",
    "named",
    "pieces_of",
    "unknown_notes",
    "wrong_val_fraction",
]

VAL_FRACTION = 0.1
"""Default share of the text for validation."""
_MOST_NAMED = 4  # characters in a note


def wrong_val_fraction(share: float) -> list[str]:
    """Return the problem with a value of --val-fraction, or an empty list."""
    return [] if 0 <= share < 1 else [f"--val-fraction must be at least 0 and below 1, got {share:g}"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How texts become ids. A run's record stores it, so that a resume reads the texts in the same way."""

    encoding: str = "utf-8"
    """Encoding of the files."""
    kind: str | None = None
    """Kind of the tokenizer, "char" or "byte"; None: that of `tokenizer`, else "char"."""
    tokenizer: CharTokenizer | ByteTokenizer | None = None
    """An existing tokenizer; None: it is made from the text."""
    extends: bool = False
    """Whether unknown characters are added to this tokenizer."""
    on_unknown: OnUnknown = "error"
    """How unknown characters are treated otherwise."""
    val_fraction: float = VAL_FRACTION
    """Share of the text, at its end, for validation."""
    by_file: bool = False
    """Whether each file is a document, whose end no block crosses."""
    separator: str | None = None
    """The string that ends a document in a file."""
    weights: Sequence[float] | None = None
    """How often each file is seen; None: all alike."""

    @property
    def apart(self) -> bool:
        """Whether there are documents."""
        return self.by_file or self.separator is not None or self.weights is not None

    def record(self) -> dict[str, object]:
        """Return the values for a run's record, without encoding, kind and share for validation."""
        values: dict[str, object] = {}
        if self.apart:
            values |= {"by_file": True, "separator": self.separator, "weights": self.weights}
        return values if self.on_unknown == "error" else {**values, "on_unknown": self.on_unknown}

    def made(self, text: str) -> CharTokenizer | ByteTokenizer:
        """Return the tokenizer of a text."""
        if isinstance(self.tokenizer, CharTokenizer) and self.extends:
            return self.tokenizer.extend(text)
        if self.tokenizer is not None:
            return self.tokenizer
        return ByteTokenizer() if self.kind == "byte" else CharTokenizer.from_text(text)


def pieces_of(
    sources: Sequence[str], texts: Sequence[str], reading: Reading
) -> tuple[list[str], list[float], list[str]]:
    """Return the documents of files with their weights, and a note of files that are there twice.

    The separator stays at the end of a document, so that a model can learn where one ends.
    """
    given = [1.0] * len(texts) if reading.weights is None else reading.weights
    if len(given) != len(texts):
        raise UsageError(f"the run has a weight for each of {len(given)} files; give these, got {len(texts)}")
    seen: dict[str, float] = {}
    for text, weight in zip(texts, given, strict=True):
        seen[text] = seen.get(text, 0.0) + weight
    pieces: list[str] = []
    weights: list[float] = []
    for text, weight in seen.items():
        parts = [text] if reading.separator is None else text.split(reading.separator)
        parts = [part + (reading.separator or "") for part in parts[:-1]] + parts[-1:]
        pieces += parts
        weights += [weight] * len(parts)
    return pieces, weights, [f"{note}: as one, seen so often" for note in _repeated(sources, texts)]


def joined_notes(sources: Sequence[str], texts: Sequence[str], val_fraction: float) -> list[str]:
    """Return notes for the user on several files that are joined to one text."""
    if len(texts) < 2:
        return []
    notes = [f"{note}, so validation may repeat the training text" for note in _repeated(sources, texts)]
    N = sum(map(len, texts))
    if 0 < N - share_of(N, 1 - val_fraction) <= len(texts[-1]):
        notes.append(f"validation is the end of {quoted(sources[-1])} alone")
    for (name, text), (after, _) in pairwise(zip(sources, texts, strict=True)):
        if text and not text.endswith(("\n", "\r")):
            notes.append(f"{quoted(name)} ends in a line that runs on into {quoted(after)}")
            break
    return [f"the files are joined; --by-file keeps them apart: {'; '.join(notes)}"] if notes else []


def _repeated(sources: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return the files whose content occurs more than once, with the number."""
    counts = Counter(texts)
    return [
        f"{quoted(sources[texts.index(text)])} is there {count} times"
        for text, count in counts.items()
        if count > 1
    ]


def known_text(text: str, tokenizer: Tokenizer, on_unknown: OnUnknown) -> tuple[str, list[str]]:
    """Return a text with unknown characters left out or replaced, and the notes on it.

    Raises:
        UsageError: the tokenizer has no character for unknown ones.
    """
    notes = unknown_notes(text, tokenizer, on_unknown)
    return tokenizer.decode(tokenizer.encode_array(text, on_unknown=on_unknown)) if notes else text, notes


def unknown_notes(text: str, tokenizer: Tokenizer, on_unknown: OnUnknown) -> list[str]:
    """Return a note on the characters of a text that are left out or replaced, or an empty list."""
    if on_unknown == "error":
        return []
    if on_unknown == "replace" and isinstance(tokenizer, CharTokenizer) and tokenizer.unknown is None:
        raise UsageError(
            "--on-unknown replace needs a model with a character that stands for unknown ones, "
            "CharTokenizer(vocab, unknown=...), and this one has none; skip leaves them out"
        )
    lacking = {c: n for c, n in Counter(text).items() if not tokenizer.encode(c, on_unknown="skip")}
    if not lacking:
        return []
    done = "left out" if on_unknown == "skip" else "replaced"
    return [f"not known to the model, and {done}: {named(sorted(lacking))}; {sum(lacking.values()):,} in all"]


def named(characters: Sequence[str]) -> str:
    """Return characters as text, the first ones with their code points."""
    named = ", ".join(f"{quoted(c)} U+{ord(c):04X}" for c in characters[:_MOST_NAMED])
    more = len(characters) - _MOST_NAMED
    return f"{named} and {more:,} more" if more > 0 else named


def begins_with(tokenizer: Tokenizer | None, other: Tokenizer | None) -> bool:
    """Return whether the ids of another tokenizer mean the same characters in this one."""
    if isinstance(tokenizer, CharTokenizer) and isinstance(other, CharTokenizer):
        return tokenizer.vocab[: other.vocab_size] == other.vocab
    return isinstance(tokenizer, ByteTokenizer) and isinstance(other, ByteTokenizer)
