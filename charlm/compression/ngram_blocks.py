"""Coding of blocks with an n-gram model, as in `blocks.py`, but with many characters in each call of C.

An n-gram model predicts a character in a few microseconds, and Python would take ten times as long. Other
threads can run while C computes, so several blocks are coded at the same time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from charlm.compression.blocks import Alphabet, Escapes, read_unknown
from charlm.compression.coder import Decoder
from charlm.compression.portable import not_finite
from charlm.models.ngram import NGramLM
from charlm.native.library import DecoderStruct
from charlm.native.ngram import NativeNGram

__all__ = ["NGramBlocks"]

_AT_ONCE = 4096  # characters of a call


class NGramBlocks:
    """Codes one block.

    Args:
        kernel: the portable build.
        model: that `engine_maker` accepts.
        first: ids before each block, as before an empty prompt.
    """

    def __init__(self, kernel: ctypes.CDLL, model: NGramLM, first: Sequence[int]) -> None:
        self._kernel, self._first = kernel, list(first)
        self._tables = NativeNGram(kernel, model, 1).tables()
        self._logits = np.empty(model.vocab_size, np.float32)
        self._frequencies = np.empty(model.vocab_size, np.int64)
        self._room = self._logits.ctypes.data, self._frequencies.ctypes.data

    def shares(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """Yield the `charlm.compression.blocks.Shares` of ids (n,)."""
        text = np.concatenate([self._first, ids]).astype(np.int64)
        for start in range(len(self._first), len(text) + 1, _AT_ONCE):
            end = min(start + _AT_ONCE, len(text) + 1)
            made = np.empty((end - start, 3), np.int64)
            places = len(text), start, end, *self._room, made.ctypes.data
            if not self._kernel.charlm_ngram_shares(self._tables, text.ctypes.data, *places):
                raise not_finite()
            yield from zip(*made.T.tolist(), strict=True)

    def decode(self, coded: bytes, length: int, alphabet: Alphabet) -> NDArray[np.uint32]:
        """Return the code points (length,) of a result of `encode_block`."""
        decoder, escapes = Decoder(coded), Escapes(alphabet)
        ids = np.zeros(len(self._first) + length, np.int64)
        ids[: len(self._first)] = self._first
        codes, known, done = np.empty(length, np.uint32), len(self._first), 0
        while done < length:
            struct = DecoderStruct(
                code=decoder.code,
                range=decoder.range,
                bytes=coded,
                size=len(coded),
                at=decoder.at,
                may=escapes.may,
                read=escapes.read,
                escaped=escapes.escaped,
            )
            places = known, known + length - done
            n = self._kernel.charlm_ngram_decode(self._tables, ids.ctypes.data, *places, *self._room, struct)
            if n < 0:
                raise not_finite()
            codes[done : done + n] = alphabet.codes[ids[known : known + n]]
            known, done = known + n, done + n
            decoder.code, decoder.range, decoder.at, escapes.read = (
                struct.code,
                struct.range,
                struct.at,
                struct.read,
            )
            if done < length:
                codes[done] = read_unknown(decoder, escapes, struct.total)
                done += 1
        return codes
