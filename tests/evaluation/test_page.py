"""The page that shows a text with its surprisal: what it carries, and what a real browser makes of it."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.browser import find_browser, look_at
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm import BigramLM, BlockDataset, ByteTokenizer, CharLM, CharTokenizer
from charlm.errors import InputError
from charlm.evaluation import Surprisal, surprisal_page
from charlm.testing import tiny_corpus

pytestmark = pytest.mark.slow

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")

ODD = (
    'Tab:\t<b>bold</b> & "quotes" \'x\' </script><img src=x onerror="window.harmed = 1">&amp;\n'
    "family \U0001f469\u200d\U0001f469\u200d\U0001f467 flag \U0001f1e9\U0001f1ea thumb \U0001f44d\U0001f3fd\n"
    "שלום, עולם! 123 abc\n"
    "العربية\n"
    "e\u0301 नमस्ते 日本語\n"
    "\n"
    "carriage\r\nnul \x00 esc \x1b bom \ufeff override \u202e line \u2028 end"
)
READ = "const text = [...document.querySelectorAll('section')].map((s) => s.textContent).join('');"


def model_of(text: str, *, byte: bool = False) -> CharLM:
    tokenizer = ByteTokenizer() if byte else CharTokenizer.from_text(text)
    torch.manual_seed(1)
    return CharLM(BigramLM(tokenizer.vocab_size), tokenizer)


def page_of(text: str, *, byte: bool = False, top: int = 3, title: str = "a title") -> tuple[str, Surprisal]:
    lm = model_of(text, byte=byte)
    found = lm.surprisal(text, top=top)
    return surprisal_page(text, found, lm.tokenizer, title=title), found


def carried(page: str) -> tuple[dict[str, Any], bytes]:
    """Return the header and the figures that lie in a page."""
    match = re.search(r'<script id="data" type="text/plain">([^<]*)</script>', page)
    assert match is not None
    data = zlib.decompress(base64.b64decode(match[1], validate=True))
    end = 4 + int.from_bytes(data[:4], "little")
    return json.loads(data[4:end]), data[end:]


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=2), st.booleans(), st.text(max_size=20))
def test_any_text_is_carried_exactly_and_never_read_as_markup(text: str, byte: bool, title: str) -> None:
    top = 1 if len(set(text)) == 1 and not byte else 2
    page, found = page_of(text, byte=byte, top=2, title=title)
    header, figures = carried(page)
    N = len(text.encode()) if byte else len(text)
    assert (header["text"], header["count"], header["top"]) == (text, N, top)
    assert header["vocab"] == (None if byte else sorted(set(text)))
    bits, entropy = np.frombuffer(figures, "<u2", 2 * N).reshape(2, N)
    np.testing.assert_allclose(bits[1:] / 256, found.bits[1:], atol=1 / 512)
    np.testing.assert_allclose(entropy[1:] / 256, found.entropy_bits[1:], atol=1 / 512)
    assert bits[0] == entropy[0] == 65_535
    rest = np.frombuffer(figures, "<u2", offset=4 * N)
    assert rest[:N].tolist() == found.rank.tolist()
    assert rest[N + top : N + N * top].tolist() == found.candidates[1:].flatten().tolist()
    shares = rest[N + N * top :].reshape(N, top)
    np.testing.assert_allclose(shares[1:] / 65_535, found.candidate_probs[1:], atol=1e-5)
    quiet, _ = page_of("ab")
    for mark in ("<script", "<style", "<img", "</pre>", "%TEXT%", "%DATA%"):
        assert page.count(mark) == quiet.count(mark) + f"{title}".count(mark) * ("<" not in mark)


def test_placeholders_in_a_text_are_a_text() -> None:
    page, _ = page_of("%DATA% and %TEXT% and %TITLE%", title="%DATA%")
    assert "%DATA% and %TEXT% and %TITLE%</pre>" in page
    assert "<title>%DATA%</title>" in page
    assert carried(page)[0]["text"] == "%DATA% and %TEXT% and %TITLE%"


def test_a_page_loads_nothing() -> None:
    page, _ = page_of("ab" * 20)
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    assert "default-src 'none'" in page


def test_figures_that_are_not_finite_are_carried_as_such() -> None:
    data = BlockDataset(torch.tensor([0, 1] * 4), 4)
    lm = CharLM(BigramLM(2).fit(data, smoothing=0), CharTokenizer("ab"))
    found = lm.surprisal("aab")
    page = surprisal_page("aab", found, lm.tokenizer)
    assert np.frombuffer(carried(page)[1], "<u2", 3).tolist() == [65_535, 65_534, 0]
    assert "<dd>∞</dd>" in page
    large = dataclasses.replace(found, result=dataclasses.replace(found.result, loss_nats=80.0))
    assert "<dd>5.541e+34</dd>" in surprisal_page("aab", large, lm.tokenizer)


def test_large_vocabularies_have_wide_ids() -> None:
    vocab = [chr(i) for i in range(0x20, 0xD800)] + [chr(i) for i in range(0xE000, 0x1_3000)]
    tokenizer = CharTokenizer(vocab)
    assert tokenizer.vocab_size > 65_535
    nothing = np.array([np.nan, 20.0])
    high = tokenizer.encode(vocab[-1])[0]
    found = Surprisal(
        bits=nothing,
        entropy_bits=nothing,
        rank=np.array([0, 70_000]),
        context=np.array([0, 1]),
        candidates=np.array([[-1], [high]]),
        candidate_probs=np.array([[np.nan], [0.5]]),
        block_size=1,
        result=model_of("ab").evaluate("ab"),
    )
    header, figures = carried(surprisal_page("ab", found, tokenizer))
    assert header["wide_ids"]
    assert np.frombuffer(figures, "<u4", 4, offset=8).tolist() == [0, 70_000, 0, high]


def test_text_and_figures_of_different_lengths_are_refused() -> None:
    lm = model_of("ab")
    with pytest.raises(InputError, match="a figure for each of 3 characters, got 2"):
        surprisal_page("abb", lm.surprisal("ab"), lm.tokenizer)


@needs_browser
def test_a_browser_shows_every_kind_of_character_as_it_is(tmp_path: Path) -> None:
    page, found = page_of(ODD)
    seen = look_at(
        page,
        READ
        + """
        const cells = [...document.querySelectorAll('section i')];
        const lines = [...document.querySelectorAll('section div')];
        const left = (i) => cells.find((cell) => cell.spot.at === i).getBoundingClientRect().left;
        const hebrew = cells.find((cell) => cell.textContent === 'ש').spot.at;
        return { text, harmed: window.harmed === 1,
          bold: document.querySelectorAll('main b, main img').length,
          cells: cells.map((cell) => [cell.textContent, cell.dataset.label || '', cell.className]),
          lines: lines.map((line) => line.textContent),
          right_to_left: left(hebrew) > left(hebrew + 1) && left(hebrew) > left(hebrew + 16),
          left_to_right: left(0) < left(1),
          tab: cells[4].getBoundingClientRect().width > 20 };""",
        tmp_path,
    )
    hidden = "\x00\x1b\ufeff\u202e\u2028"
    assert seen["text"] == "".join(c for c in ODD if c not in hidden).replace("\r\n", "\n")
    assert not seen["harmed"]
    assert seen["bold"] == 0
    assert seen["lines"] == seen["text"].splitlines(keepends=True)
    cells = [cell for cell, _, _ in seen["cells"]]
    for whole in (
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\U0001f1e9\U0001f1ea",
        "\U0001f44d\U0001f3fd",
        "e\u0301",
    ):
        assert whole in cells
    labels = [label for _, label, _ in seen["cells"] if label]
    assert [label for label in labels if label != "↵"] == [
        "CR↵", "U+0000", "U+001B", "U+FEFF", "U+202E", "U+2028"
    ]  # fmt: skip
    assert labels.count("↵") == 6
    assert seen["right_to_left"]
    assert seen["left_to_right"]
    assert seen["tab"]
    assert seen["cells"][0][2] == "first"
    levels = [sum(bits >= least for least in (0.5, 1, 2, 3, 4, 6, 8, 12)) for bits in found.bits[1:4]]
    assert [name for _, _, name in seen["cells"][1:4]] == [f"l{level}" for level in levels]


@needs_browser
@pytest.mark.parametrize("byte", [False, True])
def test_pointing_at_a_character_shows_its_figures_and_the_likeliest(tmp_path: Path, byte: bool) -> None:
    text = "abé\nabé ab\n"
    page, found = page_of(text, byte=byte)
    lm = model_of(text, byte=byte)
    seen = look_at(
        page,
        """
        const card = document.getElementById('card'), before = card.hidden;
        const over = (i) => {
          [...document.querySelectorAll('section i')].find((cell) => cell.spot.at === i)
            .dispatchEvent(new PointerEvent('pointerover', { bubbles: true }));
          const rows = [...card.querySelectorAll('tr')].map((row) => row.innerText.trim());
          return { text: card.innerText, rows, own: card.querySelectorAll('tr.own').length };
        };
        const found = { before, first: over(0), second: over(1), accent: over(2) };
        document.getElementById('text').dispatchEvent(new PointerEvent('pointerleave'));
        return { ...found, after: card.hidden };""",
        tmp_path,
    )
    assert (seen["before"], seen["after"]) == (True, True)
    assert "not predicted" in seen["first"]["text"]
    assert not seen["first"]["rows"]
    assert f"{found.bits[1]:.2f} bits" in seen["second"]["text"]
    assert f"place {found.rank[1]}" in seen["second"]["text"]
    assert "U+0062" in seen["second"]["text"]
    assert len(seen["second"]["rows"]) == 3
    best = int(found.candidates[1, 0])
    name = f"0x{best:02X}" if byte else lm.tokenizer.decode([best]).replace("\n", "↵").replace(" ", "␣")
    assert seen["second"]["rows"][0].startswith(name)
    assert seen["second"]["own"] == (lm.tokenizer.encode("b")[0] in found.candidates[1])
    if byte:  # both bytes of the character are shown
        assert re.search(r"0xC3 .*0xA9 ", seen["accent"]["text"], re.S)


POINT = """
const card = document.getElementById('card'), cells = [...document.querySelectorAll('section i')];
return cells.map((cell) => {
  cell.dispatchEvent(new PointerEvent('pointerover', { bubbles: true }));
  return [cell.dataset.label || cell.textContent, card.innerText];
});"""


@needs_browser
def test_what_nobody_sees_is_named_in_the_text_and_on_the_card(tmp_path: Path) -> None:
    names = {
        "\xa0": "NO-BREAK SPACE",
        "\xad": "SOFT HYPHEN",
        "\u2003": "EM SPACE",
        "\u3000": "IDEOGRAPHIC SPACE",
        "\u200b": "ZERO WIDTH SPACE",
        "\u200f": "RIGHT-TO-LEFT MARK",
        "\u2028": "LINE SEPARATOR",
        "\u2029": "PARAGRAPH SEPARATOR",
        "\u2066": "LEFT-TO-RIGHT ISOLATE",
        "\ufeff": "ZERO WIDTH NO-BREAK SPACE",
        **dict.fromkeys("\x07\x1b\x85\u115f\ue000", ""),
    }
    text = "a" + "a".join(names)
    page, _ = page_of(text)
    seen = look_at(page, POINT, tmp_path)
    assert len(seen) == len(text)
    for char, (label, said) in list(zip(text, seen, strict=True))[1:]:
        code = f"U+{ord(char):04X}"
        assert label == {"a": "a", "\xa0": "NBSP"}.get(char, code)
        assert f"{code} {names.get(char, '')}".strip() in said


@needs_browser
def test_figures_that_are_infinite_or_zero_are_said_in_words(tmp_path: Path) -> None:
    data = BlockDataset(torch.tensor([0, 1] * 4), 4)
    lm = CharLM(BigramLM(2).fit(data, smoothing=0), CharTokenizer("ab"))
    found = lm.surprisal("aab", top=2)
    seen = look_at(surprisal_page("aab", found, lm.tokenizer), POINT, tmp_path)
    assert "∞ bits (0 %, held impossible), place 2" in seen[1][1]
    assert re.search(r"a\s+0 %", seen[1][1])
    assert "0.00 bits (100.0 %)" in seen[2][1]
    found.bits[1:] = 300.0, 255.9
    found.candidate_probs[1] = 1 - 1e-9, 1e-9
    (tmp_path / "large").mkdir()
    seen = look_at(surprisal_page("aab", found, lm.tokenizer), POINT, tmp_path / "large")
    assert "over 255 bits (<0.01 %)" in seen[1][1]
    assert re.search(r"a\s+<0.01 %", seen[1][1])
    assert "255.90 bits (<0.01 %)" in seen[2][1]
    found.bits[1:] = found.entropy_bits[1:] = np.nan  # of weights that are none
    (tmp_path / "none").mkdir()
    none = look_at(surprisal_page("aab", found, lm.tokenizer), POINT, tmp_path / "none")
    assert "no figure" in none[1][1]
    seen += none
    assert not any(word in said for _, said in seen for word in ("Infinity", "NaN", "undefined"))


@needs_browser
def test_the_keyboard_moves_through_the_text(tmp_path: Path) -> None:
    page, _ = page_of("first line\nsecond line\n\nlast")
    seen = look_at(
        page,
        """
        const main = document.getElementById('text'), card = document.getElementById('card');
        const here = () => { const cell = document.querySelector('i.here'); return cell && cell.spot.at; };
        const press = (...keys) => {
          for (const key of keys) main.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
          return here();
        };
        main.focus();
        const [left, right, up, down] = ['ArrowLeft', 'ArrowRight', 'ArrowUp', 'ArrowDown'];
        return [here(), card.hidden, press(right, right), press(left), press(down), press(up), press(up),
          press(down, down, down, down), press(right, right, right, right), press('Escape'), card.hidden,
          main.tabIndex];""",
        tmp_path,
    )
    assert seen == [0, False, 2, 1, 12, 1, 1, 24, 27, None, True, 0]


@needs_browser
def test_a_title_is_no_markup(tmp_path: Path) -> None:
    page, _ = page_of("ab", title="<b>a</b> & <img src=x onerror='window.harmed = 1'>")
    seen = look_at(
        page,
        "return [document.title, document.querySelector('h1').textContent, window.harmed === 1];",
        tmp_path,
    )
    assert seen == [seen[0], seen[0], False]
    assert seen[0] == "<b>a</b> & <img src=x onerror='window.harmed = 1'>"


@needs_browser
def test_a_megabyte_opens_with_few_elements_and_colours_what_is_near(tmp_path: Path) -> None:
    text = tiny_corpus(900_000) + "x" * 100_000  # and a line that never ends
    page, _ = page_of(text, top=1)
    assert len(page) < 10_000_000
    seen = look_at(
        page,
        READ
        + """
        const count = () => document.querySelectorAll('section i').length;
        for (let i = 0; i < 200 && count() < 2_000; i++) await new Promise((go) => setTimeout(go, 50));
        return { near: count(), made: window.made, length: text.length,
          ends: text.slice(0, 50) + text.slice(-50),
          sections: document.querySelectorAll('section').length };""",
        tmp_path,
        before="""
        const make = document.createElement.bind(document);
        window.made = 0;
        document.createElement = (name) => { window.made += name === 'i'; return make(name); };""",
    )
    assert seen["length"] == len(text)
    assert seen["ends"] == text[:50] + text[-50:]
    assert 2_000 < seen["near"] <= seen["made"] < 20_000  # the first piece at once, others when they are near
    assert seen["sections"] < 1_000


@needs_browser
def test_a_browser_without_decompression_shows_the_plain_text(tmp_path: Path) -> None:
    page, _ = page_of(ODD)
    seen = look_at(
        page,
        "return [document.getElementById('plain').textContent, document.getElementById('legend').innerText];",
        tmp_path,
        before="delete window.DecompressionStream;",
    )
    assert "<b>bold</b> & \"quotes\" 'x' </script>" in seen[0]
    assert "שלום" in seen[0]
    assert "cannot show the colours" in seen[1]
