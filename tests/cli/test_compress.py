"""`charlm compress` and `charlm decompress`: files, standard streams, and what is refused."""

from __future__ import annotations

import io
import os
import random
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
from harness.command import TEXT, Command, start
from harness.warm import WarmPython

from charlm import BlockDataset, CharLM, CharTokenizer, NGramLM
from charlm.cli.__main__ import main
from charlm.compression import compress

BOOK = TEXT.replace("bottles", "flasks") * 3


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    return tmp_path / "book.txt"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    return tmp_path / "text.txt"


def test_a_file_is_compressed_and_comes_back(command: Command, book: Path, text: Path) -> None:
    assert command("compress", "-m", book, text, "-k") == 0
    assert command.out == ""
    small = Path(f"{text}.clm")
    assert f"{text}: {len(TEXT):,} to {small.stat().st_size:,} bytes, " in command.err
    assert " bits per byte, in " in command.err
    assert text.read_bytes() == TEXT.encode()
    text.unlink()
    for words in (["decompress"], ["compress", "--decompress", "-f"], ["compress", "-qdf"]):
        assert command(*words, "-m", book, small) == 0
        assert text.read_bytes() == TEXT.encode()
    assert command.err == ""


def test_a_saved_model_does_it_and_another_is_refused(
    command: Command, book: Path, text: Path, tmp_path: Path
) -> None:
    tokenizer = CharTokenizer.from_text(BOOK)
    lm = CharLM(NGramLM(tokenizer.vocab_size).fit(BlockDataset.from_text(BOOK, tokenizer, 1)), tokenizer)
    lm.save(tmp_path / "model")
    assert command("compress", "-m", tmp_path / "model", text) == 0
    assert Path(f"{text}.clm").read_bytes() == compress(TEXT.encode(), lm)
    assert command("decompress", "-c", "-m", book, f"{text}.clm") == 1
    assert "text.txt.clm': the text was compressed with a saved ngram model" in command.err
    assert command("decompress", "-c", "-q", "-m", tmp_path / "model", f"{text}.clm") == 0
    assert (command.out, command.err) == (TEXT, "")


def test_nothing_is_overwritten_without_force(command: Command, book: Path, text: Path) -> None:
    small = Path(f"{text}.clm")
    small.write_bytes(b"mine")
    assert command("compress", "-m", book, text) == 1
    assert f"charlm: error: '{small}' is there already; -f overwrites it" in command.err
    assert small.read_bytes() == b"mine"
    assert command("compress", "-m", book, text, "--force") == 0
    assert command("decompress", "-m", book, small) == 1
    assert "text.txt' is there already" in command.err


def test_of_several_files_none_is_begun_if_one_cannot_be_written(
    command: Command, book: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "book.txt.clm").touch()
    assert command("compress", "-m", book, text, book) == 1
    assert not Path(f"{text}.clm").exists()


def test_it_lists_and_tests_without_a_model(command: Command, book: Path, text: Path) -> None:
    small = Path(f"{text}.clm")
    assert command("compress", "-m", book, text, "-q") == 0
    assert command("decompress", "-l", small) == 0
    heads, values = command.out.splitlines()
    assert heads.split("  ")[0] == "compressed"
    assert values.split() == [
        *(f"{small.stat().st_size:,}", f"{len(TEXT):,}", f"{8 * small.stat().st_size / len(TEXT):.3f}"),
        *("ngram", "of", "a", "text", values.split()[7], str(small)),
    ]
    assert command("compress", "-l", "-v", small) == 0
    assert values.split()[7] in command.out
    assert command("compress", "-t", small) == 0
    assert "its checksums are right" in command.err
    assert command("compress", "-t", "-m", book, small) == 0
    assert "decompresses to the original bytes" in command.err
    small.write_bytes(small.read_bytes()[:-1])
    for words in (["-t"], ["-t", "-m", book], ["-d", "-f", "-m", book]):
        assert command("compress", *words, small) == 1
        assert "damaged or cut short" in command.err
    assert command("compress", "-l", text) == 1
    assert "no text that charlm has compressed" in command.err
    assert text.read_bytes() == TEXT.encode()


def test_what_is_whole_of_a_damaged_file_can_be_recovered(
    command: Command, book: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("charlm.compression.codec._BLOCK_SIZE", 1_000)
    small = Path(f"{text}.clm")
    assert command("compress", "-m", book, text) == 0
    small.write_bytes(small.read_bytes()[:-1])
    assert command("decompress", "--recover", "-c", "-m", book, small) == 1
    assert command.out == TEXT[: len(TEXT) // 1_000 * 1_000]
    assert "block 3 of 3 is lost" in command.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a FILE is needed, or - for standard input; -m MODEL is needed"),
        (["text.txt"], "-m MODEL is needed"),
        (["-m", "book.txt", "-l", "-t", "text.txt.clm"], "-l and -t exclude each other"),
        (["-m", "book.txt", "-d", "text.txt"], "'text.txt' has not the suffix .clm; -c writes"),
        (["-m", "book.txt", "text.txt.clm"], "'text.txt.clm' has already the suffix .clm"),
        (["-m", "book.txt", "--recover", "text.txt"], "--recover is for decompressing"),
    ],
)
def test_a_wrong_command_line_is_refused(
    words: list[str], message: str, command: Command, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(book.parent)
    assert command("compress", *words) == 2
    assert message in command.err


def test_a_file_that_is_not_there_is_named(command: Command, book: Path, tmp_path: Path) -> None:
    assert command("compress", "-m", book, tmp_path / "none") == 1
    assert "No such file or directory" in command.err
    assert command("compress", "-m", tmp_path / "none", book) == 1
    assert "none" in command.err


@pytest.mark.skipif(os.name != "posix", reason="there are no such modes")
def test_who_could_not_read_the_text_cannot_read_what_is_made_of_it(
    command: Command, book: Path, text: Path
) -> None:
    text.chmod(0o600)
    assert command("compress", "-m", book, text) == 0
    assert stat.S_IMODE(Path(f"{text}.clm").stat().st_mode) == 0o600


def test_standard_streams(
    book: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    data = TEXT.encode() + b"\xff\x00"
    for word in ("compress", "decompress"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        assert main([word, "-q", "-m", str(book), "-"]) == 0
        data = capsysbinary.readouterr().out
    assert data == TEXT.encode() + b"\xff\x00"


def test_compressed_bytes_are_not_for_a_terminal(
    command: Command, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("charlm.cli.compress._is_terminal", lambda: True)
    assert command("compress", "-c", "-m", book, book) == 2
    assert "nothing for a terminal; -f writes them" in command.err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="there is no such signal")
def test_a_command_that_is_killed_leaves_no_half_file(
    book: Path, tmp_path: Path, warm_python: WarmPython
) -> None:
    draw = random.Random(7)
    long = tmp_path / "long.txt"
    long.write_text("".join(draw.choices(BOOK, k=60_000)), encoding="utf-8")
    target = tmp_path / "long.txt.clm"
    took, done = 20.0, 0
    for trial in range(3):
        began = time.monotonic()
        process = start("compress", "-f", "-m", str(book), str(long), python=warm_python)
        try:
            process.wait(took * (1 if trial == 0 else draw.random()))
            took = time.monotonic() - began if trial == 0 else took
        except Exception:  # noqa: BLE001 - it still works
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if target.exists():
            done += 1
            check = start("compress", "-t", str(target), python=warm_python)
            assert check.wait(60) == 0
            check.communicate()
            target.unlink()
    assert done >= 1
