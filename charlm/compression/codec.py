"""`compress` and `decompress`: bytes in memory, with a model or with a text from which one is counted.

Bytes are decoded as UTF-8. Invalid bytes count as unknown characters, so any bytes can be compressed. Blocks
are independent: each begins like an empty prompt.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from charlm.compression.archive import ArchiveInfo, BlockInfo, block_of, read_header, write_header
from charlm.compression.blocks import Alphabet, decode_blocks, encode_block, shares_of
from charlm.compression.counted import count_anew, counted, settings_of
from charlm.compression.ngram_blocks import NGramBlocks
from charlm.compression.portable import ARITHMETIC
from charlm.compression.predictor import begun, engine_maker, model_sha256
from charlm.errors import DataError, FileFormatError, InputError, shown
from charlm.lm import CharLM
from charlm.models.ngram import NGramLM
from charlm.native.library import portable_library
from charlm.text.streaming import start_ids
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer

__all__ = ["compress", "decompress", "recover"]

Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")

_BLOCK_SIZE = 2**14  # characters
_TOGETHER = 32  # blocks that are decoded at once, and no more than have so many probabilities
_NUMBERS = 2**21


def compress(data: bytes, model: CharLM | str, *, on_progress: Progress | None = None) -> bytes:
    """Compress bytes: best a text in UTF-8 that is similar to the model's training text.

    Args:
        data: any bytes.
        model: a GPT, an n-gram model, a mixture of these or a bigram model; or a text, from which an n-gram
            model is counted. Decompression needs the same.
        on_progress: called with the number of characters that are done, and of all.

    Returns:
        Fewer bytes, if the model predicts the text. A block that would become larger is stored as it is.

    Raises:
        InputError: an argument is wrong, or the model's results are not the same on every machine.
        NonFiniteError: the model returns NaN or infinity.

    Example:
        >>> from charlm.compression import compress, decompress
        >>> book = "It was the best of times, it was the worst of times, " * 20
        >>> data = b"it was the age of wisdom, it was the age of foolishness"
        >>> len(data) > len(compress(data, book)) - len(compress(b"", book))  # but for the header
        True
        >>> decompress(compress(data, book), book) == data
        True
    """
    data = _checked(data)
    lm = _of(model)
    alphabet = _alphabet(lm)
    codes = _codes(data, alphabet)
    coded, blocks = [], []
    pieces = [codes[start : start + _BLOCK_SIZE] for start in range(0, len(codes), _BLOCK_SIZE)]
    for some, block in zip(pieces, _encoded(lm, pieces, alphabet, on_progress), strict=True):
        text = _bytes(some, alphabet)
        stored = len(block) >= len(text)
        made = text if stored else block
        blocks.append(BlockInfo(len(made), stored, zlib.crc32(made), zlib.crc32(text)))
        coded.append(made)
    _teller(on_progress, len(codes), len(codes))(0)
    info = ArchiveInfo(
        arithmetic=ARITHMETIC,
        kind=lm.model.kind,
        model_sha256=model_sha256(lm.model, lm.tokenizer),
        block_size=_BLOCK_SIZE,
        length=len(codes),
        n_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        settings=settings_of(lm.model) if isinstance(model, str) and isinstance(lm.model, NGramLM) else b"",
        blocks=tuple(blocks),
    )
    return b"".join([write_header(info), *coded])


def decompress(data: bytes, model: CharLM | str, *, on_progress: Progress | None = None) -> bytes:
    """Return exactly the bytes that were compressed, or raise an error.

    Args:
        data: the result of `compress`.
        model: the same as for `compress`.
        on_progress: called with the number of characters that are done, and of all.

    Raises:
        FileFormatError: the data is damaged or incomplete, or from another version of charlm.
        DataError: the model is another one, or computes other numbers on this machine.
        InputError: an argument is wrong, or the model's results are not the same on every machine.

    Example:
        >>> from charlm.compression import compress, decompress
        >>> decompress(compress(b"so far, so good", "so far, so good" * 9), "so far, so good" * 9)
        b'so far, so good'
    """
    data = _checked(data)
    info = read_header(data)
    found = recover(data, model, on_progress=on_progress)
    whole: list[bytes] = []
    for number, block in enumerate(found):
        if block is None:
            lost = f"{number * info.block_size + 1:,} to {min((number + 1) * info.block_size, info.length):,}"
            raise FileFormatError(
                f"block {number + 1} of {len(found)} is damaged or cut short, with the characters {lost} of "
                "the text; the others can be recovered"
            )
        whole.append(block)
    if len(data) > info.size:
        raise FileFormatError(
            f"behind the end of the compressed text stand {len(data) - info.size:,} more bytes"
        )
    text = b"".join(whole)
    if len(text) != info.n_bytes or hashlib.sha256(text).hexdigest() != info.sha256:
        raise FileFormatError("the text is not the one that was compressed, though its parts are whole")
    return text


def recover(data: bytes, model: CharLM | str, *, on_progress: Progress | None = None) -> list[bytes | None]:
    """Return the blocks of damaged data that can be decompressed, and None for each of the others.

    Args:
        data: a result of `compress` that is damaged after its header.
        model: as for `decompress`.
        on_progress: as for `decompress`.

    Raises:
        FileFormatError: the header is damaged, or from another version of charlm.
        DataError: as for `decompress`.
        InputError: as for `decompress`.

    Example:
        >>> from charlm.compression import compress, recover
        >>> data = compress(b"so far, so good", "so far, so good" * 9)
        >>> recover(data, "so far, so good" * 9), recover(data[:-1], "so far, so good" * 9)
        ([b'so far, so good'], [None])
    """
    data = _checked(data)
    info = read_header(data)
    if info.arithmetic != ARITHMETIC:
        raise FileFormatError(
            f"the file was made with version {info.arithmetic} of the arithmetic, and this charlm has "
            f"version {ARITHMETIC}: use the charlm that made it"
        )
    lm = _of(model, info)
    if (own := model_sha256(lm.model, lm.tokenizer)) != info.model_sha256:
        raise DataError(
            f"the text was compressed with another model: the {info.kind} model {info.model_sha256[:12]}…, "
            f"{'counted from a text, ' if info.settings else ''}and this is the {lm.model.kind} model "
            f"{own[:12]}…"
        )
    texts = [block_of(data, info, number) for number in range(len(info.blocks))]
    left = [n for n, text in enumerate(texts) if text is not None and not info.blocks[n].stored]
    alphabet = _alphabet(lm)
    lengths = [min(info.block_size, info.length - n * info.block_size) for n in left]
    decoded = _decoded(lm, [texts[n] or b"" for n in left], lengths, alphabet, on_progress)
    for n, codes in zip(left, decoded, strict=True):
        try:
            texts[n] = _bytes(codes, alphabet)
        except UnicodeError as error:
            raise FileFormatError("a block holds what no text can hold") from error
    for n, found in enumerate(texts):
        if found is not None and zlib.crc32(found) != info.blocks[n].text_crc:
            raise DataError(
                f"block {n + 1} decodes to something else than was compressed: the model computes other "
                "numbers on this machine"
            )
    _teller(on_progress, info.length, info.length)(0)
    return texts


def _encoded(
    lm: CharLM, pieces: list[NDArray[np.uint32]], alphabet: Alphabet, on_progress: Progress | None
) -> Iterator[bytes]:
    """Yield each piece of a text as a block."""
    make, first = engine_maker(lm.model), start_ids(lm.tokenizer)
    total = sum(map(len, pieces))
    quick = _ngram_blocks(lm)
    if quick is not None:
        tell = _teller(on_progress, 0, total, times=_BLOCK_SIZE)
        yield from _side_by_side(
            lambda some: encode_block(quick().shares, some, alphabet, lambda done: None), pieces, tell
        )
        return
    for number, some in enumerate(pieces):
        tell = _teller(on_progress, number * _BLOCK_SIZE, total)
        state = begun(make, first)
        yield encode_block(partial(shares_of, state), some, alphabet, tell)


def _decoded(
    lm: CharLM, coded: list[bytes], lengths: list[int], alphabet: Alphabet, on_progress: Progress | None
) -> Iterator[NDArray[np.uint32]]:
    """Yield the code points of each block."""
    make, first = engine_maker(lm.model), start_ids(lm.tokenizer)
    total = sum(lengths)
    quick = _ngram_blocks(lm)
    if quick is not None:
        tell = _teller(on_progress, 0, total, times=max(lengths, default=0))
        blocks = list(zip(coded, lengths, strict=True))
        yield from _side_by_side(lambda block: quick().decode(*block, alphabet), blocks, tell)
        return
    some = max(min(_TOGETHER, _NUMBERS // lm.model.vocab_size), 1)
    for at in range(0, len(coded), some):
        tell = _teller(on_progress, sum(lengths[:at]), total, times=len(coded[at : at + some]))
        state = begun(make, first, len(coded[at : at + some]))
        yield from decode_blocks(state, coded[at : at + some], lengths[at : at + some], alphabet, tell)


def _side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], tell: Callable[[int], None]
) -> Iterator[Result]:
    """Yield the result of each item in order, computed by as many threads as PyTorch uses.

    Args:
        work: returns the result of an item.
        items: any number of items.
        tell: called with the number of items that are done.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        try:
            for number, result in enumerate(pool.map(work, items)):
                tell(number)
                yield result
        finally:  # after an error or Ctrl-C nothing else begins
            pool.shutdown(cancel_futures=True)


def _ngram_blocks(lm: CharLM) -> Callable[[], NGramBlocks] | None:
    """Return the coder of blocks in C, or None without a compiler and for models that are no n-gram model."""
    kernel, model = portable_library(), lm.model
    if isinstance(kernel, str) or not isinstance(model, NGramLM):
        return None
    return lambda: NGramBlocks(kernel, model, start_ids(lm.tokenizer))


def _checked(data: object) -> bytes:
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InputError(f"data must be bytes, got {shown(data)}")
    return bytes(data)


def _of(model: CharLM | str, info: ArchiveInfo | None = None) -> CharLM:
    """Return a model, counted if a text was given; `info` is the header for decompression."""
    if isinstance(model, str):
        if info is None:
            return counted(model)
        if not info.settings:
            raise DataError(
                f"the text was compressed with a saved {info.kind} model, not with one counted from a text"
            )
        return count_anew(model, info.settings)
    if not isinstance(model, CharLM):
        raise InputError(f"model must be a CharLM, or a text to count one from, got {shown(model)}")
    return model


def _alphabet(lm: CharLM) -> Alphabet:
    if isinstance(lm.tokenizer, ByteTokenizer):
        return Alphabet(np.arange(256, dtype=np.uint32), complete=True)
    if isinstance(lm.tokenizer, CharTokenizer):
        return Alphabet(np.array([ord(c) for c in lm.tokenizer.vocab], np.uint32), complete=False)
    raise InputError(f"to compress takes one of charlm's tokenizers, and the model has {lm.tokenizer!r}")


def _codes(data: bytes, alphabet: Alphabet) -> NDArray[np.uint32]:
    """Return the characters of a text, or its bytes, as numbers."""
    if alphabet.complete:
        return np.frombuffer(data, np.uint8).astype(np.uint32)
    text = data.decode("utf-8", "surrogateescape")
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32)


def _bytes(codes: NDArray[np.uint32], alphabet: Alphabet) -> bytes:
    if alphabet.complete:
        return codes.astype(np.uint8).tobytes()
    text = codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    return text.encode("utf-8", "surrogateescape")


def _teller(on_progress: Progress | None, before: int, total: int, times: int = 1) -> Callable[[int], None]:
    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress(min(before + times * done, total), total)

    return tell
