"""What is compressed comes back exactly, in as many bits as the model says, or is refused."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from harness.tiny_models import tiny_config, tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm import BigramLM, BlockDataset, ByteTokenizer, CharLM, CharTokenizer, MixtureLM, NGramLM
from charlm.compression import archive_info, compress, decompress, recover
from charlm.compression import codec as codec_module
from charlm.compression.counted import counted
from charlm.errors import CharLMError, DataError, FileFormatError, InputError, NonFiniteError
from charlm.models.base import LanguageModel
from charlm.native.library import portable_library

needs_kernel = pytest.mark.skipif(
    isinstance(portable_library(), str), reason="compressing with a GPT needs the compiled engine"
)
BOOK = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 30
TOKENIZER = CharTokenizer.from_text(BOOK)
TEXT = b"it was the season of Light, it was the season of Darkness; it was the \xc3\xa4ge of w\xff " * 4


def ngram() -> NGramLM:
    return NGramLM(TOKENIZER.vocab_size).fit(BlockDataset.from_text(BOOK, TOKENIZER, 8))


def gpt() -> LanguageModel:
    return tiny_gpt(tiny_config("cpu-1min", vocab_size=TOKENIZER.vocab_size)).eval()


def mixture() -> MixtureLM:
    model = MixtureLM([gpt(), ngram()])
    with torch.no_grad():
        model.gate.copy_(torch.linspace(-2, 2, model.gate.numel()).view_as(model.gate))
    return model.eval()


def bigram() -> BigramLM:
    return BigramLM(TOKENIZER.vocab_size).fit(BlockDataset.from_text(BOOK, TOKENIZER, 8), smoothing=0)


MODELS: list[Callable[[], LanguageModel]] = [ngram, bigram]
ALL = [*MODELS, *(pytest.param(make, marks=needs_kernel) for make in (gpt, mixture))]
LM = CharLM(ngram(), TOKENIZER)


@pytest.mark.parametrize("make", ALL)
def test_every_kind_of_model_gives_the_text_back(make: Callable[[], LanguageModel]) -> None:
    data = compress(TEXT, CharLM(make(), TOKENIZER))
    assert decompress(data, CharLM(make(), TOKENIZER)) == TEXT
    assert archive_info(data).kind == make().kind


@settings(deadline=None)
@given(st.binary(max_size=300) | st.text(st.characters(exclude_categories=["Cs"])).map(str.encode))
def test_any_bytes_come_back_and_take_few_more(data: bytes) -> None:
    small = compress(data, LM)
    assert decompress(small, LM) == data
    assert len(small) <= len(data) + archive_info(small).header_size


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=30)
def test_a_model_of_bytes_takes_any_bytes(data: bytes) -> None:
    lm = CharLM(BigramLM(256).fit(BlockDataset.from_text(BOOK, ByteTokenizer(), 8)), ByteTokenizer())
    assert decompress(compress(data, lm), lm) == data


def test_every_scalar_value_of_unicode_comes_back() -> None:
    """All as numbers, and some through the coder: `tests/reliability/compression.py` does all."""
    scalars = [code for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    whole = "".join(map(chr, scalars)).encode()
    lm = CharLM(BigramLM(2), CharTokenizer("ab"))
    alphabet = codec_module._alphabet(lm)
    codes = codec_module._codes(whole, alphabet)
    assert codes.tolist() == scalars
    assert codec_module._bytes(codes, alphabet) == whole
    for text in (scalars[::397], [0, 0xD7FF, 0xE000, 0x10FFFF] * 9):
        data = "".join(map(chr, text)).encode()
        small = compress(data, lm)
        assert not any(block.stored for block in archive_info(small).blocks)
        assert decompress(small, lm) == data


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_bigram_model_of_any_type_will_do(dtype: torch.dtype) -> None:
    lm = CharLM(bigram().to(dtype), TOKENIZER)
    assert decompress(compress(TEXT, lm), lm) == TEXT


@pytest.mark.parametrize("data", [b"", b"a", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x00"])
def test_little_comes_back(data: bytes) -> None:
    assert decompress(compress(data, LM), LM) == data


@pytest.mark.parametrize("make", ALL)
def test_it_takes_the_bits_of_the_model_s_own_probabilities(
    make: Callable[[], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_module, "_BLOCK_SIZE", 700)
    text = BOOK[30:2_000] + "tsaw eht fo" * 30
    model = make()
    if model.kind == "bigram":  # one of probability zero takes 30 bits, and not infinitely many
        text = BOOK[:2_000]
    data = compress(text.encode(), CharLM(model, TOKENIZER))
    info, bits = archive_info(data), 0.0
    for start in range(0, len(text), 700):
        bits -= CharLM(model, TOKENIZER).log_probs(text[start : start + 700]).sum() / np.log(2)
    assert bits * 0.999 - 64 < 8 * (len(data) - info.header_size) <= bits * 1.001 + 8 * 64 * len(info.blocks)
    assert not any(block.stored for block in info.blocks)


def test_every_flipped_byte_and_every_truncation_of_a_small_file_is_noticed() -> None:
    data = compress(TEXT, LM)
    for at in range(len(data)):
        damaged = data[:at] + bytes([data[at] ^ (1 + at % 255)]) + data[at + 1 :]
        with pytest.raises(CharLMError):
            decompress(damaged, LM)
        with pytest.raises(FileFormatError):
            decompress(data[:at], LM)
    with pytest.raises(FileFormatError, match="behind the end of the compressed text stand 4 more bytes"):
        decompress(data + b"more", LM)


def test_damage_stays_in_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "_BLOCK_SIZE", 100)
    monkeypatch.setattr(codec_module, "_TOGETHER", 2)
    text = BOOK[::7][:350].encode()
    data = compress(text, LM)
    info = archive_info(data)
    at = info.header_size + info.blocks[0].size + 3
    damaged = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
    with pytest.raises(
        FileFormatError, match="block 2 of 4 is damaged or cut short, with the characters 101 to 200"
    ):
        decompress(damaged, LM)
    assert recover(damaged, LM) == [text[:100], None, text[200:300], text[300:]]
    assert recover(data[:-1], LM)[-1] is None
    assert recover(data, LM) == [text[:100], text[100:200], text[200:300], text[300:]]


def test_blocks_do_not_depend_on_each_other_or_on_how_many_are_decoded_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(codec_module, "_BLOCK_SIZE", 64)
    text = (BOOK[:500] + "äöü").encode()
    data = compress(text, LM)
    for together in (1, 3, 50):
        monkeypatch.setattr(codec_module, "_TOGETHER", together)
        assert decompress(data, LM) == text


def test_a_text_in_other_letters_costs_little_more_than_its_letters() -> None:
    text = "Съешь ещё этих мягких французских булок, да выпей чаю. " * 20
    size = len(compress(text.encode(), LM)) - archive_info(compress(text.encode(), LM)).header_size
    assert size < 0.55 * len(text.encode())


def test_another_model_is_refused_by_name() -> None:
    data = compress(TEXT, LM)
    other = CharLM(NGramLM(TOKENIZER.vocab_size, order=3), TOKENIZER)
    with pytest.raises(
        DataError, match=r"compressed with another model: the ngram model \w{12}…, and this is"
    ):
        decompress(data, other)
    with pytest.raises(DataError, match="a saved ngram model, not with one counted from a text"):
        decompress(data, BOOK)


def test_a_model_is_known_after_it_was_saved(tmp_path: pytest.TempPathFactory) -> None:
    from charlm import load

    LM.save(f"{tmp_path}/model")
    assert decompress(compress(TEXT, LM), load(f"{tmp_path}/model", device="cpu")) == TEXT


def test_a_text_stands_for_the_model_that_is_counted_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = compress(TEXT, BOOK)
    # Elsewhere the discounts that are fitted may come out otherwise: those of the file count.
    monkeypatch.setattr(NGramLM, "fit", lambda *_: pytest.fail("the discounts were fitted again"))
    assert decompress(data, BOOK) == TEXT
    with pytest.raises(DataError, match="counted from a text, and this is the ngram model"):
        decompress(data, BOOK[1:])


def test_settings_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for odd in (b"\x01", b"\x07\x00\x10\x00\x00" + bytes(12), b"\x07\x00\x10\x00\x00abc"):
        monkeypatch.setattr(codec_module, "settings_of", lambda _, odd=odd: odd)
        with pytest.raises(FileFormatError, match="settings of the model"):
            decompress(compress(b"", BOOK), BOOK)


def test_what_the_model_computes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = compress(TEXT, LM)
    changed = counted(BOOK)
    changed.model.load_state_dict(
        {**LM.model.state_dict(), "discounts": LM.model.state_dict()["discounts"] * 0.99}
    )
    monkeypatch.setattr(codec_module, "model_sha256", lambda *_: archive_info(data).model_sha256)
    with pytest.raises((DataError, FileFormatError), match=r"decodes to something else|no text can hold"):
        decompress(data, changed)


def test_a_wrong_sum_of_right_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = compress(TEXT, LM)
    monkeypatch.setattr(codec_module, "read_header", lambda _: _with(data, sha256="00" * 32))
    with pytest.raises(FileFormatError, match="not the one that was compressed"):
        decompress(data, LM)
    monkeypatch.setattr(codec_module, "read_header", lambda _: _with(data, arithmetic=7))
    with pytest.raises(FileFormatError, match="version 7 of the arithmetic, and this charlm has version 1"):
        decompress(data, LM)


def _with(data: bytes, **changes: object) -> object:
    import dataclasses

    return dataclasses.replace(archive_info(data), **changes)  # type: ignore[arg-type]


def test_a_block_of_what_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.array([97, 0xD800, 0x1FFFFF], np.uint32)
    monkeypatch.setattr(codec_module, "_codes", lambda *_: codes)
    monkeypatch.setattr(codec_module, "_bytes", lambda *_: b"a longer text than what was coded")
    data = compress(b"", LM)
    monkeypatch.undo()
    with pytest.raises(FileFormatError, match="what no text can hold"):
        decompress(data, LM)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="data must be bytes"):
        compress("text", LM)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="data must be bytes"):
        decompress(3, LM)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="model must be a CharLM, or a text"):
        compress(b"text", LM.model)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least two characters"):
        compress(b"text", "x")


def test_a_model_whose_numbers_are_none_is_refused() -> None:
    model = BigramLM(2)
    with torch.no_grad():
        model.token_embedding_table.weight[1, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        compress(b"bb", CharLM(model, CharTokenizer("ab")))


def test_progress_is_told_from_beginning_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "_BLOCK_SIZE", 500)
    text = BOOK[:1_700].encode()
    told: list[tuple[int, int]] = []
    data = compress(text, LM, on_progress=lambda *said: told.append(said))
    assert decompress(data, LM, on_progress=lambda *said: told.append(said)) == text
    middle = told.index((1_700, 1_700))
    for some in (told[: middle + 1], told[middle + 1 :]):
        assert [done for done, _ in some] == sorted(done for done, _ in some)
        assert some[-1] == (1_700, 1_700)
        assert len(some) >= 4


def test_checksums_are_zlib_s() -> None:
    info = archive_info(compress(TEXT, LM))
    assert info.blocks[0].text_crc == zlib.crc32(TEXT)
