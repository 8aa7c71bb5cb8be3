"""Encoding of one block with a model's predictions, and decoding of several blocks at once.

An unknown character is encoded as an escape: a number after the model's ids, whose share is that of unknown
characters so far. The 21 bits of its code point follow, each with its share so far after the same earlier
bits. The model does not see unknown characters; its context continues without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from charlm.compression.coder import Decoder, Encoder
from charlm.compression.portable import MOST_FREQUENCY, frequencies

if TYPE_CHECKING:
    from charlm.generation.state import PredictionState

__all__ = ["Alphabet", "Escapes", "decode_blocks", "encode_block", "read_unknown", "shares_of"]

# Ids that are predicted together, and no more than have so many probabilities.
_AT_ONCE, _NUMBERS = 1024, 2**21
_BITS = 21  # of a code point


class Alphabet:
    """The code point of each id.

    Args:
        codes: (V,) in the order of the ids.
        complete: whether there are no other code points, as for bytes.
    """

    def __init__(self, codes: NDArray[np.uint32], *, complete: bool) -> None:
        self.codes: NDArray[np.uint32] = codes
        self.complete: bool = complete
        self._order = np.argsort(codes)
        self._sorted = codes[self._order]

    def ids(self, codes: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return the ids of code points, V for one that is unknown."""
        at = np.minimum(np.searchsorted(self._sorted, codes), len(self._sorted) - 1)
        return np.where(self._sorted[at] == codes, self._order[at], len(self.codes))


class Escapes:
    """Statistics of the unknown characters of a block, the same in both directions."""

    def __init__(self, alphabet: Alphabet) -> None:
        self.may: bool = not alphabet.complete
        self.read: int = 0
        """Characters so far."""
        self.escaped: int = 0
        """Unknown characters so far."""
        self._seen: dict[int, list[int]] = {}

    def share(self) -> int:
        """Return the frequency of an unknown character, in addition to those of the known ones."""
        return self.may * (1 + MOST_FREQUENCY * self.escaped // (self.read + 1))

    def count(self, *, escaped: bool) -> None:
        """Count one more character, and whether it was unknown."""
        self.read += 1
        self.escaped += escaped

    def bits(self, step: Callable[[int, int], bool]) -> int:
        """Process the bits of a code point; `step` gets the counts of 0 and 1 so far and returns the bit."""
        prefix = 1
        for _ in range(_BITS):
            seen = self._seen.setdefault(prefix, [1, 1])
            bit = step(*seen)
            seen[bit] += 2
            prefix = 2 * prefix + bit
        return prefix - (1 << _BITS)


Shares = Callable[[NDArray[np.int64]], Iterator[tuple[int, int, int]]]
"""Yields the beginning of each id's share, its size, and the total; finally the total of the next id."""


def encode_block(
    shares: Shares, codes: NDArray[np.uint32], alphabet: Alphabet, on_progress: Callable[[int], None]
) -> bytes:
    """Return the coded characters.

    Args:
        shares: of a model at the beginning of a block.
        codes: (n,) their code points.
        alphabet: the model's.
        on_progress: called with the number of characters that are done.
    """
    encoder, escapes = Encoder(), Escapes(alphabet)
    ids, V = alphabet.ids(codes), len(alphabet.codes)
    rows = shares(ids[ids < V])
    row: tuple[int, int, int] | None = None
    for number, (i, code) in enumerate(zip(ids.tolist(), codes.tolist(), strict=True)):
        start, size, total = row = row or next(rows)
        escape = escapes.share()
        if i < V:
            encoder.encode(start, size, total + escape)
            row = None
        else:
            encoder.encode(total, escape, total + escape)
            left = iter(f"{code:0{_BITS}b}")

            def write(zeros: int, ones: int, left: Iterator[str] = left) -> bool:
                bit = next(left) == "1"
                encoder.encode(zeros if bit else 0, ones if bit else zeros, zeros + ones)
                return bit

            escapes.bits(write)
        escapes.count(escaped=i == V)
        if number % _AT_ONCE == 0:
            on_progress(number)
    return encoder.finish()


def shares_of(state: PredictionState, ids: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Yield the `Shares` of ids (n,) by a state of one row at the beginning of a block."""
    some = max(min(_AT_ONCE, _NUMBERS // state.vocab_size), 1)
    for first in range(0, len(ids), some):
        chunk = ids[first : first + some]
        logits = state.verify(torch.from_numpy(chunk))[:-1]
        state.observe(torch.from_numpy(chunk)[None])
        found = frequencies(logits.double().numpy())
        ends = found.cumsum(axis=1)
        at = np.arange(len(chunk)), chunk
        sizes = found[at]
        yield from zip((ends[at] - sizes).tolist(), sizes.tolist(), ends[:, -1].tolist(), strict=True)
    yield 0, 0, int(frequencies(state.predict().double().numpy()).sum())


def decode_blocks(
    state: PredictionState,
    coded: Sequence[bytes],
    lengths: Sequence[int],
    alphabet: Alphabet,
    on_progress: Callable[[int], None],
) -> list[NDArray[np.uint32]]:
    """Return the code points of several blocks.

    Args:
        state: with a row for each block, all at the beginning.
        coded: (B,) results of `encode_block`.
        lengths: (B,) characters of each block.
        alphabet: the model's.
        on_progress: called with the number of characters of the first block that are done.
    """
    texts: list[list[int]] = [[] for _ in coded]
    decoders, known = [Decoder(data) for data in coded], alphabet.codes.tolist()
    escapes = [Escapes(alphabet) for _ in coded]
    active = list(range(len(coded)))  # the rows of the state
    while active:
        found = frequencies(state.predict().double().numpy())
        ends = found.cumsum(axis=1)
        chosen: list[int | None] = []
        for row, b in enumerate(active):
            i = _next(decoders[b], escapes[b], ends[row], texts[b], lengths[b])
            if i is not None:
                decoders[b].take(int(ends[row, i] - found[row, i]), int(found[row, i]))
                texts[b].append(known[i])
            chosen.append(i if len(texts[b]) < lengths[b] else None)
        if None in chosen:
            going = [row for row, i in enumerate(chosen) if i is not None]
            active = [active[row] for row in going]
            if active:
                state = state.fork(going)
        if active:
            state.observe(torch.tensor([i for i in chosen if i is not None]))
        on_progress(len(texts[0]))
    return [np.array(text, np.uint32) for text in texts]


def _next(
    decoder: Decoder, escapes: Escapes, ends: NDArray[np.int64], text: list[int], length: int
) -> int | None:
    """Append unknown characters to a text up to the next known one; return its id, or None at the end."""
    total = int(ends[-1])
    while len(text) < length:
        target = decoder.target(total + escapes.share())
        if target < total:
            escapes.count(escaped=False)
            return int(ends.searchsorted(target, side="right"))
        text.append(read_unknown(decoder, escapes, total))
    return None


def read_unknown(decoder: Decoder, escapes: Escapes, total: int) -> int:
    """Return the code point of the next character, which is unknown.

    Args:
        decoder: of the block.
        escapes: of the block.
        total: of the frequencies of the known characters.
    """
    escape = escapes.share()
    decoder.target(total + escape)
    decoder.take(total, escape)
    escapes.count(escaped=True)

    def read(zeros: int, ones: int) -> bool:
        bit = decoder.target(zeros + ones) >= zeros
        decoder.take(zeros if bit else 0, ones if bit else zeros)
        return bit

    return escapes.bits(read)
