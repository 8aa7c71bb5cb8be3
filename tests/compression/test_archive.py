"""What a header says is what was written; whatever is wrong with it is noticed."""

from __future__ import annotations

import dataclasses
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.compression.archive import ArchiveInfo, BlockInfo, archive_info, block_of, write_header
from charlm.errors import FileFormatError

WORDS = st.integers(0, 2**32 - 1)
BLOCKS = st.builds(BlockInfo, size=st.integers(0, 2**31 - 1), stored=st.booleans(), crc=WORDS, text_crc=WORDS)
INFO = ArchiveInfo(
    arithmetic=3,
    kind="mixture",
    model_sha256="ab" * 32,
    block_size=10,
    length=15,
    n_bytes=17,
    sha256="cd" * 32,
    settings=b"some",
    blocks=(
        BlockInfo(size=3, stored=False, crc=zlib.crc32(b"one"), text_crc=1),
        BlockInfo(size=4, stored=True, crc=zlib.crc32(b"more"), text_crc=2),
    ),
)
WHOLE = write_header(INFO) + b"onemore"


@given(st.lists(BLOCKS, max_size=5), st.binary(max_size=9), st.integers(1, 2**20))
def test_what_is_written_is_read(blocks: list[BlockInfo], settings: bytes, block_size: int) -> None:
    info = dataclasses.replace(
        INFO, blocks=tuple(blocks), settings=settings, block_size=block_size, length=block_size * len(blocks)
    )
    header = write_header(info)
    assert archive_info(header + b"behind it") == info
    assert len(header) == info.header_size


def test_blocks_are_found() -> None:
    assert [block_of(WHOLE, INFO, number) for number in range(2)] == [b"one", b"more"]
    assert INFO.size == len(WHOLE)


def test_every_flipped_bit_and_every_truncation_is_noticed() -> None:
    size = INFO.header_size
    for at in range(8 * len(WHOLE)):
        damaged = bytearray(WHOLE)
        damaged[at // 8] ^= 1 << at % 8
        if at < 8 * size:
            with pytest.raises(FileFormatError):
                archive_info(bytes(damaged))
        else:
            assert None in {block_of(bytes(damaged), INFO, number) for number in range(2)}
    for end in range(size):
        with pytest.raises(FileFormatError):
            archive_info(WHOLE[:end])
    for end in range(size, len(WHOLE)):
        assert block_of(WHOLE[:end], INFO, 1) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 21}, "contradicts itself"),
        ({"length": 10}, "contradicts itself"),
        ({"block_size": 2**20 + 1}, "contradicts itself"),
        ({"block_size": 0}, "contradicts itself"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        archive_info(write_header(dataclasses.replace(INFO, **changes)))  # type: ignore[arg-type]


def test_another_version_and_another_file_are_named() -> None:
    with pytest.raises(FileFormatError, match="version 2 of the format, and this charlm reads version 1"):
        archive_info(WHOLE[:8] + b"\x02" + WHOLE[9:])
    for data in (b"", b"\x1f\x8b\x08 and so on", b"text", WHOLE[1:]):
        with pytest.raises(FileFormatError, match="no text that charlm has compressed"):
            archive_info(data)
