"""From a regular expression or choices in characters to an automaton over the ids of a tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from charlm.errors import InputError, shown
from charlm.patterns.automaton import Automaton
from charlm.text.tokenizer import ByteTokenizer, Tokenizer

__all__ = ["automaton_of"]


def automaton_of(
    tokenizer: Tokenizer, regex: str | None, choices: Sequence[str] | None, banned: Collection[int] = ()
) -> Automaton:
    """Return the automaton of a regular expression or of some choices.

    With a `ByteTokenizer`, only texts of ASCII match a regular expression, since a byte of another character
    may be part of many.

    Args:
        tokenizer: the model's.
        regex: a regular expression, or None if choices are given.
        choices: one text or more, or None if a regular expression is given.
        banned: ids that must not be generated.

    Raises:
        InputError: both are given, or neither; one is wrong or too large, or cannot be generated.
        UnknownCharacterError: a choice has a character that the tokenizer lacks.

    Example:
        >>> from charlm.text.tokenizer import CharTokenizer
        >>> automaton_of(CharTokenizer("abc"), "a|cab?", None).distance.tolist()
        [1, 1, 0, 0]
    """
    if (regex is None) == (choices is None):
        raise InputError("exactly one of regex and choices must be given")
    if choices is None:
        n = 128 if isinstance(tokenizer, ByteTokenizer) else tokenizer.vocab_size
        by_id = [
            tokenizer.decode([i]) if i < n and i not in banned else "" for i in range(tokenizer.vocab_size)
        ]
        return Automaton.from_regex(regex or "", by_id)
    several = isinstance(choices, Sequence) and not isinstance(choices, str)
    if not several or not choices or not all(isinstance(one, str) for one in choices):
        raise InputError(f"choices must be one or more strings, got {shown(choices)}")
    ids = [tokenizer.encode(one) for one in choices]
    free = [one for one in ids if not set(banned) & {*one}]
    if not free:
        raise InputError(
            f"one of the choices must be of characters that are not banned, got {shown(choices)}"
        )
    return Automaton.from_choices(free, tokenizer.vocab_size)
