"""The format of a compressed text: a header and blocks. Nothing here needs a model.

All numbers are little-endian. The header has a fixed part, the settings of a model that is counted from a
text, three numbers for each block, and a checksum. The bytes of the blocks follow. Each block can be decoded
without the others.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from charlm.errors import FileFormatError

__all__ = ["ArchiveInfo", "BlockInfo", "archive_info", "block_of", "read_header", "write_header"]

_MAGIC = b"\x89clm\r\n\x1a\n"  # as in PNG, to notice a transfer that changed line ends
_VERSION = 1
_FIXED = struct.Struct("<8sBB8s32sIQQ32sII")
_BLOCK = struct.Struct("<III")
_CRC = struct.Struct("<I")
_MOST_IN_A_BLOCK = 2**20
_STORED = 2**31
_WHOLE = "the file is damaged or cut short"


@dataclass(frozen=True)
class BlockInfo:
    """The place of one block, and its checksums."""

    size: int
    """In the file, in bytes."""
    stored: bool
    """Whether the bytes of the text are stored as they are, since the model would make more of them."""
    crc: int
    """CRC-32 of the stored bytes."""
    text_crc: int
    """CRC-32 of the decompressed bytes."""


@dataclass(frozen=True)
class ArchiveInfo:
    """The header of a compressed text."""

    arithmetic: int
    """The version of the arithmetic; another version might decode other bytes."""
    kind: str
    """Of the model: "gpt", "ngram", "bigram" or "mixture"."""
    model_sha256: str
    """Of the model's settings, vocabulary and weights."""
    block_size: int
    """Characters in each block but the last; bytes with a model of bytes."""
    length: int
    """Of the text, in the unit of `block_size`."""
    n_bytes: int
    """Of the text."""
    sha256: str
    """Of the text's bytes."""
    settings: bytes
    """Of an n-gram model that is counted from a text: its sizes and fitted numbers; else empty."""
    blocks: tuple[BlockInfo, ...]
    """In the order of the text."""

    @property
    def header_size(self) -> int:
        """Size of the header in bytes."""
        return _FIXED.size + len(self.settings) + _BLOCK.size * len(self.blocks) + _CRC.size

    @property
    def size(self) -> int:
        """Size of the whole in bytes."""
        return self.header_size + sum(block.size for block in self.blocks)


def archive_info(data: bytes) -> ArchiveInfo:
    """Return the header of a compressed text. Its blocks are not read.

    Args:
        data: at least the whole header.

    Raises:
        FileFormatError: it is no compressed text, or the header is damaged.

    Example:
        >>> from charlm.compression import archive_info, compress
        >>> info = archive_info(compress(b"so far, so good", "so far, so good" * 9))
        >>> info.kind, info.n_bytes, len(info.blocks)
        ('ngram', 15, 1)
    """
    return read_header(data)


def write_header(info: ArchiveInfo) -> bytes:
    """Return the bytes of the header of a compressed text."""
    fixed = _FIXED.pack(
        *(_MAGIC, _VERSION, info.arithmetic, info.kind.encode(), bytes.fromhex(info.model_sha256)),
        *(info.block_size, info.length, info.n_bytes, bytes.fromhex(info.sha256)),
        *(len(info.settings), len(info.blocks)),
    )
    blocks = [_BLOCK.pack(one.size | _STORED * one.stored, one.crc, one.text_crc) for one in info.blocks]
    header = b"".join([fixed, info.settings, *blocks])
    return header + _CRC.pack(zlib.crc32(header))


def read_header(data: bytes) -> ArchiveInfo:
    """Return the header, as `archive_info` does."""
    if data[: len(_MAGIC)] != _MAGIC[: len(data)] or not data:
        raise FileFormatError("this is no text that charlm has compressed")
    if len(data) < _FIXED.size:
        raise FileFormatError(_WHOLE)
    _, version, arithmetic, kind, model, block_size, length, n_bytes, sha, extra, count = _FIXED.unpack_from(
        data
    )
    if version != _VERSION:
        raise FileFormatError(
            f"the file has version {version} of the format, and this charlm reads version {_VERSION}; use "
            "another version of charlm, unless the file is damaged"
        )
    end = _FIXED.size + extra + _BLOCK.size * count
    if len(data) < end + _CRC.size or _CRC.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        raise FileFormatError(_WHOLE)
    if not 0 < block_size <= _MOST_IN_A_BLOCK or count != -(-length // block_size):
        raise FileFormatError("the header contradicts itself")
    blocks = tuple(
        BlockInfo(size % _STORED, size >= _STORED, crc, text_crc)
        for size, crc, text_crc in _BLOCK.iter_unpack(data[_FIXED.size + extra : end])
    )
    return ArchiveInfo(
        arithmetic=arithmetic,
        kind=kind.rstrip(b"\0").decode("ascii", "replace"),
        model_sha256=model.hex(),
        block_size=block_size,
        length=length,
        n_bytes=n_bytes,
        sha256=sha.hex(),
        settings=data[_FIXED.size : _FIXED.size + extra],
        blocks=blocks,
    )


def block_of(data: bytes, info: ArchiveInfo, number: int) -> bytes | None:
    """Return the stored bytes of a block, or None if they are damaged or missing."""
    block = info.blocks[number]
    at = info.header_size + sum(one.size for one in info.blocks[:number])
    found = data[at : at + block.size]
    return found if len(found) == block.size and zlib.crc32(found) == block.crc else None
