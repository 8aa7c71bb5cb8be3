"""Whatever our safetensors reader accepts, the official library accepts, with the same tensors.

Valid files of many types, ranks and names are changed at random: bits, bytes, pieces cut, doubled or moved,
and, so that enough of them get past the first checks, single numbers, names, types and spaces of the header
with its length put right again. We may refuse more than the official library, and only by FileFormatError.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable

import pytest
import torch
from harness.campaign import Campaign
from torch import Tensor

from charlm.errors import FileFormatError
from charlm.files import safetensors as own

pytestmark = pytest.mark.slow

official = pytest.importorskip("safetensors.torch", reason="the official library is in the dev extra")
SafetensorError = pytest.importorskip("safetensors").SafetensorError

# How the official library refuses: by its own error, or by what it stumbles over.
REFUSALS = (SafetensorError, AssertionError, LookupError, TypeError, ValueError, RuntimeError)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
NUMBER = re.compile(rb"-?\d+")
WORD = re.compile(rb'"[^"]*"')
# Written in one line each: as they would stand in a header, apart by what no header holds.
NUMBERS = tuple(
    b"0|1|2|3|4|8|-1|-0|00|1.0|1e0|4294967296|9223372036854775807|18446744073709551615|18446744073709551616"
    b'|true|null|"1"|[1]'.split(b"|")
)
PIECES = tuple(
    b' |\n|\t|\r|\0|,|{|}|[|]|"|\\|:|/|\xff|\xc3\xa9|\\u0061|\\ud800|\\ud83d\\ude00|\\n|\\/|\\x|"a":0,|//'
    b"|\xef\xbb\xbf".split(b"|")
)


def seeds(draw: random.Random) -> list[bytes]:
    """Return valid files: of no tensor, of one of each type, of several, of empty ones, with metadata."""
    tensors: list[dict[str, Tensor]] = [{}]
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
    types += [torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors += [{"w": torch.ones(2, 3).to(dtype)} for dtype in types]
    tensors += [
        {"a": torch.arange(4), "b": torch.zeros(2, 2), "c": torch.zeros(3, dtype=torch.uint8)},
        {"scalar": torch.tensor(1.5), "empty": torch.zeros(0), "0": torch.zeros(3, 0, 2)},
        {"deep": torch.zeros(1, 2, 1, 2, 1, 1, 1, 2), "é\n\"'\\": torch.ones(1, dtype=torch.bool)},
        {f"layer.{i}.weight": torch.zeros(i % 3) for i in range(12)},
    ]
    metadata: list[dict[str, str]] = [{}, {"format": "pt"}, {"a": "", "é": "\u2028\x7f"}]
    return [b"".join(own.dumps(each, draw.choice(metadata))) for each in tensors for _ in range(2)]


def split(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def joined(header: bytes, buffer: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + buffer


def flip_bit(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def set_byte(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(changed)


def splice(data: bytes, draw: random.Random) -> bytes:
    """Cut a piece out, double it, or put it elsewhere."""
    start, end = sorted(draw.randrange(len(data) + 1) for _ in "ab")
    at = draw.randrange(len(data) + 1)
    return draw.choice(
        (data[:start] + data[end:], data[:end] + data[start:], data[:at] + data[start:end] + data[at:])
    )


def cut(data: bytes, draw: random.Random) -> bytes:
    return draw.choice((data[: draw.randrange(len(data))], data + bytes(draw.randrange(1, 9))))


def length_field(data: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    wrong = draw.choice(
        (length + draw.randint(-9, 9), draw.getrandbits(64), length | 1 << draw.randrange(64))
    )
    return struct.pack("<Q", wrong % 2**64) + data[8:]


def number(data: bytes, draw: random.Random) -> bytes:
    """Change a number of the header: to a notable one, or by a little."""
    header, buffer = split(data)
    found = list(NUMBER.finditer(header))
    if not found:
        return joined(header + b" ", buffer)
    match = draw.choice(found)
    near = b"%d" % (int(match[0]) + draw.choice((-8, -4, -2, -1, 1, 2, 4, 8)))
    return joined(header[: match.start()] + draw.choice((near, *NUMBERS)) + header[match.end() :], buffer)


def swap_numbers(data: bytes, draw: random.Random) -> bytes:
    header, buffer = split(data)
    found = list(NUMBER.finditer(header))
    if len(found) < 2:
        return joined(b" " + header, buffer)
    one, other = sorted(draw.sample(found, 2), key=lambda match: match.start())
    middle = header[one.end() : other.start()]
    return joined(header[: one.start()] + other[0] + middle + one[0] + header[other.end() :], buffer)


def word(data: bytes, draw: random.Random) -> bytes:
    """Put a type, a name or a key of the header in the place of another."""
    header, buffer = split(data)
    found = list(WORD.finditer(header))
    if not found:
        return joined(header, buffer + b"\0")
    match, other = draw.choice(found), draw.choice(found)[0]
    dtype = b'"%s"' % draw.choice((*DTYPES, "F8_E5M2", "U16", "C64", "f32")).encode()
    if draw.random() < 0.5:
        dtypes = [found[i + 1] for i, each in enumerate(found[:-1]) if each[0] == b'"dtype"']
        match, other = (draw.choice(dtypes), dtype) if dtypes else (match, other)
    return joined(header[: match.start()] + other + header[match.end() :], buffer)


def insert(data: bytes, draw: random.Random) -> bytes:
    header, buffer = split(data)
    at = draw.randrange(len(header) + 1)
    return joined(header[:at] + draw.choice(PIECES) + header[at:], buffer)


def rewritten(data: bytes, draw: random.Random) -> bytes:
    """Write the header in another way that means the same, or with an entry moved, shared or gone."""
    header, buffer = split(data)
    try:
        entries = list(json.loads(header).items())
    except (ValueError, AttributeError):  # an earlier change has left no object
        return insert(data, draw)
    draw.shuffle(entries)
    change = draw.randrange(5)
    if change == 0 and entries:
        entries.append(
            (draw.choice(entries)[0], draw.choice(entries)[1])
        )  # under one name twice, when written
        text = "{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in entries) + "}"
        return joined(text.encode(), buffer)
    if change == 1 and entries:
        entries.pop()
    if change == 2:
        entries.append(
            (draw.choice(("__metadata__", "w", "x")), draw.choice(({}, {"a": "b"}, {"a": 1}, [], None, 0)))
        )
    text = json.dumps(dict(entries), ensure_ascii=draw.random() < 0.5, indent=draw.choice((None, None, 1)))
    return joined(text.encode("utf-8", "surrogatepass") + b" " * draw.randrange(9), buffer)


def buffer_byte(data: bytes, draw: random.Random) -> bytes:
    header, buffer = split(data)
    return joined(header, set_byte(buffer, draw)) if buffer else joined(header + b" ", buffer)


CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flip_bit, set_byte, splice, cut, length_field, number, number, number, swap_numbers, swap_numbers),
    *(word, word, insert, insert, rewritten, rewritten, rewritten, buffer_byte),
)


def test_what_we_accept_the_official_library_accepts_with_equal_tensors(campaign: Campaign) -> None:
    draw = random.Random(campaign.seed)
    starts = seeds(draw)
    accepted = ours = neither = 0
    for trial in range(campaign.trials(short=8_000)):
        data = draw.choice(starts)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            data = draw.choice(CHANGES)(data, draw) if data else data
        what = f"seed {campaign.seed}, trial {trial}: {data!r}"
        try:
            loaded, metadata = own.loads(bytearray(data), path="m")
        except FileFormatError:
            try:
                official.load(data)
            except REFUSALS:
                neither += 1
            else:
                ours += 1
            continue
        try:
            expected = official.load(data)
        except SafetensorError as error:
            pytest.fail(f"we accept what the official library refuses ({error}); {what}")
        accepted += 1
        assert loaded.keys() == expected.keys(), what
        for name, tensor in loaded.items():
            other = expected[name]
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), what
            if tensor.numel():  # compared as bytes: NaN is not equal to itself
                one, two = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other))
                assert torch.equal(one, two), what
        stored = json.loads(split(data)[0]).get("__metadata__") or {}
        assert metadata == stored, what
    campaign.counted("accepted by both with equal tensors", accepted)
    campaign.counted("refused by us alone", ours)
    campaign.counted("refused by both", neither)
    assert accepted > (accepted + ours + neither) // 20, "too few get past the header to mean anything"
