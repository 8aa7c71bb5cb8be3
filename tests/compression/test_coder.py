"""What goes into the integer coder comes out again, in hardly more bits than it takes."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from charlm.compression.coder import MOST_TOTAL, Decoder, Encoder

Share = tuple[int, int, int]


@st.composite
def shares(draw: st.DrawFn) -> Share:
    total = draw(st.integers(1, 300) | st.integers(1, MOST_TOTAL))
    start = draw(st.integers(0, total - 1))
    return start, draw(st.integers(1, total - start)), total


def encoded(numbers: list[Share]) -> bytes:
    encoder = Encoder()
    for number in numbers:
        encoder.encode(*number)
    return encoder.finish()


def check(numbers: list[Share]) -> None:
    data = encoded(numbers)
    decoder = Decoder(data)
    for start, size, total in numbers:
        assert start <= decoder.target(total) < start + size
        decoder.take(start, size)
    bits = sum(math.log2(total / size) for _, size, total in numbers)
    # One byte at the end, and what rounding takes: 2 ** -24 of the whole, of a share that may be smaller.
    lost = sum(math.log2(1 + 2**-24 * total / size) for _, size, total in numbers)
    assert 8 * len(data) <= bits + 1.5 * lost + 9


@given(st.lists(shares(), max_size=300))
def test_numbers_come_back_in_hardly_more_bits_than_they_take(numbers: list[Share]) -> None:
    check(numbers)


@given(
    st.lists(
        st.sampled_from([(0, 1, 3), (1, 1, 3), (2, 1, 3), (MOST_TOTAL - 1, 1, MOST_TOTAL)]), max_size=400
    )
)
def test_carries_go_through_bytes_that_are_full(numbers: list[Share]) -> None:
    check(numbers)


def test_a_carry_goes_through_many_full_bytes() -> None:
    """Just below one half, again and again, and then beyond it."""
    encoder = Encoder()
    encoder.encode(1, 2, 4)  # the middle, around one half
    for _ in range(100):
        encoder.encode(127, 2, 256)
    encoder.encode(128, 128, 256)
    numbers = [(1, 2, 4), *[(127, 2, 256)] * 100, (128, 128, 256)]
    assert encoder.finish() == encoded(numbers)
    check(numbers)


def test_nothing_takes_no_bytes() -> None:
    assert encoded([]) == b""
    assert encoded([(0, 5, 5)] * 1_000) == b""
