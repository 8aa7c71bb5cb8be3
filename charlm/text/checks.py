"""Checks of texts, vocabularies and ids before a tokenizer works on them.

Each error names the value, its place and the remedy. No function knows a particular tokenizer. Ids may be a
tensor, yet torch is never imported here: a program that holds a tensor has imported it already.
"""

from __future__ import annotations

import operator
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from charlm.errors import InputError, InvalidTextError, UnknownCharacterError, quoted, shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_text", "checked_ids", "checked_vocab", "encoded", "shown", "unknown_characters"]

_MAX_SHOWN = 5  # unknown characters named in a message
_FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")  # accents as part of letters, or on their own
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(text: object) -> None:
    """Raise InputError unless a text is a string."""
    if not isinstance(text, str):
        raise InputError(f"text must be a str, got {type(text).__name__}")


def encoded(part: str, encoding: str, *, text: str) -> bytes:
    """Encode a part of a text in one of the UTF encodings; only a lone surrogate can fail.

    Raises:
        InvalidTextError: names the first lone surrogate of the whole text and its place.
    """
    try:
        return part.encode(encoding)
    except UnicodeEncodeError:
        first = next(_SURROGATE.finditer(text))
    raise InvalidTextError(
        f"text must be valid Unicode, got the lone surrogate U+{ord(first[0]):04X} at "
        f'{_place(text, first.start())}; remove it, or read the file without errors="surrogateescape"',
        offset=first.start(),
    )


def unknown_characters(text: str, first: Mapping[str, int], count: int, vocab: str) -> UnknownCharacterError:
    """Return the error about the characters of a text that a vocabulary lacks.

    Args:
        text: the whole text.
        first: each unknown character with the position of its first occurrence, in order.
        count: the number of all occurrences.
        vocab: the known characters.
    """
    named = list(first.items())[:_MAX_SHOWN]
    places = [f"{quoted(c)} (U+{ord(c):04X}) at {_place(text, position)}" for c, position in named]
    if len(first) > _MAX_SHOWN:
        places.append(f"and {len(first) - _MAX_SHOWN} more")
    subject = "1 character is" if len(first) == 1 else f"{len(first)} characters are"
    line, column = _line_and_column(text, named[0][1])
    advice = 'encode(..., on_unknown="skip") leaves such out, and a ByteTokenizer knows all'
    for form in _FORMS:
        if set(unicodedata.normalize(form, text)) <= set(vocab):
            advice = f'all are in the normal form {form} of the text: unicodedata.normalize("{form}", text)'
    return UnknownCharacterError(
        f"{subject} not in the vocabulary: {', '.join(places)}; {advice}",
        characters=tuple(first),
        position=named[0][1],
        line=line,
        column=column,
        count=count,
    )


def _line_and_column(text: str, position: int) -> tuple[int, int]:
    return text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)


def _place(text: str, position: int) -> str:
    line, column = _line_and_column(text, position)
    return f"position {position} (line {line}, column {column})"


def checked_vocab(vocab: Sequence[str]) -> str:
    """Return the characters of a vocabulary as one string.

    Raises:
        InputError: there are none, an entry is not one character, or one comes twice.
    """
    if not isinstance(vocab, Sequence):  # a set, above all: it has no order
        raise InputError(f"vocab must be a string or a list of characters, got {type(vocab).__name__}")
    for i, entry in enumerate([] if isinstance(vocab, str) else vocab):
        if not isinstance(entry, str) or len(entry) != 1:
            raise InputError(f"vocab must hold single characters, got {shown(entry)} at index {i}")
    characters = "".join(vocab)
    if not characters:
        raise InputError("vocab must hold at least one character, got none")
    surrogate = _SURROGATE.search(characters)
    if surrogate:
        code, i = ord(surrogate[0]), surrogate.start()
        raise InputError(f"vocab must hold valid Unicode, got the lone surrogate U+{code:04X} at index {i}")
    codes = np.frombuffer(characters.encode("utf-32-le"), np.dtype("<u4"))
    ordered = np.sort(codes)  # quicker than a set
    if (ordered[1:] == ordered[:-1]).any():
        order = np.argsort(codes, kind="stable")  # a repeat stays behind its first occurrence
        i = int(order[1:][ordered[1:] == ordered[:-1]].min())
        twice = f"{quoted(characters[i])} at index {characters.index(characters[i])} and again at index {i}"
        raise InputError(f"vocab must hold each character once, got {twice}")
    return characters


def checked_ids(ids: Iterable[int] | NDArray[np.integer[Any]] | Tensor, vocab_size: int) -> NDArray[np.intp]:
    """Return ids as an array (N,), each in [0, vocab_size).

    Raises:
        InputError: they are not one-dimensional or no integers, or one is out of range.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(ids, torch.Tensor):
        tensor: Tensor = ids
        try:
            ids = tensor.detach().cpu().numpy()
        except (TypeError, RuntimeError):  # numpy has no bfloat16; a meta tensor has no values
            raise InputError(
                f"ids must be integers, got a {tensor.dtype} tensor on {tensor.device}"
            ) from None
    array = ids if isinstance(ids, np.ndarray) else _listed(ids, vocab_size)
    if array.ndim != 1:
        raise InputError(f"ids must have one dimension, got shape {array.shape}; decode rows one by one")
    if array.dtype.kind not in "iu":
        raise InputError(f"ids must be integers, got {array.dtype}; convert them if they are whole numbers")
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        position = int(np.flatnonzero((array < 0) | (array >= vocab_size))[0])
        raise _out_of_range(int(array[position]), position, vocab_size)
    return array.astype(np.intp, copy=False)


def _listed(ids: Iterable[int], vocab_size: int) -> NDArray[np.int64]:
    if not isinstance(ids, Iterable):
        raise InputError(f"ids must be a list, array or tensor of ints, got {type(ids).__name__}")
    values = [value if type(value) is int else _index(value, i) for i, value in enumerate(ids)]
    try:
        return np.array(values, np.int64)
    except OverflowError:
        position, value = next((i, value) for i, value in enumerate(values) if not 0 <= value < vocab_size)
        raise _out_of_range(value, position, vocab_size) from None


def _index(value: Any, position: int) -> int:
    kind = str(getattr(value, "dtype", type(value).__name__))
    if "bool" not in kind:  # Python and torch would take a bool for an index
        try:
            return operator.index(value)
        except TypeError:
            pass
    advice = "; decode rows one by one" if hasattr(value, "__len__") and not isinstance(value, str) else ""
    raise InputError(f"ids must be ints, got {kind} at position {position}{advice}")


def _out_of_range(value: int, position: int, vocab_size: int) -> InputError:
    got = value if -(10**19) < value < 10**19 else "a larger number"
    return InputError(
        f"ids must be in [0, {vocab_size}), as vocab_size is {vocab_size}, got {got} at position {position}; "
        "decode with the tokenizer that encoded them"
    )
