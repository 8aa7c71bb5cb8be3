"""Which ids a text may be written with, by characters that are banned or allowed."""

from __future__ import annotations

from charlm.errors import InputError, shown
from charlm.text.tokenizer import ByteTokenizer, Tokenizer

__all__ = ["banned_ids"]


def banned_ids(tokenizer: Tokenizer, banned: str, allowed: str | None) -> list[int]:
    """Return the ids that stand for banned characters, or for none of the allowed ones.

    A character that the tokenizer lacks is never written anyway. A byte of another character than ASCII may
    be part of many, so with a `ByteTokenizer` only those of ASCII can be named.

    Args:
        tokenizer: the model's.
        banned: characters that are not to be written.
        allowed: the only ones that are; None: all others.

    Raises:
        InputError: an argument is no str, names a character that it cannot, or nothing is left to be written.

    Example:
        >>> from charlm.text.tokenizer import CharTokenizer
        >>> banned_ids(CharTokenizer("abcd"), "b", "abc")
        [1, 3]
    """
    for name, value in (("banned", banned), ("allowed", allowed)):
        if not isinstance(value, str) and not (value is None and name == "allowed"):
            raise InputError(f"{name} must be a str of characters, got {shown(value)}")
        if isinstance(tokenizer, ByteTokenizer) and value and not value.isascii():
            raise InputError(f"{name} must be of ASCII characters for a model of bytes, got {shown(value)}")
    by_id = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    ids = [i for i, c in enumerate(by_id) if c in banned or (allowed is not None and c not in allowed)]
    if len(ids) == len(by_id):
        raise InputError("at least one character of the vocabulary must be left to be written, got none")
    return ids
