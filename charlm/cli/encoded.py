"""A text as the ids that are trained on, read and encoded in one go, so that the text need not stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charlm.text.corpus import load_corpus
from charlm.text.inspection import remarks
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

__all__ = ["Encoded", "encode_corpus"]


@dataclass(frozen=True)
class Encoded:
    """The ids of a text, and what they were made with."""

    encoding: str
    """Of the files."""
    kind: str
    """Of the tokenizer: "char" or "byte"."""
    tokenizer: Tokenizer
    ids: NDArray[np.unsignedinteger[Any]]
    """(N,) in the smallest type that holds them."""
    n_chars: int
    """Length of the text."""
    remarks: Sequence[str]
    """What a person should know of the text."""


def encode_corpus(sources: Sequence[str], encoding: str, kind: str, val_fraction: float) -> Encoded:
    """Read texts, make the tokenizer, and encode them.

    Args:
        sources: as `load_corpus` takes them.
        encoding: of the files among them.
        kind: of the tokenizer: "char" or "byte".
        val_fraction: share of the text, at its end, that is kept for validation.

    Raises:
        CharLMError: what `load_corpus` and the tokenizer raise.
    """
    text = load_corpus(sources, encoding=encoding)
    tokenizer: Tokenizer = ByteTokenizer() if kind == "byte" else CharTokenizer.from_text(text)
    notes = remarks(text, tokenizer.vocab_size, val_fraction=val_fraction)
    return Encoded(encoding, kind, tokenizer, tokenizer.encode_array(text), len(text), notes)
