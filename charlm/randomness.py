"""Random numbers: each one has an address.

No stream of random numbers is shared. Each use derives a seed from its address, `(seed, stream, step, ...)`,
so skipping, repeating or reordering one use never changes another. Therefore a resumed run is equal to one
that never stopped. The idea is the counter-based generator of Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3" (SC 2011), here with a hash of the standard library in place of Philox.
"""

from __future__ import annotations

import hashlib
import operator
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["derive_seed", "uniforms"]


def derive_seed(seed: int, *address: str | int) -> int:
    """Return the seed for one address, a number in [0, 2**63).

    Args:
        seed: the user's seed, any integer.
        address: names and counters, for example `"data", step, micro_batch`.

    Returns:
        A number that depends on every part of the address and on its order, the same on every machine.

    Example:
        >>> derive_seed(1337, "data", 0) == derive_seed(1337, "data", 0)
        True
        >>> derive_seed(1337, "data", 0) == derive_seed(1337, "data", 1)
        False
    """
    digest = _hash_of(seed, *address).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(seed: int, rows: Sequence[int], positions: int | Sequence[int]) -> NDArray[np.float64]:
    """Return one uniform number in [0, 1) for each row, at its position.

    Args:
        seed: the seed of the whole generation.
        rows: the address of each row, (B,).
        positions: absolute position of the token to be drawn, one for all rows or (B,).

    Returns:
        (B,) float64 with 53 random bits each. A row's number depends only on `seed`, its entry in `rows` and
        its position, not on the number of rows.
    """
    start = _hash_of(seed, "sample")
    numbers = np.empty(len(rows), dtype=np.float64)
    places = [positions] * len(rows) if isinstance(positions, int) else positions
    for i, (row, position) in enumerate(zip(rows, places, strict=True)):
        state = start.copy()
        state.update(struct.pack("<qq", row, position))
        numbers[i] = (int.from_bytes(state.digest(), "little") >> 11) * 2.0**-53
    return numbers


def _hash_of(seed: int, *address: str | int) -> hashlib.blake2b:
    state = hashlib.blake2b(digest_size=8)
    for part in (seed, *address):
        # repr keeps 1 and "1" apart; index makes numpy's integers Python's
        encoded = repr(part if isinstance(part, str) else operator.index(part)).encode()
        state.update(struct.pack("<I", len(encoded)) + encoded)
    return state
