"""Our safetensors files are the official library's, byte for byte, and what we accept it accepts."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch as official
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor

from charlm.errors import FileFormatError, InputError
from charlm.files.atomic import write_file
from charlm.files.reading import read_file
from charlm.files.safetensors import dumps, loads, parse_header

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def tensors_strategy(draw: st.DrawFn) -> dict[str, Tensor]:
    tensors = {}
    for name in draw(st.lists(TEXT.filter(lambda name: name != "__metadata__"), unique=True, max_size=5)):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 3), max_size=4))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[name] = (raw % 2 if dtype is torch.bool else raw).view(dtype).reshape(shape)
    return tensors


def encoded(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytearray:
    return bytearray(b"".join(dumps(tensors, metadata or {})))


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert tensor.shape == right[name].shape
        assert raw(tensor) == raw(right[name])  # NaNs too


def with_header(header: object, buffer: bytes = b"") -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + buffer)


def entry(
    dtype: object = "F32", shape: object = (1,), data_offsets: object = (0, 4), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets, **more}


@given(tensors_strategy(), st.dictionaries(TEXT, TEXT, max_size=1))  # it puts several keys in random order
def test_files_are_the_official_librarys_byte_for_byte(
    tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    assert encoded(tensors, metadata) == official.save(tensors, metadata or None)


@given(tensors_strategy(), st.dictionaries(TEXT, TEXT, max_size=3))
def test_what_is_written_is_read_back(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    data = encoded(tensors, metadata)
    header = parse_header(data, path="m")
    loaded, strings = loads(data, path="m")
    assert_same(loaded, tensors)
    assert strings == header.metadata == metadata
    assert list(loaded) == list(header.tensors)
    for name, info in header.tensors.items():
        assert (info.dtype, info.shape) == (tensors[name].dtype, tensors[name].shape)
        assert bytes(data[info.start : info.end]) == raw(tensors[name])


def test_metadata_is_written_in_order_of_its_keys() -> None:
    assert dumps({}, {"b": "2", "a": "1"}) == dumps({}, {"a": "1", "b": "2"})
    assert official.load(bytes(encoded({}, {"b": "2", "a": "1"}))) == {}


@given(tensors_strategy())
def test_the_official_librarys_files_are_read(tensors: dict[str, Tensor]) -> None:
    loaded, _ = loads(bytearray(official.save(tensors)), path="m")
    assert_same(loaded, tensors)


def test_a_file_on_disk_is_written_in_pieces_and_read_whole(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(30, 20), "steps": torch.tensor(7)}
    write_file(tmp_path / "m.safetensors", dumps(tensors))
    assert_same(official.load_file(tmp_path / "m.safetensors"), tensors)
    loaded, _ = loads(read_file(tmp_path / "m.safetensors", max_bytes=1 << 20), path="m")
    assert_same(loaded, tensors)


def test_tensors_that_do_not_lie_in_order_are_written_as_they_read() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": base[:1].expand(3, 4),
        "parameter": torch.nn.Parameter(base),
    }
    loaded, _ = loads(encoded(tensors), path="m")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_contiguous_tensors_are_not_copied() -> None:
    weight = torch.zeros(2, 3)
    piece = dumps({"weight": weight})[1]
    weight.fill_(1.0)
    assert bytes(piece) == raw(torch.ones(2, 3))


def test_tensors_share_the_buffer_and_nothing_with_each_other() -> None:
    data = encoded({"a": torch.ones(4), "b": torch.zeros(4), "c": torch.zeros(0)})
    loaded, _ = loads(data, path="m")
    loaded["a"].fill_(5.0)
    assert torch.equal(loaded["b"], torch.zeros(4))
    assert bytes(data[-32:-16]) == raw(torch.full((4,), 5.0))
    assert loaded["a"].untyped_storage().nbytes() == 16
    loaded["a"].resize_(2)
    with pytest.raises(RuntimeError, match="resiz"):
        loaded["a"].resize_(100)


def test_the_buffer_cannot_be_resized_under_the_tensors() -> None:
    data = encoded({"a": torch.ones(4)})
    loaded, _ = loads(data, path="m")
    with pytest.raises(BufferError):
        data.clear()
    del loaded
    data.clear()


def test_tensors_of_an_unaligned_file_are_aligned() -> None:
    header = {"a": entry("I8", [1], [0, 1]), "b": entry("F64", [2], [1, 17])}
    numbers = torch.tensor([1.5, -2.5], dtype=torch.float64)
    loaded, _ = loads(with_header(header, b"\x07" + raw(numbers)), path="m")
    assert torch.equal(loaded["b"], numbers)
    assert loaded["b"].data_ptr() % 8 == 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1, dtype=torch.complex64),
        torch.zeros(1, device="meta"),
        torch.zeros(2, 2).to_sparse(),
    ],
)
def test_tensors_that_the_format_cannot_hold_are_refused(tensor: Tensor) -> None:
    with pytest.raises(InputError, match="tensor 'x' must be dense and one of int64, float64"):
        dumps({"x": tensor})


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"__metadata__": torch.zeros(1)}, {}, "must not be named '__metadata__'"),
        ({"\ud800": torch.zeros(1)}, {}, "must be UTF-8"),
        ({"x": torch.zeros([1] * 9)}, {}, "at most 8 sizes"),
        ({str(i): torch.zeros(0) for i in range(4097)}, {}, "at most 4096 tensors, got 4097"),
        ({}, {"text": "x" * (1 << 20)}, "at most 1048576 bytes"),
    ],
)
def test_what_the_reader_would_refuse_is_not_written(
    tensors: dict[str, Tensor], metadata: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        dumps(tensors, metadata)


def test_the_largest_header_within_the_limits_is_read() -> None:
    tensors = {f"{i:04}": torch.zeros([1] * 8) for i in range(4096)}
    loaded, _ = loads(encoded(tensors), path="m")
    assert len(loaded) == 4096


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "begin with 8 bytes of header length, got 0"),
        (b"\0" * 7, "begin with 8 bytes of header length, got 7"),
        (b"\0" * 8, "must hold safetensors, got something else"),
        (b"A text that begins so.", "must hold safetensors, got something else"),
        (b"\xff" * 8 + b"{}", "header of at most 2 bytes, got 18446744073709551615"),
        ((3).to_bytes(8, "little") + b"{}", "header of at most 2 bytes, got 3"),
        (
            (1 << 20 | 1).to_bytes(8, "little") + b"{" * (1 << 21),
            "header of at most 1048576 bytes, got 1048577",
        ),
        (with_header(b" {}"), "must hold safetensors, got something else"),
        (with_header(b"[]"), "must hold safetensors, got something else"),
        (with_header(b"{} x"), "Extra data"),
        (with_header({}, b"\0"), "must have 0 bytes of tensors, got 1"),
        (with_header({"a": entry()}, b"\0" * 3), "must have 4 bytes of tensors, got 3"),
        (with_header({"a": entry()}, b"\0" * 5), "must have 4 bytes of tensors, got 5"),
        (with_header({"a": entry(data_offsets=[4, 8])}, b"\0" * 8), "must begin tensor 'a' at byte 0, got 4"),
        (with_header({"a": entry(), "b": entry()}, b"\0" * 4), "must begin tensor 'b' at byte 4, got 0"),
        (with_header({"a": entry(), "b": entry(data_offsets=[2, 6])}, b"\0" * 6), "at byte 4, got 2"),
        (with_header({"a": entry(data_offsets=[0, 3])}, b"\0" * 3), "4 bytes for tensor 'a', got 3"),
        (with_header({"a": entry(data_offsets=[4, 0])}, b"\0" * 4), "4 bytes for tensor 'a', got -4"),
        (with_header({"a": entry(data_offsets=[0, 2, 4])}, b"\0" * 4), "two data_offsets"),
        (with_header({"a": entry(data_offsets=[-4, 0])}, b"\0" * 4), "two data_offsets"),
        (with_header({"a": entry(data_offsets="0")}, b"\0" * 4), "two data_offsets"),
        (with_header({"a": entry(shape=[True])}, b"\0" * 4), "shape of at most 8 sizes"),
        (with_header({"a": entry(shape=[1.0])}, b"\0" * 4), "shape of at most 8 sizes"),
        (with_header({"a": entry(shape=[-1])}, b"\0" * 4), "shape of at most 8 sizes"),
        (with_header({"a": entry(shape=[1] * 9)}, b"\0" * 4), "shape of at most 8 sizes"),
        (with_header({"a": entry(shape=None)}, b"\0" * 4), "shape of at most 8 sizes"),
        (with_header(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "no -0"),
        (with_header({"a": entry(shape=[2**61], data_offsets=[0, 0])}), "fewer than 2**63 bytes"),
        (with_header({"a": entry(shape=[0, 2**40, 2**40], data_offsets=[0, 0])}), "fewer than 2**63 bytes"),
        (with_header({"a": entry(dtype="F8_E4M3")}, b"\0" * 4), "one of the dtypes I64, F64"),
        (with_header({"a": entry(dtype="f32")}, b"\0" * 4), "one of the dtypes"),
        (with_header({"a": entry(dtype=["F32"])}, b"\0" * 4), "one of the dtypes"),
        (with_header({"a": entry(more=1)}, b"\0" * 4), "dtype, shape and data_offsets"),
        (with_header({"a": {"dtype": "F32"}}, b"\0" * 4), "dtype, shape and data_offsets"),
        (with_header({"a": []}), "dtype, shape and data_offsets"),
        (with_header({"a\x1b": 1}), r"'a\x1b'"),
        (with_header({"__metadata__": None}), "strings by name"),
        (with_header({"__metadata__": {"a": 1}}), "strings by name"),
        (with_header({"a": entry("BOOL", [2], [0, 2])}, b"\1\2"), "only 0 and 1 in bool tensor 'a'"),
        (with_header(b'{"a":1,"a":2}'), "duplicate keys"),
        (with_header({str(i): entry(shape=[0], data_offsets=[0, 0]) for i in range(4097)}), "at most 4096"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_out_of_order_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(FileFormatError) as error:
        loads(bytearray(data), path="m.safetensors")
    assert str(error.value).startswith("'m.safetensors' must ")
    assert reason in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "tensor", [b'"":[],', b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},', b'"%d":{"a":0},']
)
def test_a_hostile_header_is_refused_within_time_and_memory(tensor: bytes) -> None:
    pieces = b"".join(tensor.replace(b"%d", b"%x" % i) for i in range((1 << 20) // (len(tensor) + 2)))
    data = with_header(b"{" + pieces + b'"":0}')
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(FileFormatError):
        loads(data, path="m")
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert seconds < 2.0  # several times what it takes, since tracing is slow


def check_against_official(data: bytes) -> None:
    """Whatever we accept the official library accepts, with equal tensors."""
    try:
        loaded, metadata = loads(bytearray(data), path="m")
    except FileFormatError:
        return
    try:
        expected = official.load(data)
    except SafetensorError as error:
        pytest.fail(f"we accept what the official library refuses: {error}")
    assert_same(loaded, expected)
    assert metadata == (
        json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    )


@given(st.binary(max_size=100))
def test_any_bytes_are_refused_or_read_as_officially(data: bytes) -> None:
    check_against_official(data)
    check_against_official(len(data).to_bytes(8, "little") + data)
    check_against_official(bytes(with_header(b"{" + data + b"}")))


@given(tensors_strategy(), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=3), st.data())
def test_mutated_files_are_refused_or_read_as_officially(
    tensors: dict[str, Tensor], changes: list[tuple[int, int]], draw: st.DataObject
) -> None:
    data = encoded(tensors, {"k": "v"})
    for position, byte in changes:
        data[position % len(data)] = byte
    check_against_official(bytes(data))
    check_against_official(bytes(data[: draw.draw(st.integers(0, len(data)))]))
    check_against_official(bytes(data) + b"\0")


SIZES = st.integers(-1, 9) | st.sampled_from(
    [2**31, 2**62, 2**63 - 1, 2**63, 10**19 - 1, 2**64, 1.0, True, None]
)
ENTRIES = st.builds(
    entry,
    st.sampled_from(["F32", "F64", "BF16", "BOOL", "U8", "I64", "F8_E4M3", "U16", "", 1]),
    st.lists(SIZES, max_size=4),
    st.lists(SIZES, min_size=1, max_size=3) | st.tuples(st.integers(0, 4), st.integers(0, 24)),
)


@given(st.dictionaries(TEXT, ENTRIES, max_size=3), st.binary(max_size=24), st.integers(0, 8))
def test_generated_headers_are_refused_or_read_as_officially(
    header: dict[str, object], buffer: bytes, padding: int
) -> None:
    check_against_official(bytes(with_header(json.dumps(header).encode() + b" " * padding, buffer)))


@given(st.sampled_from(["F32", "BOOL", "I64"]), st.lists(st.integers(0, 2) | SIZES, min_size=1, max_size=6))
def test_empty_tensors_of_any_shape_are_refused_or_read_as_officially(
    dtype: str, shape: list[object]
) -> None:
    check_against_official(bytes(with_header({"a": entry(dtype, [0, *shape], [0, 0])})))
    check_against_official(bytes(with_header({"a": entry(dtype, [*shape, 0], [0, 0])})))
