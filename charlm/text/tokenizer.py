"""Tokenizers turn a text into integer ids and back, one id per character or one per byte.

A tokenizer is a value: it never changes, two with the same vocabulary are equal, and it is saved in its own
file, `tokenizer.json`. This module knows no models and no torch.
`CharTokenizer.from_text(text)` makes the vocabulary of the lecture "Let's build GPT". For speed, a text is
cut into stretches that fit into the processor's cache, and a table gives the ids of a whole stretch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeAlias, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from charlm.errors import DataError, InputError, UnknownCharacterError, quoted, shown
from charlm.files import atomic, reading, strict_json
from charlm.plain import as_text
from charlm.text.checks import check_text, checked_ids, checked_vocab, encoded, unknown_characters

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MAX_FILE_BYTES",
    "ByteTokenizer",
    "CharTokenizer",
    "OnUnknown",
    "Tokenizer",
    "Unit",
    "load_tokenizer",
    "tokenizer_from_dict",
    "unit_of",
]

OnUnknown: TypeAlias = Literal["error", "skip", "replace"]
"""How a character outside the vocabulary is treated."""

MAX_FILE_BYTES = 8 * 2**20
"""Largest tokenizer.json that is read. The vocabulary of all of Unicode takes 4.4 MB."""

_FORMAT, _VERSION = "charlm.tokenizer", 1
_STRETCH = 2**16  # characters: text, codes and ids of a stretch take at most 0.8 MB; the fastest measured


Unit: TypeAlias = Literal["character", "byte"]
"""The unit of text that one id stands for."""


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of a tokenizer. `CharTokenizer` and `ByteTokenizer` implement it."""

    @property
    def vocab_size(self) -> int:
        """The number of ids, which are 0 … vocab_size - 1."""
        ...

    def encode(self, text: str, *, on_unknown: OnUnknown = "error") -> list[int]:
        """Return the ids of a text as a list; see `CharTokenizer.encode_array`."""
        ...

    def encode_array(
        self, text: str, *, on_unknown: OnUnknown = "error"
    ) -> NDArray[np.uint8 | np.uint16 | np.uint32]:
        """Return the ids of a text as an array (N,) of the smallest unsigned type that holds every id."""
        ...

    def decode(self, ids: Iterable[int] | NDArray[np.integer[Any]] | Tensor) -> str:
        """Return the text of ids (N,)."""
        ...

    def save(self, path: str | Path) -> None:
        """Write a file from which `load_tokenizer` makes an equal tokenizer."""
        ...

    def to_dict(self) -> dict[str, object]:
        """Return the content of that file as values of JSON."""
        ...


class CharTokenizer:
    """One id per character: id i stands for `vocab[i]`. Immutable, hashable, picklable.

    A character is a Unicode code point, as in Python's `str`. Nothing is normalised: decoding returns exactly
    the text that was encoded.

    Args:
        vocab: the characters in the order of their ids, each once: a string or a list.
        unknown: the character of `vocab` that replaces characters outside it when a text is encoded with
            `on_unknown="replace"`; None: there is no such character.

    Raises:
        InputError: the vocabulary is empty, lacks `unknown`, or holds a character twice, a lone surrogate or
            an entry that is not a single character.

    Example:
        >>> tokenizer = CharTokenizer.from_text("hello")
        >>> tokenizer.vocab
        ('e', 'h', 'l', 'o')
        >>> tokenizer.encode("hole")
        [1, 3, 2, 0]
        >>> tokenizer.decode([1, 3, 2, 0])
        'hole'
    """

    __slots__ = ("_characters", "_codes", "_latin1", "_table", "_unknown")

    def __init__(self, vocab: Sequence[str], *, unknown: str | None = None) -> None:
        self._characters = checked_vocab(vocab)
        self._unknown = as_text(unknown)
        if unknown is not None and (
            self._unknown is None or len(self._unknown) != 1 or self._unknown not in self._characters
        ):
            raise InputError(f"unknown must be one character of vocab or None, got {shown(unknown)}")
        V = len(self._characters)
        self._codes = np.frombuffer(self._characters.encode("utf-32-le"), np.dtype("<u4"))  # (V,)
        # The id of each code point, V for an unknown one. The last entry is V, too, and is used for all code
        # points beyond the table.
        self._table = np.full(int(self._codes.max()) + 2, V, np.min_scalar_type(V))
        self._table[self._codes] = np.arange(V)
        of_bytes = self._table.take(np.arange(256), mode="clip")  # (256,)
        self._latin1 = of_bytes.tobytes() if of_bytes.dtype == np.uint8 else None

    @classmethod
    def from_text(cls, text: str | Iterable[str]) -> Self:
        """Return a tokenizer of the characters of a text, sorted by code point.

        Args:
            text: the text, or several.

        Raises:
            DataError: the text is empty.
            InvalidTextError: it holds a lone surrogate.
            InputError: it is no text.

        Source:
            The lecture's `chars = sorted(list(set(text)))`.
        """
        seen = _characters(text)
        if not seen:
            raise DataError("the text is empty, and a vocabulary needs at least one character")
        return cls(sorted(seen))

    def extend(self, text: str | Iterable[str]) -> CharTokenizer:
        """Return a tokenizer with the characters of a text added: old ids stay, new ones follow.

        Args:
            text: the text, or several. Its new characters are sorted by code point.

        Raises:
            InvalidTextError: it holds a lone surrogate.
            InputError: it is no text.

        Example:
            >>> CharTokenizer("ba").extend("abcd").vocab
            ('b', 'a', 'c', 'd')
        """
        new = sorted(_characters(text).difference(self._characters))
        return CharTokenizer(self._characters + "".join(new), unknown=self._unknown)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a tokenizer that `save` wrote.

        Args:
            path: a file of at most 8 MiB.

        Raises:
            FileFormatError: the file holds something else, or a tokenizer of another kind.
            OSError: the file cannot be read.
        """
        tokenizer = load_tokenizer(path)
        if not isinstance(tokenizer, CharTokenizer):
            raise reading.refusal(path, "must hold a CharTokenizer, got a ByteTokenizer. Use load_tokenizer.")
        return cls(tokenizer._characters, unknown=tokenizer._unknown)

    @property
    def vocab(self) -> tuple[str, ...]:
        """The characters in the order of their ids."""
        return tuple(self._characters)

    @property
    def vocab_size(self) -> int:
        """The number of characters."""
        return len(self._characters)

    @property
    def unknown(self) -> str | None:
        """The character that replaces characters outside the vocabulary, or None."""
        return self._unknown

    def encode(self, text: str, *, on_unknown: OnUnknown = "error") -> list[int]:
        """Return the ids of a text as a list; arguments and errors are those of `encode_array`."""
        ids: list[int] = self.encode_array(text, on_unknown=on_unknown).tolist()
        return ids

    def encode_array(
        self, text: str, *, on_unknown: OnUnknown = "error"
    ) -> NDArray[np.uint8 | np.uint16 | np.uint32]:
        """Return the ids of a text as an array.

        Args:
            text: any text.
            on_unknown: how a character outside the vocabulary is treated: "error" refuses the text, "skip"
                leaves the character out, "replace" encodes the tokenizer's `unknown` in its place.

        Returns:
            (N,) of the smallest of uint8, uint16 and uint32 that holds every id of the vocabulary.

        Raises:
            UnknownCharacterError: a character is not in the vocabulary, and `on_unknown` is "error".
                Lines are counted by line feeds alone.
            InvalidTextError: the text holds a lone surrogate.
            InputError: `text` is no string, `on_unknown` is none of the three, or it is "replace" and the
                tokenizer has no `unknown`.

        Example:
            >>> tokenizer = CharTokenizer("ab?", unknown="?")
            >>> tokenizer.encode_array("abc", on_unknown="replace")
            array([0, 1, 2], dtype=uint8)
        """
        check_text(text)
        _check_on_unknown(on_unknown)
        if on_unknown == "replace" and self._unknown is None:
            raise InputError(
                'on_unknown="replace" needs a tokenizer with an unknown character; '
                'make one with CharTokenizer(vocab, unknown="?"), or pass on_unknown="skip"'
            )
        V = self.vocab_size
        ids = np.empty(len(text), np.min_scalar_type(V - 1))  # (N,)
        end = 0
        for _, stretch in self._stretches(text):
            part = stretch
            if stretch.max() == V:
                if on_unknown == "error":
                    raise self._unknown_characters(text)
                part = stretch[stretch != V]
                if on_unknown == "replace":
                    part = np.where(stretch == V, self._characters.index(self._unknown or ""), stretch)
            ids[end : end + len(part)] = part
            end += len(part)
        return ids if end == len(ids) else ids[:end].copy()

    def decode(self, ids: Iterable[int] | NDArray[np.integer[Any]] | Tensor) -> str:
        """Return the text of ids.

        Args:
            ids: (N,), each in [0, vocab_size): a list, an integer array, or an integer tensor on any device.

        Raises:
            InputError: they are not one-dimensional or no integers, or one is out of range.
        """
        codes = self._codes.take(checked_ids(ids, self.vocab_size))  # (N,)
        return codes.tobytes().decode("utf-32-le")

    def save(self, path: str | Path) -> None:
        """Write a file from which `load` makes an equal tokenizer: the whole file or nothing.

        Args:
            path: the file; an existing one is replaced.

        Raises:
            OSError: the file cannot be written.
        """
        atomic.write_file(path, strict_json.dumps(self.to_dict()))

    def to_dict(self) -> dict[str, object]:
        """Return the content of the saved file; `tokenizer_from_dict` reads it."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": "character",
            "vocab": self._characters,
            "unknown": self._unknown,
        }

    def _stretches(self, text: str) -> Iterator[tuple[int, NDArray[np.unsignedinteger[Any]]]]:
        """Yield the start and the ids of each stretch of a text; the id of an unknown character is V."""
        for start in range(0, len(text), _STRETCH):
            part = text[start : start + _STRETCH]
            if self._latin1 is not None:
                try:
                    ids = part.encode("latin-1").translate(self._latin1)
                except UnicodeEncodeError:
                    pass  # there is a character beyond U+00FF
                else:
                    yield start, np.frombuffer(ids, np.uint8)
                    continue
            codes = np.frombuffer(encoded(part, "utf-32-le", text=text), np.dtype("<u4"))
            yield start, self._table.take(codes, mode="clip")

    def _unknown_characters(self, text: str) -> UnknownCharacterError:
        first: dict[str, int] = {}
        count = 0
        for start, ids in self._stretches(text):
            unknown = np.flatnonzero(ids == self.vocab_size) + start
            count += len(unknown)
            for position in unknown.tolist():
                first.setdefault(text[position], position)
        return unknown_characters(text, first, count, self._characters)

    @override
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CharTokenizer):
            return NotImplemented
        return (self._characters, self._unknown) == (other._characters, other._unknown)

    @override
    def __hash__(self) -> int:
        return hash((self._characters, self._unknown))

    @override
    def __repr__(self) -> str:
        unknown = "" if self._unknown is None else f", unknown={quoted(self._unknown)}"
        return f"<CharTokenizer of {self.vocab_size} characters: {quoted(self._characters, 80)}{unknown}>"

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self._characters, self._unknown)


def _characters(text: str | Iterable[str]) -> set[str]:
    """Return the set of characters of a text, or of several."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Iterable):
        raise InputError(f"text must be a str or several, got {type(text).__name__}")
    seen: set[str] = set()
    for piece in texts:
        check_text(piece)
        characters = set(piece)
        encoded("".join(characters), "utf-8", text=piece)  # refuses surrogates
        seen |= characters
    return seen


class ByteTokenizer:
    """One id per byte of UTF-8: 256 ids, and no character is unknown. All instances are equal.

    Example:
        >>> ByteTokenizer().encode("né")
        [110, 195, 169]
    """

    __slots__ = ()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a tokenizer that `save` wrote; argument and errors are those of `CharTokenizer.load`."""
        if not isinstance(load_tokenizer(path), ByteTokenizer):
            raise reading.refusal(path, "must hold a ByteTokenizer, got a CharTokenizer. Use load_tokenizer.")
        return cls()

    @property
    def vocab_size(self) -> int:
        """The number of bytes, 256."""
        return 256

    def encode(self, text: str, *, on_unknown: OnUnknown = "error") -> list[int]:
        """Return the bytes of a text as a list; arguments and errors are those of `encode_array`."""
        return list(_utf8(text, on_unknown))

    def encode_array(self, text: str, *, on_unknown: OnUnknown = "error") -> NDArray[np.uint8]:
        """Return the bytes of a text as an array.

        Args:
            text: any text.
            on_unknown: checked, without effect; so that either tokenizer can be passed.

        Returns:
            (N,) uint8, N the length of the text's UTF-8.

        Raises:
            InvalidTextError: the text holds a lone surrogate.
            InputError: `text` is no string, or `on_unknown` is none of "error", "skip" and "replace".
        """
        return np.frombuffer(bytearray(_utf8(text, on_unknown)), np.uint8)  # bytes would make it read-only

    def decode(self, ids: Iterable[int] | NDArray[np.integer[Any]] | Tensor) -> str:
        """Return the text of bytes.

        Bytes that are no valid UTF-8 become U+FFFD, the replacement character: a model may generate such
        bytes, and a character may be cut in two.

        Args:
            ids: (N,), each in [0, 256): a list, an integer array, or an integer tensor on any device.

        Raises:
            InputError: they are not one-dimensional or no integers, or one is out of range.
        """
        return checked_ids(ids, 256).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Write a file from which `load` makes an equal tokenizer; see `CharTokenizer.save`."""
        atomic.write_file(path, strict_json.dumps(self.to_dict()))

    def to_dict(self) -> dict[str, object]:
        """Return the content of the saved file; `tokenizer_from_dict` reads it."""
        return {"format": _FORMAT, "version": _VERSION, "kind": "byte"}

    @override
    def __eq__(self, other: object) -> bool:
        return True if isinstance(other, ByteTokenizer) else NotImplemented

    @override
    def __hash__(self) -> int:
        return hash(ByteTokenizer)

    @override
    def __repr__(self) -> str:
        return "ByteTokenizer()"


def unit_of(tokenizer: Tokenizer) -> Unit:
    """Return the unit of text that an id of this tokenizer stands for."""
    return "byte" if isinstance(tokenizer, ByteTokenizer) else "character"


def load_tokenizer(path: str | Path) -> CharTokenizer | ByteTokenizer:
    """Read a tokenizer of either kind from a file that `save` wrote.

    Args:
        path: a regular file of at most 8 MiB.

    Raises:
        FileFormatError: the file holds something else; the message names the field.
        OSError: the file cannot be read.
    """
    data = reading.read_file(path, max_bytes=MAX_FILE_BYTES)
    values = strict_json.loads(data, path=str(path), max_bytes=MAX_FILE_BYTES)
    return tokenizer_from_dict(values, path=str(path))


def tokenizer_from_dict(values: Mapping[str, object], *, path: str) -> CharTokenizer | ByteTokenizer:
    """Make a tokenizer from the values of `to_dict`.

    Args:
        values: the fields `format`, `version` and `kind`; for a `CharTokenizer` also `vocab` and `unknown`.
        path: the file of the values, for messages.

    Raises:
        FileFormatError: a field is missing, wrong or unknown.

    Example:
        >>> tokenizer_from_dict(ByteTokenizer().to_dict(), path="tokenizer.json")
        ByteTokenizer()
    """
    fields = ["format", "version", "kind"]
    strict_json.check_version(values, _FORMAT, _VERSION, path=path)
    kind = strict_json.take(values, "kind", str, path=path)
    tokenizer: CharTokenizer | ByteTokenizer = ByteTokenizer()
    if kind == "character":
        fields += ["vocab", "unknown"]
        vocab = strict_json.take(values, "vocab", str, path=path)
        # `unknown` may be null but not missing
        unknown = (
            None if values.get("unknown", "") is None else strict_json.take(values, "unknown", str, path=path)
        )
        try:
            tokenizer = CharTokenizer(vocab, unknown=unknown)
        except InputError as error:
            raise reading.refusal(path, f"holds no tokenizer: {error}.") from error
    elif kind != "byte":
        raise reading.refusal(path, f"must hold 'character' or 'byte' in 'kind', got {shown(kind)}.")
    for name in values:
        if name not in fields:
            raise reading.refusal(path, f"must hold the fields {', '.join(fields)} only, got {shown(name)}.")
    return tokenizer


def _rebuilt(cls: type[CharTokenizer], characters: str, unknown: str | None) -> CharTokenizer:
    return cls(characters, unknown=unknown)


def _check_on_unknown(on_unknown: object) -> None:
    if on_unknown not in get_args(OnUnknown):
        raise InputError(f'on_unknown must be "error", "skip" or "replace", got {shown(on_unknown)}')


def _utf8(text: str, on_unknown: OnUnknown) -> bytes:
    check_text(text)
    _check_on_unknown(on_unknown)
    return encoded(text, "utf-8", text=text)
