"""What is read back is what was written, and nothing else is read."""

from __future__ import annotations

import contextlib
import json
import math
import time
import tracemalloc
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.errors import FileFormatError
from charlm.files.strict_json import MAX_BYTES, check_version, dumps, dumps_line, loads, take

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(1 - 10**19, 10**19 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)
)


def read(data: bytes) -> dict[str, object]:
    return loads(data, path="state.json")


def with_types(value: object) -> object:
    """The value with each scalar's type beside it, so that True, 1 and 1.0 differ."""
    if isinstance(value, dict):
        return {key: with_types(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_types(item) for item in value]
    return type(value), repr(value)


@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_what_is_written_is_read_back(value: dict[str, object]) -> None:
    for data in (dumps(value), dumps_line(value)):
        assert with_types(read(data)) == with_types(value)
        assert with_types(json.loads(data)) == with_types(value)
        assert data.endswith(b"\n")
    assert dumps_line(value).count(b"\n") == 1


def test_files_are_written_for_readers() -> None:
    assert dumps({"b": 1, "a": {"text": "é\u2028"}}).decode() == (
        '{\n  "b": 1,\n  "a": {\n    "text": "é\u2028"\n  }\n}\n'
    )


def test_mappings_and_tuples_are_written_as_objects_and_lists() -> None:
    value: Mapping[str, object] = MappingProxyType({"a": (1, MappingProxyType({"b": 2.5}))})
    assert dumps_line(value) == b'{"a":[1,{"b":2.5}]}\n'


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (float("nan"), "nan"),
        (-math.inf, "-inf"),
        (10**19, "int"),
        (np.float64(1.5), "float64"),
        (np.int64(1), "int64"),
        (b"x", "bytes"),
        ({1}, "set"),
        (object, "type"),
        ("\ud800", "ud800"),
    ],
)
def test_values_outside_of_strict_json_are_not_written(value: object, got: str) -> None:
    for write in (dumps, dumps_line):
        with pytest.raises(TypeError, match=rf"JSON must hold .*{got}.*in 'loss'"):
            write({"all": [{"loss": [value]}]})


@pytest.mark.parametrize("key", [1, None, True, b"a"])
def test_keys_must_be_strings(key: object) -> None:
    with pytest.raises(TypeError, match="keys must be strings"):
        dumps({"a": {key: 1}})
    with pytest.raises(TypeError, match="a key"):
        dumps({"a": {"\udfff": 1}})


def test_a_structure_that_holds_itself_is_not_written() -> None:
    endless: dict[str, object] = {}
    endless["self"] = endless
    with pytest.raises(TypeError, match="at most 32 deep"):
        dumps(endless)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "error at line 1, column 1: Expecting value"),
        (b"{", "error at line 1, column 2"),
        (b'{"a": 1,\n "b" 2}', "error at line 2, column 6: Expecting ':' delimiter"),
        (b'{"a": 1} x', "Extra data"),
        (b"[1]", "must hold a JSON object, got a list"),
        (b'"text"', "must hold a JSON object, got 'text'"),
        (b"null", "must hold a JSON object, got null"),
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
        (b'{"a": "\xff"}', "must be UTF-8, got invalid start byte at byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "must be UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "must be JSON in UTF-8, got text in UTF-16; convert it with iconv"),
        ('{"a": 1, "b": 2}'.encode("utf-16-le"), "got text in UTF-16LE; convert it with iconv"),
        (b'{"a": NaN}', "finite numbers, got NaN"),
        (b'{"a": Infinity}', "finite numbers, got Infinity"),
        (b'{"a": -Infinity}', "finite numbers, got -Infinity"),
        (b'{"a": 1e999}', "finite numbers, got '1e999'"),
        (b'{"a": -1e999}', "finite numbers, got '-1e999'"),
        (b'{"a": 12345678901234567890}', "at most 19 digits"),
        (b'{"a": -12345678901234567890}', "at most 19 digits"),
        (b'{"a": -0}', "no -0"),
        (b'{"a": 01}', "error"),
        (b'{"a": 1, "b": {"a": 2, "a\\n": 3, "a\\n": 4}}', r"duplicate keys, got 'a\n' twice"),
        (b'{"a": "\\ud800"}', "lone surrogate U+D800"),
        (b'{"a": ["\\udc00\\ud800"]}', "lone surrogate U+DC00"),
        (b'{"\\udfff": 1}', "lone surrogate U+DFFF"),
        (b'{"a": "\n"}', "Invalid control character"),
        (b'{"a": "\\x"}', "Invalid \\escape"),
        (b"{'a': 1}", "double quotes"),
        (b'{"a": 1,}', "error"),
        (b'{"a": 1}\x00', "Extra data"),
        (b'{"a": \xc2\xa01}', "Expecting value"),
    ],
)
def test_what_is_not_strict_json_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(FileFormatError) as error:
        read(data)
    assert str(error.value).startswith("'state.json' must ")
    assert reason in str(error.value)
    assert error.value.path == "state.json"
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a": "\\ud83d\\ude00"}', "\U0001f600"),
        (b'{"a": "\\u0000"}', "\0"),
        (b'{"a": 9999999999999999999}', 9999999999999999999),
        (b'{"a": -9999999999999999999}', -9999999999999999999),
        (b'{"a": -0.0}', -0.0),
        (b'{"a": 1E5}', 100000.0),
        (b'{"a": 1e-999}', 0.0),
        (b'\t\r\n {"a": [\t1]}\n', [1]),
        (b'{"a": "\\\\"}', "\\"),
        (b'{"a": "\\\\\\"[[[["}', '\\"[[[['),
    ],
)
def test_strict_json_is_read(data: bytes, value: object) -> None:
    assert with_types(read(data)) == with_types({"a": value})


def test_a_file_may_be_as_large_as_its_limit_and_no_larger() -> None:
    data = b'{"a": "' + b"x" * (MAX_BYTES - 9) + b'"}'
    assert len(data) == MAX_BYTES
    assert read(data)
    with pytest.raises(FileFormatError, match="at most 262144 bytes, got 262145"):
        read(data + b" ")
    with pytest.raises(FileFormatError, match="at most 3 bytes, got 4"):
        loads(b'{"":1}'[:4], path="", max_bytes=3)


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_may_be_32_deep_and_no_deeper(opening: bytes, closing: bytes) -> None:
    def nested(depth: int) -> bytes:
        return b'{"x\\\\": ' + opening * (depth - 1) + b"1" + closing * (depth - 1) + b"}"

    assert read(nested(32))
    with pytest.raises(FileFormatError, match="at most 32 deep"):
        read(nested(33))


def test_brackets_and_commas_inside_of_strings_count_for_nothing() -> None:
    text = '[{,"\\' * 20_000
    assert read(json.dumps({"a": text}).encode()) == {"a": text}


@pytest.mark.parametrize(
    "piece", [b"[],", b"{},", b"0,", b'"",', b'"":0,', b"[" * 100 + b"]" * 100 + b",", b'""', b"]", b"}"]
)
def test_too_many_values_are_refused_before_they_take_memory(piece: bytes) -> None:
    data = b'{"a":[' + piece * (8_000_000 // len(piece)) + b"0]}"
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(FileFormatError, match="at most 131072 brackets, commas"):
        loads(data, path="tokenizer.json", max_bytes=8 << 20)
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 << 20
    assert seconds < 1.0


@pytest.mark.parametrize(
    ("data", "refused"),
    [
        (b'{"a":[' + b"[]," * 65_000 + b"0]}", False),
        (b'{"a":[' + b"{}," * 65_000 + b"0]}", False),
        (b'{"a":[' + b'{"":0},' * 32_000 + b"0]}", False),
        (b"{" + b",".join(b'"%x":0' % i for i in range(26_000)) + b"}", False),
        (b'{"a":"' + b"\\\\" * 131_000 + b'"}', False),
        (b'{"a":"' + b"\\ud800" * 43_000 + b'"}', True),
        (b'{"a":' + b"9" * 262_000 + b"}", True),
        (b'{"a":0.' + b"9" * 262_000 + b"}", False),
        (b"[" * 100_000, True),
        (b'{"a":' * 50_000, True),
        (b'"' * 262_000, True),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else "",
)
def test_the_largest_hostile_files_stay_within_time_and_memory(data: bytes, refused: bool) -> None:
    assert len(data) <= MAX_BYTES
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(FileFormatError) if refused else contextlib.nullcontext():
        read(data)
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert seconds < 1.0


@given(
    st.binary(max_size=200)
    | st.text('{}[]",:\\ud8019eE+-.truefalsn ', max_size=60).map(str.encode)
    | st.text('{}[]",:\\ud8019eE+-. ', max_size=60).map(lambda text: f'{{"a":{text}}}'.encode())
)
def test_any_bytes_are_refused_or_read_as_the_standard_library_reads_them(data: bytes) -> None:
    try:
        value = read(data)
    except FileFormatError:
        return
    assert value == json.loads(data)


def test_take_returns_a_field_of_the_right_type() -> None:
    values: dict[str, object] = {"i": 1, "f": 1.5, "b": True, "s": "x", "l": [1], "d": {}}
    assert take(values, "i", int, path="") == 1
    assert take(values, "f", float, path="") == 1.5
    assert take(values, "b", bool, path="") is True
    assert take(values, "s", str, path="") == "x"
    assert take(values, "l", list, path="") == [1]
    assert take(values, "d", dict, path="") == {}


def test_an_integer_may_stand_for_a_number() -> None:
    number = take({"a": 3}, "a", float, path="")
    assert with_types(number) == with_types(3.0)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, int, "must hold an integer in 'step', got true"),
        (1.0, int, "must hold an integer in 'step', got 1.0"),
        (True, float, "must hold a number in 'step', got true"),
        (1, bool, "must hold true or false in 'step', got 1"),
        (None, str, "must hold a string in 'step', got null"),
        ("x\x1b", dict, "must hold an object in 'step', got 'x\\x1b'"),
        ({}, list, "must hold a list in 'step', got an object"),
        ([], str, "must hold a string in 'step', got a list"),
    ],
)
def test_take_names_the_field_and_what_it_holds(value: object, kind: type, message: str) -> None:
    with pytest.raises(FileFormatError) as error:
        take({"step": value}, "step", kind, path="state.json")
    assert message in str(error.value)
    assert error.value.path == "state.json"


def test_take_names_a_field_that_is_missing() -> None:
    with pytest.raises(FileFormatError, match="must hold an integer in 'step', got no such field"):
        take({}, "step", int, path="state.json")


def test_versions_up_to_the_newest_are_read_and_no_other() -> None:
    for version in (1, 2, 3):
        check_version({"format": "a.b", "version": version}, "a.b", 3, path="x.json")
    with pytest.raises(FileFormatError, match=r"has version 4 of a\.b; this charlm reads up to 3"):
        check_version({"format": "a.b", "version": 4}, "a.b", 3, path="x.json")
    for version in (0, -1):
        with pytest.raises(FileFormatError, match="must hold a version of at least 1"):
            check_version({"format": "a.b", "version": version}, "a.b", 3, path="x.json")
    with pytest.raises(FileFormatError, match=r"must hold 'a\.b' in 'format'"):
        check_version({"format": "other", "version": 1}, "a.b", 3, path="x.json")
