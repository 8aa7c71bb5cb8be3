"""Every kind of text goes through tokenizers, files and streams unchanged, and is counted as it is."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest
from harness.texts import LONG, TEXTS
from oracles.plain_inspection import plain_entropy_bits, plain_overlap
from oracles.plain_tokenizer import plain_encode

from charlm import ByteTokenizer, CharTokenizer
from charlm.text.corpus import load_corpus
from charlm.text.inspection import SHARED_WIDTH, inspect_text
from charlm.text.streaming import StreamDecoder
from charlm.text.tokenizer import load_tokenizer


def test_every_kind_is_another_text_and_none_of_them_changes() -> None:
    assert len(set(TEXTS.values())) == len(TEXTS)
    assert len(TEXTS["very short"]) == 20
    assert all(500 < len(text) < 5_000 for text in LONG.values())
    assert len(set(TEXTS["chinese-like"])) > 256
    assert max(Counter(TEXTS["large vocabulary"]).values()) == 2
    assert "\n" not in TEXTS["old mac"] + TEXTS["no newline"]
    assert TEXTS["two characters"].startswith("10011111000111111001001000011110")


@pytest.mark.parametrize("kind", TEXTS)
def test_encoding_and_decoding_is_the_identity(kind: str) -> None:
    text = TEXTS[kind]
    for tokenizer, ids in (
        (CharTokenizer.from_text(text), plain_encode(sorted(set(text)), text, "error", None)),
        (ByteTokenizer(), list(text.encode())),
    ):
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode_array(text).tolist() == ids
        assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode_array(text)) == text


@pytest.mark.parametrize("kind", TEXTS)
def test_files_of_texts_and_of_tokenizers_are_read_as_they_were_written(kind: str, tmp_path: Path) -> None:
    text = TEXTS[kind]
    (tmp_path / "text.txt").write_bytes(text.encode())
    assert load_corpus(str(tmp_path / "text.txt")) == text
    for tokenizer in (CharTokenizer.from_text(text), CharTokenizer(text[0]), ByteTokenizer()):
        tokenizer.save(tmp_path / "tokenizer.json")
        again = load_tokenizer(tmp_path / "tokenizer.json")
        assert again == tokenizer
        assert again.encode(text, on_unknown="skip") == tokenizer.encode(text, on_unknown="skip")
        assert again.to_dict() == tokenizer.to_dict()


@pytest.mark.parametrize("kind", TEXTS)
def test_decoding_piece_by_piece_equals_decoding_the_whole(kind: str) -> None:
    text = TEXTS[kind]
    for tokenizer in (CharTokenizer.from_text(text), ByteTokenizer()):
        ids = tokenizer.encode(text)
        for longest in (1, 7):
            draw, at, streamed = random.Random(kind), 0, ""
            decoder = StreamDecoder(tokenizer)
            while at < len(ids):
                end = at + draw.randint(1, longest)
                streamed += decoder.feed(ids[at:end])
                at = end
            assert decoder.finish() == ""
            assert streamed == text


@pytest.mark.parametrize("kind", TEXTS)
def test_an_inspection_counts_what_a_plain_count_says(kind: str) -> None:
    text = TEXTS[kind]
    report = inspect_text(text)
    assert (report.n_chars, report.n_bytes) == (len(text), len(text.encode()))
    assert dict(report.counts) == Counter(text)
    ends = Counter(re.findall(r"\r\n|\n|\r", text))
    assert (report.lf, report.crlf, report.cr) == (ends["\n"], ends["\r\n"], ends["\r"])
    assert report.n_lines == ends.total() + (not text.endswith(("\n", "\r")))
    assert report.has_bom == (kind == "byte order mark")
    for order, bits in enumerate(report.entropy_bits):
        assert bits == pytest.approx(plain_entropy_bits(text, order), abs=1e-9)
    train, val = text[: report.train_chars], text[report.train_chars :]
    assert len(train) == int(0.9 * len(text))
    assert report.only_in_val == "".join(sorted(set(val) - set(train)))


@pytest.mark.parametrize("kind", LONG)
def test_an_inspection_finds_the_shared_text_that_comparing_all_runs_finds(kind: str) -> None:
    text = LONG[kind][:600]
    report = inspect_text(text, val_fraction=0.25)
    train, val = text[: report.train_chars], text[report.train_chars :]
    covered, longest = plain_overlap([ord(c) for c in val], [ord(c) for c in train], SHARED_WIDTH)
    assert (report.shared_chars, report.longest_shared) == (covered, "".join(map(chr, longest)))
