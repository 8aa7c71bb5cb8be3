"""The safetensors format: named tensors in one file, without code.

A file is an 8-byte little-endian length, a JSON header of that length, and the bytes of the tensors,
little-endian and row-major. The reader is stricter than the official library: ten dtypes, bounded sizes, and
every byte of the buffer belongs to exactly one tensor. The writer's bytes are those of the official library
(with the metadata sorted by key, where the library's order is random). All of it works in memory. The format:
https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeGuard

import torch
from torch import Tensor

from charlm.errors import FileFormatError, InputError, quoted
from charlm.files import strict_json
from charlm.files.kinds import other_than_data
from charlm.files.reading import refusal

__all__ = ["Header", "TensorInfo", "dumps", "loads", "parse_header"]

# In the order in which the official writer lays tensors out: by alignment, largest first.
_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_CODES)}
_MAX_HEADER = 1 << 20
_MAX_TENSORS = 4096
_MAX_RANK = 8
_NO_METADATA: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class TensorInfo:
    """The header's entry for one tensor; its bytes are `data[start:end]` of the whole file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors by name, in the order of their bytes, and the file's own strings."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def dumps(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = _NO_METADATA
) -> list[bytes | memoryview]:
    """Return tensors as the pieces of a safetensors file, for `atomic.write_file`.

    Args:
        tensors: dense tensors by name, of any shape up to rank 8, on any device.
        metadata: strings that travel with them.

    Returns:
        The header, then one piece per tensor: a view of its memory where it is contiguous and on the CPU, so
        write the pieces before the tensor changes. Tensors that share memory are written once each.

    Raises:
        InputError: the reader would refuse a tensor, a name or the number of tensors.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES or tensor.layout is not torch.strided or tensor.is_meta:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _RANKS)
            got = f"{tensor.dtype}, {tensor.layout} on {tensor.device}"
            raise InputError(f"tensor {quoted(name, 80)} must be dense and one of {kinds}, got {got}.")
    names = sorted(tensors, key=lambda name: (_RANKS[tensors[name].dtype], name))
    pieces = [_bytes_of(tensors[name]) for name in names]
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = dict(sorted(metadata.items()))
    size = 0
    for name, piece in zip(names, pieces, strict=True):
        if name == "__metadata__":
            raise InputError("a tensor must not be named '__metadata__': the format keeps this name.")
        start, size = size, size + len(piece)
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": _CODES[tensors[name].dtype], "shape": shape, "data_offsets": [start, size]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    try:
        _parse(text, size, "this file")
    except FileFormatError as error:
        raise InputError(f"these tensors cannot be written as safetensors: {error}") from None
    return [len(text).to_bytes(8, "little") + text, *pieces]


def parse_header(data: bytes | bytearray, *, path: str) -> Header:
    """Check the header of a safetensors file against its size, without making a tensor.

    Args:
        data: the whole file.
        path: its name, for messages.

    Raises:
        FileFormatError: the header is not valid.

    Example:
        >>> pieces = dumps({"weight": torch.zeros(2, 3)})
        >>> parse_header(b"".join(pieces), path="model.safetensors").tensors["weight"].shape
        (2, 3)
    """
    if len(data) < 8:
        raise refusal(path, f"must begin with 8 bytes of header length, got {len(data)} bytes in all.")
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{":
        raise refusal(path, f"must hold safetensors, got {other_than_data(data) or 'something else'}.")
    most = min(_MAX_HEADER, len(data) - 8)
    if length > most:
        raise refusal(path, f"must have a header of at most {most} bytes, got {length}.")
    return _parse(data[8 : 8 + length], len(data) - 8 - length, path)


def loads(data: bytearray, *, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Args:
        data: the whole file. The tensors are views of it, so do not write to it. It cannot be resized while
            one of them exists. (Tensors that another writer did not align are copied.)
        path: its name, for messages.

    Returns:
        Tensors by name, in the order of their bytes, on the CPU, each with a storage of its own extent;
        and the metadata.

    Raises:
        FileFormatError: the file is not valid.

    Example:
        >>> data = bytearray(b"".join(dumps({"w": torch.ones(2)}, {"step": "3"})))
        >>> loads(data, path="model.safetensors")
        ({'w': tensor([1., 1.])}, {'step': '3'})
    """
    header = parse_header(data, path=path)
    view = memoryview(data)  # frombuffer alone would let the bytearray be resized under the tensors
    tensors = {name: _tensor_at(view, info) for name, info in header.tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype is torch.bool and tensor.numel() and tensor.view(torch.uint8).max() > 1:
            raise refusal(
                path, f"must hold only 0 and 1 in bool tensor {quoted(name, 80)}, got another byte."
            )
    return tensors, header.metadata


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)  # (N,)
    return flat.view(torch.uint8).numpy().data


def _tensor_at(view: memoryview, info: TensorInfo) -> Tensor:
    if info.start == info.end:
        return torch.empty(info.shape, dtype=info.dtype, device="cpu")
    count = math.prod(info.shape)
    flat = torch.frombuffer(view, dtype=info.dtype, count=count, offset=info.start)  # (count,)
    if flat.data_ptr() % info.dtype.itemsize:
        flat = flat.clone()
    return flat.reshape(info.shape)


def _parse(text: bytes | bytearray, size: int, path: str) -> Header:
    """Check the header's text against the size of the buffer after it."""
    entries = strict_json.loads(text, path=path, max_bytes=_MAX_HEADER)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refusal(path, "must have strings by name in '__metadata__', got something else.")
    if len(entries) > _MAX_TENSORS:
        raise refusal(path, f"must hold at most {_MAX_TENSORS} tensors, got {len(entries)}.")
    tensors = {name: _tensor_info(name, entry, len(text) + 8, path) for name, entry in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    end = len(text) + 8
    for name, info in ordered.items():
        if info.start != end:
            offset, expected = info.start - len(text) - 8, end - len(text) - 8
            raise refusal(path, f"must begin tensor {quoted(name, 80)} at byte {expected}, got {offset}.")
        end = info.end
    covered = end - len(text) - 8
    if covered != size:
        raise refusal(path, f"must have {covered} bytes of tensors, got {size}.")
    return Header(ordered, metadata)


def _tensor_info(name: str, entry: object, base: int, path: str) -> TensorInfo:
    shown = quoted(name, 80)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refusal(
            path, f"must have dtype, shape and data_offsets for tensor {shown}, got something else."
        )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise refusal(
            path, f"must have one of the dtypes {', '.join(_DTYPES)} for tensor {shown}, got another."
        )
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise refusal(
            path, f"must have a shape of at most {_MAX_RANK} sizes for tensor {shown}, got another."
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise refusal(path, f"must have two data_offsets for tensor {shown}, got something else.")
    dtype = _DTYPES[code]
    # An empty tensor may have huge sizes too; torch multiplies them for its strides.
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63:
        raise refusal(path, f"must have fewer than 2**63 bytes in tensor {shown}, got a larger shape.")
    start, end = offsets
    needed = math.prod(shape) * dtype.itemsize
    if end - start != needed:
        raise refusal(path, f"must have {needed} bytes for tensor {shown}, got {end - start}.")
    return TensorInfo(dtype, tuple(shape), base + start, base + end)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
