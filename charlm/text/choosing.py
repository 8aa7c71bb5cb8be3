"""Turns banned and allowed characters into the ids that generation must not choose."""

from __future__ import annotations

from charlm.errors import InputError, shown
from charlm.text.tokenizer import ByteTokenizer, Tokenizer

__all__ = ["banned_ids"]


def banned_ids(tokenizer: Tokenizer, banned: str, allowed: str | None) -> list[int]:
    """Return the ids of the banned characters and of those that are not allowed.

    A character outside the vocabulary is ignored: it is never generated. With a `ByteTokenizer` only ASCII
    characters can be named, since the bytes of all others are shared by many characters.

    Args:
        tokenizer: the tokenizer of the model.
        banned: characters that must not be generated.
        allowed: the only characters that may be generated; None: all but the banned ones.

    Raises:
        InputError: an argument is no str, a character is not ASCII where it must be, or no id is left.

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
