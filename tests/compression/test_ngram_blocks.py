"""Blocks that are coded in C are those that Python codes, byte for byte, with any number of threads."""

from __future__ import annotations

import ctypes
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm import CharLM, CharTokenizer, NGramLM
from charlm.compression import compress, decompress
from charlm.compression.blocks import Alphabet, decode_blocks, encode_block, shares_of
from charlm.compression.counted import counted
from charlm.compression.ngram_blocks import NGramBlocks
from charlm.compression.plain_ngram import PlainNGram
from charlm.compression.predictor import begun
from charlm.errors import NonFiniteError
from charlm.native import library as native
from charlm.native.ngram import NativeNGram
from charlm.testing import tiny_corpus

KERNEL = native.portable_library()
pytestmark = pytest.mark.skipif(isinstance(KERNEL, str), reason="the machine has no compiler that will do")
TEXT = tiny_corpus(3_000)


def kernel() -> ctypes.CDLL:
    assert not isinstance(KERNEL, str)
    return KERNEL


def quiet(done: int) -> None:
    """Take no notice of progress."""


def model_of(text: str, order: int, window: int) -> tuple[NGramLM, Alphabet]:
    tokenizer = CharTokenizer.from_text(text)
    model = NGramLM(tokenizer.vocab_size, order, window)
    model._store(np.array(tokenizer.encode(text), np.int64), model.discounts, model.window_shares)
    alphabet = Alphabet(np.array([ord(c) for c in tokenizer.vocab], np.uint32), complete=False)
    return model, alphabet


@given(
    st.text(st.sampled_from("abcd \n") | st.characters(exclude_categories=["Cs"]), max_size=120),
    st.integers(1, 5),
    st.sampled_from([0, 3, 200]),
    st.booleans(),
)
def test_c_and_python_make_the_same_block_and_read_it(
    text: str, order: int, window: int, plain: bool
) -> None:
    model, alphabet = model_of("abracadabra a bad cab\n" * 3, order, window)
    codes = np.array([ord(c) for c in text], np.uint32)
    quick = NGramBlocks(kernel(), model, [1])
    make = (
        (lambda rows: PlainNGram(model, rows)) if plain else (lambda rows: NativeNGram(kernel(), model, rows))
    )
    coded = encode_block(quick.shares, codes, alphabet, quiet)
    assert coded == encode_block(partial(shares_of, begun(make, [1])), codes, alphabet, quiet)
    assert quick.decode(coded, len(codes), alphabet).tolist() == codes.tolist()
    (slow,) = decode_blocks(begun(make, [1]), [coded], [len(codes)], alphabet, quiet)
    assert slow.tolist() == codes.tolist()


def test_an_alphabet_that_is_complete_has_no_share_for_the_unknown() -> None:
    model = NGramLM(256, 3)
    model._store(
        np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64), model.discounts, model.window_shares
    )
    alphabet = Alphabet(np.arange(256, dtype=np.uint32), complete=True)
    codes = np.arange(600, dtype=np.uint32) * 37 % 256
    quick = NGramBlocks(kernel(), model, [10])
    coded = encode_block(quick.shares, codes, alphabet, quiet)
    assert quick.decode(coded, len(codes), alphabet).tolist() == codes.tolist()
    # Bytes that no encoder made are decoded to something, and end.
    assert len(quick.decode(b"\xff" * 300, 500, alphabet)) == 500


def test_blocks_of_many_calls_are_whole() -> None:
    model, alphabet = model_of(TEXT, 4, 100)
    codes = np.array([ord(c) for c in (TEXT * 4)[:10_000] + "ж" + TEXT], np.uint32)
    quick = NGramBlocks(kernel(), model, [1])
    coded = encode_block(quick.shares, codes, alphabet, quiet)
    assert coded == encode_block(
        partial(shares_of, begun(lambda rows: NativeNGram(kernel(), model, rows), [1])),
        codes,
        alphabet,
        quiet,
    )
    assert quick.decode(coded, len(codes), alphabet).tolist() == codes.tolist()


def test_a_model_without_probabilities_is_refused() -> None:
    model, alphabet = model_of("abracadabra", 3, 0)
    model.discounts.fill_(float("nan"))
    quick = NGramBlocks(kernel(), model, [1])
    with pytest.raises(NonFiniteError):
        encode_block(quick.shares, alphabet.codes, alphabet, quiet)
    with pytest.raises(NonFiniteError):
        quick.decode(b"abc", 3, alphabet)


def note(told: list[tuple[int, int]], done: int, total: int) -> None:
    told.append((done, total))


def test_any_number_of_threads_makes_the_same_file_and_tells_the_same() -> None:
    data = (TEXT * 25).encode()
    lm: CharLM = counted(TEXT)
    made, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            told: list[tuple[int, int]] = []
            made.append(compress(data, lm, on_progress=partial(note, told)))
            assert told == sorted(told)
            assert told[-1] == (len(data), len(data))
            assert len(told) > 4
            assert decompress(made[-1], lm) == data
    finally:
        torch.set_num_threads(threads)
    assert made[0] == made[1]
