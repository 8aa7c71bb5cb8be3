"""What notebooks show of results: everything escaped, the style for itself."""

from __future__ import annotations

import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from typing_extensions import override

from charlm import BigramLM, BlockDataset, ByteTokenizer, CharLM, CharTokenizer, Trainer, TrainerConfig
from charlm.evaluation import EvalResult
from charlm.evaluation.markup import coloured_text, figure, table
from charlm.training import EvalRecord, TrainResult

EVIL = "</div><script>alert('1')</script>&\x1b[2J\u202eabc"


class Reader(HTMLParser):
    """Keeps the names of elements, whether each is closed, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.text: list[str] = []
        self.titles: list[str] = []
        self.open: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.open.append(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        if self.open[-1] != "style":
            self.text.append(data)


def read(markup: str) -> Reader:
    reader = Reader()
    reader.feed(markup)
    reader.close()
    assert not reader.open
    assert reader.names <= {
        "style",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "div",
        "i",
        "details",
        "summary",
    }
    return reader


def test_every_rule_of_the_style_is_for_its_own_elements() -> None:
    for markup in (table([["a", "b"]]), coloured_text("ab", np.array([math.nan, 1.0]))):
        (style,) = re.findall("<style>(.*?)</style>", markup, re.S)
        for selectors in re.findall(r"([^{}]+)\{", style):
            assert all(one.strip().startswith(".charlm-") for one in selectors.split(","))


def test_nothing_that_a_model_wrote_is_markup() -> None:
    torch.manual_seed(0)
    tokenizer = CharTokenizer.from_text(EVIL)
    found = CharLM(BigramLM(tokenizer.vocab_size), tokenizer).surprisal(EVIL)
    shown = read(found._repr_html_())
    assert "alert('1')" in "".join(shown.text)
    assert r"\x1b[2J\u202eabc" in "".join(shown.text)
    markup = found._repr_html_()
    assert [markup.count(sign) for sign in ("&lt;", "&amp;", "\x1b", "\u202e")] == [3, 1, 0, 0]
    evil = read(table([[EVIL, EVIL]], title=EVIL, head=[EVIL], folded=EVIL))
    assert "".join(evil.text).count("</div><script>") == 5
    assert EVIL not in repr(found), "the text is not in what a terminal shows"


def test_each_character_has_its_colour_and_its_figures() -> None:
    bits = np.array([math.nan, 0.2, 0.5, 3.5, 20.0, math.inf])
    markup = coloured_text("ab\ncd😀", bits, np.array([0, 1, 2, 30, 4, 5]))
    assert re.findall(r'<i class="l(\d)" title="([^"]*)">([^<]*)</i>', markup) == [
        ("0", "not predicted", "a"),
        ("0", "0.2000 bits, rank 1", "b"),
        ("1", "0.5000 bits, rank 2", "↵"),
        ("4", "3.5000 bits, rank 30", "c"),
        ("8", "20.0000 bits, rank 4", "d"),
        ("8", "∞ bits, rank 5", "😀"),
    ]


def test_marks_stay_with_the_letter_that_they_are_on() -> None:
    markup = coloured_text("e\u0301x", np.array([1.0, 2.0, 0.1]))
    assert '<i class="l4" title="3.0000 bits">e\u0301</i>' in markup


def test_of_a_long_text_the_beginning_is_shown() -> None:
    shown = read(coloured_text("a" * 6_000, np.ones(6_000)))
    assert "".join(shown.text).endswith("… and 1,000 more characters")


def test_a_text_of_bytes_is_shown_by_characters() -> None:
    found = CharLM(BigramLM(256), ByteTokenizer()).surprisal("né\n")
    titles = read(found._repr_html_()).titles
    assert titles[0] == "not predicted"
    assert titles[1] == f"{figure(found.bits[1] + found.bits[2])} bits"
    assert len(titles) == 3


def test_results_are_tables_of_their_figures() -> None:
    result = EvalResult(loss_nats=1.5, accuracy=0.5, n_chars=100, n_bytes=120, n_left_out=50)
    text = html.unescape(" ".join(read(result._repr_html_()).text))
    for part in ("1.5000 nats per character", "2.1640", "bits per byte", "4.4817", "50.00", "100", "of 150"):
        assert part in text
    impossible = EvalResult(loss_nats=math.inf, accuracy=0.5, n_chars=100)
    assert "∞" in "".join(read(impossible._repr_html_()).text)
    trained = TrainResult(
        steps=1_200,
        seconds=42.5,
        chars_seen=10**6,
        final=result,
        best=result,
        best_step=600,
        history=[EvalRecord(600, result, True, 0.1), EvalRecord(1_200, result, False, 0.1)],
        reason="max_steps",
        checkpoint=Path("runs/<one>"),
    )
    text = " ".join(read(trained._repr_html_()).text)
    for part in (
        "1,200 steps in 42.5 s (max_steps)",
        "1,000,000",
        "at step 600",
        "runs/<one>",
        "2 evaluations",
    ):
        assert part in text
    bare = TrainResult(
        steps=1,
        seconds=1,
        chars_seen=8,
        final=None,
        best=None,
        best_step=None,
        history=(),
        reason="callback",
        checkpoint=None,
    )
    assert "loss" not in " ".join(read(bare._repr_html_()).text)


def test_a_model_of_bytes_has_its_figures_per_byte() -> None:
    lm = CharLM(BigramLM(256), ByteTokenizer())
    text = " ".join(read(lm.evaluate("née")._repr_html_()).text)
    assert "nats per byte" in text
    assert "3 bytes" in text
    assert "char" not in text
    assert "nats per byte" in " ".join(read(lm.surprisal("née")._repr_html_()).text)
    data = BlockDataset.from_text("née " * 9, ByteTokenizer(), block_size=4)
    config = TrainerConfig(max_steps=2, precision="fp32")
    trained = Trainer(BigramLM(256), data, config, val_data=data, device="cpu").fit()
    text = " ".join(read(trained._repr_html_()).text)
    assert "bits per byte" in text
    assert "bytes" in text
    assert "character" not in text
