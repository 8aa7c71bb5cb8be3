"""JSON with limits, which the writer keeps, too.

`json.loads` accepts more than JSON, and a file decides how much memory it takes. Here a file must be UTF-8
without a byte order mark, and its size, nesting and number of values are bounded before it is parsed. Content
with two meanings is refused: duplicate keys, NaN and Infinity, integers of more than 19 digits, lone
surrogates. `take` checks the type of one field (`True` is not an integer). The grammar is that of RFC 8259;
the ambiguities are those of RFC 7493 (I-JSON).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import NoReturn, TypeVar

from charlm.errors import quoted
from charlm.files.kinds import other_than_data
from charlm.files.reading import refusal

__all__ = ["MAX_BYTES", "check_version", "dumps", "dumps_line", "loads", "take"]

MAX_BYTES = 256 * 1024
"""Default size limit of a JSON file, in bytes."""

_MAX_MARKS = 131_072  # a safetensors header of 4,096 tensors of rank 8 has 98,304
_MAX_DEPTH = 32
_MAX_DIGITS = 19
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}  # JSON escapes all others
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

T = TypeVar("T")


def loads(
    data: bytes | bytearray, *, path: str, max_bytes: int = MAX_BYTES, max_marks: int = _MAX_MARKS
) -> dict[str, object]:
    """Parse a JSON object.

    Args:
        data: the bytes of the file.
        path: its name, for messages.
        max_bytes: largest size that is parsed.
        max_marks: the most brackets, commas and quotation marks, which bound the number of values.

    Returns:
        The object: dict, list, str, int, float, bool and None, with finite numbers and valid text.

    Raises:
        FileFormatError: the bytes are not JSON, not an object, or outside the limits.

    Example:
        >>> loads(b'{"step": 1200}', path="state.json")
        {'step': 1200}
        >>> loads(b'{"step": 1200, "step": 0}', path="state.json")
        Traceback (most recent call last):
            ...
        charlm.errors.FileFormatError: 'state.json' must have no duplicate keys, got 'step' twice.
    """
    if len(data) > max_bytes:
        raise refusal(path, f"must have at most {max_bytes} bytes, got {len(data)}.")
    if (data[:1] != b"{" or data[1:2] == b"\0") and (kind := other_than_data(data)):
        raise refusal(path, f"must be JSON in UTF-8, got {kind}.")
    if data.startswith(b"\xef\xbb\xbf"):
        raise refusal(path, "must be UTF-8 without a byte order mark, got one. Save it without.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal(path, f"must be UTF-8, got {error.reason} at byte {error.start}.") from None
    _check_structure(data, max_marks, path)
    value = _parse(text, path)
    if type(value) is not dict:
        raise refusal(path, f"must hold a JSON object, got {_described(value)}.")
    return value


def take(values: Mapping[str, object], name: str, kind: type[T], *, path: str) -> T:
    """Return one field of a JSON object, checked for its exact type.

    Args:
        values: the object.
        name: the field.
        kind: int, float, bool, str, list or dict. A bool is not an int; an int is a float.
        path: the file's name, for messages.

    Raises:
        FileFormatError: the field is missing or of another type.

    Example:
        >>> take({"step": True}, "step", int, path="state.json")
        Traceback (most recent call last):
            ...
        charlm.errors.FileFormatError: 'state.json' must hold an integer in 'step', got true.
    """
    if name not in values:
        raise refusal(path, f"must hold {_NAMES[kind]} in {quoted(name, 80)}, got no such field.")
    value = values[name]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise refusal(path, f"must hold {_NAMES[kind]} in {quoted(name, 80)}, got {_described(value)}.")
    return value


def check_version(values: Mapping[str, object], name: str, newest: int, *, path: str) -> None:
    """Check the fields `format` and `version` at the beginning of each of our files.

    A charlm reads files of its own version and of all older ones (docs/reliability.md has the rule).

    Args:
        values: the object.
        name: the required `format`.
        newest: the newest version that is read; all older ones are read, too.
        path: the file's name, for messages.

    Raises:
        FileFormatError: another format, no version, or a newer one.

    Example:
        >>> check_version({"format": "charlm.model", "version": 2}, "charlm.model", 1, path="config.json")
        Traceback (most recent call last):
            ...
        charlm.errors.FileFormatError: 'config.json' has version 2 of charlm.model; this charlm reads up to \
1. Update charlm.
    """
    given = take(values, "format", str, path=path)
    if given != name:
        raise refusal(path, f"must hold {name!r} in 'format', got {quoted(given, 40)}.")
    version = take(values, "version", int, path=path)
    if version > newest:
        raise refusal(
            path, f"has version {version} of {name}; this charlm reads up to {newest}. Update charlm."
        )
    if version < 1:
        raise refusal(path, f"must hold a version of at least 1 in 'version', got {version}.")


def dumps(value: Mapping[str, object]) -> bytes:
    """Return a JSON object as the content of a file: UTF-8, two spaces of indent, a newline at the end.

    Raises:
        TypeError: a value is not possible in strict JSON: another type, a key that is no string, NaN or an
            infinity, an integer of more than 19 digits, a lone surrogate, nesting deeper than 32.
    """
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=2).encode() + b"\n"


def dumps_line(value: Mapping[str, object]) -> bytes:
    r"""Return a JSON object as one line of a log, its newline included.

    Characters in strings that `str.splitlines` and other readers take for the end of a line are escaped.

    Raises:
        TypeError: as `dumps`.

    Example:
        >>> dumps_line({"step": 10, "loss": 2.5})
        b'{"step":10,"loss":2.5}\n'
        >>> dumps_line({"text": "\u2028"})
        b'{"text":"\\u2028"}\n'
    """
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_LINE_ENDS).encode() + b"\n"


def _check_structure(data: bytes | bytearray, max_marks: int, path: str) -> None:
    """Check the nesting and the number of values before any value is made.

    Without escapes, quotation marks only begin and end strings, so every second piece between them is outside
    of strings. Bytes that are not JSON may be split wrongly, but only after the parser's first error.
    """
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks, outside = bare.count(b'"'), b""
    if marks <= max_marks:
        outside = b"".join(bare.split(b'"')[::2])
        marks += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        marks = max(marks, outside.count(b"]") + outside.count(b"}"))  # valid JSON has no more of these
    if marks > max_marks:
        raise refusal(path, f"must have at most {max_marks} brackets, commas and quotation marks, got more.")
    depth = 0
    for bracket in outside.translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > _MAX_DEPTH:
            raise refusal(path, f"must be nested at most {_MAX_DEPTH} deep, got deeper.")


def _parse(text: str, path: str) -> object:
    def parse_int(digits: str) -> int:
        # -0 is a float to some readers and an integer to others
        if len(digits.removeprefix("-")) > _MAX_DIGITS or digits == "-0":
            raise refusal(
                path, f"must have integers of at most 19 digits and no -0, got {quoted(digits, 40)}."
            )
        return int(digits)

    def parse_float(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise refusal(path, f"must have finite numbers, got {quoted(digits, 40)}.")
        return number

    def parse_constant(name: str) -> NoReturn:
        raise refusal(path, f"must have finite numbers, got {name}.")

    def parse_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
        values: dict[str, object] = {}
        for key, value in pairs:
            if key in values:
                raise refusal(path, f"must have no duplicate keys, got {quoted(key, 80)} twice.")
            values[key] = value
        return values

    decoder = json.JSONDecoder(
        parse_int=parse_int,
        parse_float=parse_float,
        parse_constant=parse_constant,
        object_pairs_hook=parse_object,
    )
    try:
        value: object = decoder.decode(text)
        if "\\u" in text:  # only an escape can bring a surrogate into decoded UTF-8
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        where = f"at line {error.lineno}, column {error.colno}"
        raise refusal(path, f"must be JSON, got an error {where}: {error.msg}.") from None
    except UnicodeEncodeError as error:
        lone = f"U+{ord(error.object[error.start]):04X}"
        raise refusal(path, f"must have valid text, got the lone surrogate {lone}.") from None
    return value


_NAMES: dict[type, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _described(value: object) -> str:
    if isinstance(value, str):
        return quoted(value, 40)
    return _NAMES[type(value)] if isinstance(value, (list, dict)) else json.dumps(value)


def _plain(value: object, where: str = "", depth: int = 1) -> object:
    """Return a copy made of dict, list and exact scalars, or raise TypeError naming the place."""
    if depth > _MAX_DEPTH and isinstance(value, (Mapping, list, tuple)):
        raise TypeError(f"JSON must be nested at most {_MAX_DEPTH} deep, got deeper.")
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise TypeError(f"JSON keys must be strings, got {quoted(repr(key), 40)}.")
        return {_plain(key, "a key"): _plain(item, key, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    fits = (
        value is None
        or type(value) is bool
        or (type(value) is int and abs(value) < 10**_MAX_DIGITS)
        or (type(value) is float and math.isfinite(value))
        or (type(value) is str and not _SURROGATE.search(value))
    )
    if not fits:
        got = f"{quoted(repr(value), 80)} ({type(value).__name__}) in {quoted(where, 80)}"
        raise TypeError(f"JSON must hold finite numbers, valid text, true, false and null, got {got}.")
    return value
