"""The integer coder: numbers with known frequencies to bytes, and back.

It is a range coder (G. N. N. Martin, "Range encoding: an algorithm for removing redundancy from a digitised
message", 1979). The bytes are one long fraction. Each number narrows the range of this fraction to the share
of the number's frequency in the total. All arithmetic is in integers of 64 bits, so both directions compute
exactly the same.
"""

from __future__ import annotations

__all__ = ["MOST_TOTAL", "Decoder", "Encoder"]

MOST_TOTAL = 2**32
"""The largest total of frequencies. The error of a share is less than 2 ** -24 of the whole."""
_TOP, _MASK = 2**56, 2**64 - 1


class Encoder:
    """Encodes numbers.

    Example:
        >>> encoder = Encoder()
        >>> for start, size in [(0, 3), (3, 1), (0, 3)]:  # shares of 3 and 1
        ...     encoder.encode(start, size, 4)
        >>> data = encoder.finish()
        >>> decoder, found = Decoder(data), []
        >>> for _ in range(3):
        ...     found.append(int(decoder.target(4) >= 3))
        ...     decoder.take(*[(0, 3), (3, 1)][found[-1]])
        >>> found, len(data)
        ([0, 1, 0], 1)
    """

    def __init__(self) -> None:
        self._out = bytearray()
        self._low, self._range = 0, _MASK

    def encode(self, start: int, size: int, total: int) -> None:
        """Add the number whose share of `total` begins at `start` and is `size`, 1 or more."""
        unit = self._range // total
        self._low += unit * start
        self._range = unit * size
        if self._low > _MASK:
            self._carry()
        while self._range < _TOP:
            self._out.append(self._low >> 56)
            self._low = self._low << 8 & _MASK
            self._range <<= 8

    def finish(self) -> bytes:
        """Return the bytes: the fewest that identify the range. Zeros follow them implicitly."""
        for count in range(9):
            step = 1 << 64 - 8 * count
            value = -(-self._low // step) * step
            if value < self._low + self._range:
                break
        self._low = value
        if value > _MASK:
            self._carry()
        self._out += self._low.to_bytes(8, "big")[:count]
        return bytes(self._out.rstrip(b"\0"))

    def _carry(self) -> None:
        self._low &= _MASK
        at = len(self._out) - 1
        while self._out[at] == 255:
            self._out[at] = 0
            at -= 1
        self._out[at] += 1


class Decoder:
    """Decodes the numbers of an `Encoder`: `target` returns a place in the next share, `take` moves on.

    Args:
        data: the result of `finish`.
    """

    def __init__(self, data: bytes) -> None:
        self.data: bytes = data
        self.at: int = 8
        """The index of the next byte."""
        self.code: int = int.from_bytes(data[:8].ljust(8, b"\0"), "big")
        self.range: int = _MASK
        self._unit = 1

    def target(self, total: int) -> int:
        """Return a number below `total` that lies in the share of the next number."""
        self._unit = self.range // total
        return min(self.code // self._unit, total - 1)

    def take(self, start: int, size: int) -> None:
        """Move past the number with this share of the total that `target` got."""
        self.code -= self._unit * start
        self.range = self._unit * size
        while self.range < _TOP:
            self.code = self.code << 8 | (self.data[self.at] if self.at < len(self.data) else 0)
            self.at += 1
            self.range <<= 8
