"""Every kind of text goes through the whole command, and none of it reaches a terminal as a control code."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path

import pytest
from harness.command import Command, text_file
from harness.texts import LONG, TEXTS

from charlm import load
from charlm.cli import guess as guess_module


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return the command, which neither times steps nor waits for the disk: that is most of the time here."""
    monkeypatch.setattr(guess_module, "_timed", lambda *_: (0.05, 1.0))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return Command(capsys)


def raw(said: str) -> set[str]:
    """Return the characters that may move a cursor, or that nobody sees."""
    return {c for c in said if not c.isprintable() and c != "\n"}


@pytest.mark.parametrize("kind", TEXTS)
def test_an_inspection_says_what_the_text_is_and_shows_no_control_character(
    kind: str, command: Command, tmp_path: Path
) -> None:
    text = TEXTS[kind]
    file = text_file(tmp_path, text)
    assert command("inspect", file) == 0
    assert not raw(command.out)
    assert not command.err
    assert f"\ncharacters  {len(text):,} in " in command.out
    assert f"; {len(text.encode()):,} bytes of UTF-8\n" in command.out
    assert command("inspect", file, "--json") == 0
    assert command.out.isascii()
    assert not raw(command.out)
    assert not command.err
    values = json.loads(command.out)
    assert (values["n_chars"], values["n_bytes"]) == (len(text), len(text.encode()))
    assert values["vocab_size"] == len(set(text))
    assert values["ngram"]["loss_nats"] >= 0


@pytest.mark.parametrize("kind", LONG)
def test_a_text_is_trained_on_continued_and_shown_as_a_page(
    kind: str, command: Command, tmp_path: Path
) -> None:
    text = LONG[kind]
    file, run, page = text_file(tmp_path, text), tmp_path / "run", tmp_path / "page.html"
    assert command.train(file, "-o", run, "--max-steps", "2", "--sample-interval", "2", "--verbose") == 0
    assert not command.out
    assert "sample at step 2:" in command.err
    assert not raw(command.err) - {"\t"}

    (tmp_path / "prompt.txt").write_bytes(text[:20].encode())
    flags = ("--prompt-file", tmp_path / "prompt.txt", "-n", "20", "--seed", "5")
    assert command("generate", run, *flags) == 0
    wanted = load(run, device="cpu").generate(text[:20], 20, temperature=0.8, seed=5)
    assert command.out == wanted + "\n" * (not wanted.endswith("\n"))
    assert not raw(command.err)
    assert command("generate", run, *flags, "--json") == 0
    assert json.loads(command.out)["samples"] == [wanted]
    assert not raw(command.out + command.err)

    assert command("eval", run, file, "--html", page) == 0
    assert not raw(command.out + command.err)
    assert f"predicted   {len(text) - 1:,}" in command.out
    assert html.escape(text) in page.read_bytes().decode()


def test_a_text_too_short_to_train_on_is_an_error_that_names_the_part(
    command: Command, tmp_path: Path
) -> None:
    file = text_file(tmp_path, TEXTS["very short"])
    assert command.train(file, "-o", tmp_path / "run") == 1
    assert "the second part of the text (for validation) has 2 characters; block_size 16" in command.err
    assert not (tmp_path / "run").exists()
