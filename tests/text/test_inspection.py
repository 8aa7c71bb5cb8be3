"""What `inspect_text` counts of a text."""

from __future__ import annotations

import math
import re
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracles.plain_inspection import plain_entropy_bits, plain_overlap

from charlm import CharTokenizer
from charlm.errors import InputError, InvalidTextError
from charlm.testing import tiny_corpus
from charlm.text import inspection
from charlm.text.inspection import SHARED_WIDTH, TextReport, inspect_text, remarks

texts = st.text(st.sampled_from("ab \n\r\x00\ufeffé漢😀א\u202e")) | st.text()


@given(texts)
def test_every_character_byte_and_line_is_counted(text: str) -> None:
    report = inspect_text(text)
    assert report.n_chars == len(text)
    assert report.n_bytes == len(text.encode())
    assert dict(report.counts) == Counter(text)
    assert list(report.counts) == sorted(set(text))
    ends = Counter(re.findall(r"\r\n|\n|\r", text))
    assert (report.lf, report.crlf, report.cr) == (ends["\n"], ends["\r\n"], ends["\r"])
    lines = re.split(r"\r\n|\n|\r", text)
    assert report.n_lines == len(lines) - (not lines[-1])
    assert report.has_bom == text.startswith("\ufeff")


@given(st.text(st.sampled_from("ab漢")) | st.text())
def test_entropies_are_those_of_the_definition(text: str) -> None:
    report = inspect_text(text)
    for order, bits in enumerate(report.entropy_bits):
        wanted = plain_entropy_bits(text, order)
        assert bits == pytest.approx(wanted, abs=1e-12) if wanted is not None else bits is None
    assert report.entropy_chars == len(text)


def test_entropies_of_known_texts() -> None:
    assert inspect_text("ab" * 500).entropy_bits == (1.0, 0.0, 0.0)
    assert inspect_text("aaaa").entropy_bits == (0.0, 0.0, 0.0)
    assert inspect_text("a").entropy_bits == (0.0, None, None)
    assert inspect_text("").entropy_bits == (None, None, None)
    assert inspect_text("abcd").entropy_bits[0] == 2.0
    many_characters = "".join(map(chr, [*range(0, 0xD800, 16), *range(0xE000, 0x110000, 16)]))
    bits = inspect_text(many_characters).entropy_bits[0]
    assert bits == pytest.approx(math.log2(len(many_characters)))


@example("ab" * 500, 0.07)
@given(st.text(st.sampled_from("ab"), min_size=1), st.sampled_from([0, 0.07, 0.1, 0.25, 0.5, 0.9]))
def test_the_split_is_that_of_training(text: str, val_fraction: float) -> None:
    report = inspect_text(text, val_fraction=val_fraction)
    assert report.train_chars == math.floor((1 - Fraction(str(val_fraction))) * len(text))
    assert report.train_chars + report.val_chars == len(text)
    train, val = text[: report.train_chars], text[report.train_chars :]
    assert report.only_in_val == "".join(sorted(set(val) - set(train)))


@given(st.lists(st.sampled_from(["a\n" * 30, "b" * 49, "c" * 50, "abcd " * 12, "\n", "漢字\n"]), max_size=12))
def test_shared_text_is_found_with_its_lines(parts: list[str]) -> None:
    text = "".join(parts)
    report = inspect_text(text, val_fraction=0.5)
    train, val = text[: report.train_chars], text[report.train_chars :]
    id_of = {c: i for i, c in enumerate(sorted(set(text)))}
    wanted = plain_overlap([id_of[c] for c in val], [id_of[c] for c in train], SHARED_WIDTH)
    assert (report.shared_chars, [id_of[c] for c in report.longest_shared]) == wanted
    assert report.shared == pytest.approx(report.shared_chars / max(len(val), 1))
    if report.longest_shared:
        assert report.longest_shared_lines == (
            1 + text[: len(train) + val.index(report.longest_shared)].count("\n"),
            1 + text[: text.index(report.longest_shared)].count("\n"),
        )
    else:
        assert report.longest_shared_lines is None


def test_a_run_over_the_cut_is_not_shared() -> None:
    report = inspect_text("xyz" + "".join(map(chr, range(200, 300))), val_fraction=0.5)
    assert (report.shared_chars, report.longest_shared) == (0, "")


def test_rare_and_invisible_characters_are_listed() -> None:
    text = "aaaaaaaaaab\t\r\n c\x00\x00\xa0\u200b\ufffdé" + "d" * 9
    report = inspect_text(text)
    assert "a" not in report.rare
    assert list(report.rare.items())[-2:] == [("\x00", 2), ("d", 9)]
    assert list(report.rare)[:-2] == sorted("b\t\r\n c\xa0\u200b\ufffdé")
    assert report.invisible == {"\x00": 2, "\xa0": 1, "\u200b": 1, "\ufffd": 1}


def test_long_texts_are_looked_at_in_part_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    text = tiny_corpus(3_000)
    whole = inspect_text(text, val_fraction=0.5)
    assert (whole.entropy_chars, whole.compared_chars) == (3_000, 1_500)
    monkeypatch.setattr(inspection, "_MOST_IN_ENTROPY", 1_000)
    monkeypatch.setattr(inspection, "_MOST_COMPARED", 700)
    monkeypatch.setattr(inspection, "_STRETCH", 64)
    part = inspect_text(text, val_fraction=0.5)
    assert (part.entropy_chars, part.compared_chars) == (1_000, 700)
    assert part.entropy_bits == inspect_text(text[:1_000]).entropy_bits
    assert part.shared_chars == inspect_text(text[:2_200], val_fraction=700 / 2_200).shared_chars
    assert part.counts == whole.counts


def test_tiny_shakespeare_has_two_rare_characters_and_shares_nothing(shakespeare: str) -> None:
    report = inspect_text(shakespeare)
    assert (report.n_chars, report.n_lines, report.vocab_size) == (1_115_394, 40_000, 65)
    assert report.rare == {"$": 1, "&": 3}
    assert report.invisible == {}
    assert report.entropy_bits == pytest.approx((4.7794, 3.5383, 2.7520), abs=1e-4)
    assert (report.train_chars, report.val_chars) == (1_003_854, 111_540)
    assert report.shared_chars == 0
    assert report.counts == {c: shakespeare.count(c) for c in CharTokenizer.from_text(shakespeare).vocab}


@pytest.mark.parametrize("val_fraction", [-0.1, 1, 1.5, math.nan, "0.1"])
def test_a_fraction_that_is_none_is_refused(val_fraction: float) -> None:
    with pytest.raises(InputError, match="val_fraction must be at least 0 and below 1, got "):
        inspect_text("abc", val_fraction=val_fraction)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="text must be a str, got bytes"):
        inspect_text(b"abc")  # type: ignore[arg-type]
    with pytest.raises(InvalidTextError, match="lone surrogate U\\+D800"):
        inspect_text("abc\ud800")


def test_a_report_is_frozen() -> None:
    report = inspect_text("abc")
    assert isinstance(report, TextReport)
    with pytest.raises(AttributeError):
        report.n_chars = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        report.counts["a"] = 2  # type: ignore[index]


@given(texts, st.floats(0, 0.99))
def test_remarks_agree_with_the_report(text: str, val_fraction: float) -> None:
    """On text too short for a run that counts as shared."""
    report = inspect_text(text[:40], val_fraction=val_fraction)
    found = " ".join(remarks(text[:40], report.vocab_size, val_fraction=val_fraction))
    assert ("byte order mark" in found) == report.has_bom
    assert ("line ends" in found) == ((report.lf > 0) + (report.crlf > 0) + (report.cr > 0) > 1)
    assert "stands in" not in found


def test_validation_that_repeats_the_training_text_is_remarked_on() -> None:
    new, old = tiny_corpus(40_000, seed=1), tiny_corpus(40_000, seed=2)
    for repeated, told in ((0, False), (1_000, True), (4_000, True)):
        text = old[:36_000] + new[: 4_000 - repeated] + old[:repeated]
        found = remarks(text, 60, val_fraction=0.1)
        assert (len(found) == 1 and "stands in the training text" in found[0]) == told
        assert inspect_text(text).shared == pytest.approx(repeated / 4_000, abs=0.05)
    assert not remarks(old, 256, val_fraction=0)


def test_many_characters_in_a_short_text_are_remarked_on() -> None:
    assert (
        "9,000 different characters, each 2 times on average"
        in remarks("x" * 18_000, 9_000, val_fraction=0)[0]
    )
    assert not remarks("x" * 18_000, 256, val_fraction=0)
    assert not remarks("x" * 900_000, 9_000, val_fraction=0)
