"""`charlm eval` character by character: on a terminal, without colours, and as a page."""

from __future__ import annotations

import argparse
import io
import json
import lzma
import math
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.command import Command

from charlm import BigramLM, ByteTokenizer, CharLM, CharTokenizer
from charlm.cli import eval as eval_command
from charlm.cli.colours import annotated, coloured, wants_colour
from charlm.cli.output import Console
from charlm.cli.signals import Signals

TEXT = "the cat\n\tsat on a mat\n日本 cafe\u0301\n"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    return Command(capsys)


@pytest.fixture
def lm() -> CharLM:
    torch.manual_seed(1)
    tokenizer = CharTokenizer.from_text(TEXT)
    return CharLM(BigramLM(tokenizer.vocab_size), tokenizer)


@pytest.fixture
def model(lm: CharLM, tmp_path: Path) -> str:
    lm.save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


def shown_and_figures(out: str) -> tuple[list[str], str]:
    """Return the lines of the text, without what they mean, and the table below."""
    text, figures = out.split("\nloss ")
    return text.splitlines()[2:], figures


def test_the_text_is_shown_with_its_bits_below_where_there_is_no_terminal(
    command: Command, model: str, file: str, lm: CharLM
) -> None:
    assert command("eval", model, file, "--show") == 0
    lines, figures = shown_and_figures(command.out)
    bits = lm.surprisal(TEXT).bits
    digits = ["+" if b >= 9.5 else str(round(b)) for b in bits[1:]]
    assert lines[0] == "the cat↵"
    assert lines[1] == "-" + "".join(digits[:7])
    assert lines[2] == " sat on a mat↵"
    assert lines[3] == "".join(digits[7:21])
    assert lines[4] == "日本 cafe\u0301↵"
    assert lines[5] == f"{digits[21]} {digits[22]} " + "".join([*digits[23:28], digits[29]])
    assert f"{lm.evaluate(TEXT).loss_nats:.4f}" in figures


@pytest.mark.parametrize("flags", [(), ("--show",)])
def test_it_says_how_far_it_is_every_ten_seconds(
    command: Command, model: str, file: str, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("eval", model, file, *flags) == 0
    figures = command.out
    assert "score" not in command.err
    monkeypatch.setattr("charlm.cli.preparing._SECONDS", 0.0)
    assert command("eval", model, file, *flags) == 0
    assert command.out == figures
    assert re.findall(r"^score   0\.00 of 0\.00 million$", command.err, re.M)


def test_the_text_is_coloured_where_colour_is_forced(
    command: Command, model: str, file: str, lm: CharLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert command("eval", model, file, "--show") == 0
    lines, _ = shown_and_figures(command.out)
    assert [COLOUR.sub("", line) for line in lines] == ["the cat↵", "\tsat on a mat↵", "日本 cafe\u0301↵"]
    assert all(line.endswith(("↵", "\x1b[0m")) for line in lines)
    assert len(COLOUR.findall(command.out)) > 20
    monkeypatch.setenv("NO_COLOR", "1")
    assert command("eval", model, file, "--show") == 0
    assert "\x1b" not in command.out


def test_colours_grow_with_the_surprisal_and_end_with_the_line() -> None:
    legend, first, second = coloured(
        [("a", np.nan), ("b", 0.1), ("c", 5.0), ("d", 5.5), ("\n", 20.0), ("e", 0.0)], "$"
    )
    assert COLOUR.sub("", legend) == "bits  0  0.5  1  2  3  4  6  8  12 \n\n"
    colours = COLOUR.findall(legend)[::2]
    assert first == f"ab{colours[4]}cd\x1b[0m{colours[7]}$\x1b[0m\n"
    assert second == "e\n"


def test_a_line_is_broken_at_the_width_with_its_bits() -> None:
    lines = list(annotated([(c, float(i)) for i, c in enumerate("abcdef")], "$", 4))[1:]
    assert lines == ["abcd\n0123\n", "ef\n45\n"]


@pytest.mark.parametrize(
    ("word", "width"), [("각하", 4), ("한글꽃", 6), ("ệ", 1), ("e\u20dd", 1), ("\u1100\ud7b0\ud7cb", 2)]
)
def test_a_sign_of_several_characters_takes_the_columns_of_one(word: str, width: int) -> None:
    """Terminals draw the vowels and finals of Hangul, and marks, into the sign before."""
    whole, apart = (unicodedata.normalize(form, word) for form in ("NFC", "NFD"))
    for text in (whole, apart):
        lines = list(annotated([(c, 3.0) for c in text * 4], "$", 2 * width))[1:]
        assert [line.split("\n")[0] for line in lines] == [text * 2, text * 2]
        assert all(len(line.split("\n")[1]) == 2 * width for line in lines)


def test_nothing_in_a_text_moves_the_cursor() -> None:
    cells = [("\x1b", 1.0), ("\r", 2.0), ("\x00", 3.0)]
    assert "\\x1b" in "".join(coloured(cells, "$"))
    for lines in (coloured(cells, "$"), annotated(cells, "$", 80)):
        shown = COLOUR.sub("", "".join(lines))
        assert not set("\x1b\r\x00") & set(shown)
    assert list(annotated(cells, "$", 80))[1] == "\\x1b\\r\\x00\n1   2 3   \n"


@pytest.mark.parametrize(
    ("environment", "terminal", "expected"),
    [
        ({}, False, False),
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "dumb"}, True, False),
        ({}, True, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "0"}, False, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colour_is_for_terminals_unless_variables_say_otherwise(
    environment: dict[str, str], terminal: bool, expected: bool
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    assert wants_colour(Stream(), environment) == expected


def test_bytes_of_one_character_are_shown_together(command: Command, file: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    lm = CharLM(BigramLM(256), ByteTokenizer())
    lm.save(tmp_path / "bytes")
    assert command("eval", str(tmp_path / "bytes"), file, "--show") == 0
    lines, _ = shown_and_figures(command.out)
    assert lines[4] == "日本 cafe\u0301↵"
    assert lines[5].startswith("+ + ")  # three bytes of about 8 bits


def test_a_stream_that_cannot_show_the_sign_gets_another(
    model: str, file: str, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    class Ascii(io.StringIO):
        encoding = "ascii"

    stream = Ascii()
    monkeypatch.setattr("sys.stdout", stream)
    args = argparse.Namespace(
        run=model,
        files=[file],
        device="cpu",
        weights=None,
        encoding="utf-8",
        on_unknown=None,
        html=None,
        show=True,
        json=False,
        mixture=True,
    )
    assert eval_command.run(args, Console(), Signals(), 0.0) == 0
    assert "the cat\\n\n" in stream.getvalue()
    lines, _ = shown_and_figures(stream.getvalue())
    assert lines[4].startswith("\\u65e5\\u672c cafe")
    assert [column for column, digit in enumerate(lines[5]) if digit != " "][:4] == [0, 6, 12, 13]


def test_a_page_is_written_beside_the_figures(
    command: Command, model: str, file: str, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    assert command("eval", model, file, "--html", str(out)) == 0
    plain_out = command.out
    assert f"page    {out}" in command.err
    page = out.read_text(encoding="utf-8")
    assert "<title>model reads text.txt</title>" in page
    assert command("eval", model, file) == 0
    assert command.out == plain_out
    assert command("eval", model, file, "--html", str(out), "--json") == 0
    assert command.out.startswith('{"loss_nats"')
    assert out.read_text(encoding="utf-8") == page


@pytest.mark.parametrize("name", ["caf\udce9", "."])
def test_a_page_names_whatever_was_read(
    command: Command, model: str, file: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if name == ".":
        monkeypatch.chdir(model)
    else:
        model = name
        monkeypatch.chdir(tmp_path)
        Path("model").rename(name)
        file = str(Path(file).rename(f"{name}.txt"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode()), encoding="utf-8"))
    out = tmp_path / "page.html"
    assert command("eval", "." if name == "." else name, "-", file, "--html", out) == 0
    title = re.findall("<title>(.*)</title>", out.read_text(encoding="utf-8"))
    shown = ("model", "text.txt") if name == "." else ("caf\\udce9", "caf\\udce9.txt")
    assert title == [f"{shown[0]} reads standard input, {shown[1]}"]


def test_infinite_and_huge_figures_are_readable(command: Command, tmp_path: Path) -> None:
    lm = CharLM(BigramLM(2), CharTokenizer("ab"))
    file = tmp_path / "text.txt"
    file.write_text("aabbab")
    for logit, loss, perplexity in (
        (200.0, r"80\.0000    nats per character", r"5\.541e\+34  per character"),
        (math.inf, "inf    nats per character, as one was held impossible", "inf    per character"),
    ):
        with torch.no_grad():
            next(lm.model.parameters()).copy_(torch.tensor([[-logit, 0.0], [0.0, -logit]]))
        lm.save(tmp_path / "model")
        assert command("eval", tmp_path / "model", file) == 0
        assert re.search(rf"^loss        {loss}$", command.out, re.M)
        assert re.search(rf"^perplexity  {perplexity}$", command.out, re.M)


def test_what_does_not_fit_together_is_refused(command: Command, model: str, file: str) -> None:
    assert command("eval", model, file, "--html", file) == 2
    assert "--html must name a file that ends in .html" in command.err
    assert command("eval", model, file, "--show", "--json") == 2
    assert "--show" in command.err
    assert command("eval", model, file, "--html", "missing/folder/page.html") == 1
    assert "missing/folder/page.html" in command.err


def test_what_xz_makes_of_the_text_stands_beside_the_loss(
    command: Command, model: str, tmp_path: Path
) -> None:
    text = TEXT * 50
    file = tmp_path / "long.txt"
    file.write_text(text, encoding="utf-8")
    packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
    bits = 8 * len(packed) / len(text.encode())
    assert command("eval", model, str(file)) == 0
    assert re.search(rf"^xz +{bits:.4f} +bits per byte, of this text packed by xz -9e$", command.out, re.M)
    assert command("eval", model, str(file), "--json") == 0
    assert json.loads(command.out)["xz_bits_per_byte"] == bits
    file.write_text(TEXT, encoding="utf-8")  # the frame of xz alone would take more than half
    assert command("eval", model, str(file)) == 0
    assert "xz" not in command.out
