"""`charlm generate -i`: turns replayed from standard input, and keys pressed at a terminal."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import pty
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.command import TINY, Command, environment, start, text_file

import charlm
from charlm import BlockDataset, CharLM, CharTokenizer, NGramLM
from charlm.cli import interactive
from charlm.cli.__main__ import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    assert main(["train", str(text_file(folder)), "-o", str(folder / "run"), *TINY, "-q"]) == 0
    return folder / "run"


class Replay(Command):
    """The command with -i and lines of standard input."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(capsys)
        self._monkeypatch = monkeypatch

    def of(self, run: Path, lines: str, *flags: str) -> str:
        """Replay lines, and return the text without its last line feed."""
        stream = io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8")
        self._monkeypatch.setattr(sys, "stdin", stream)
        self.code = self("generate", run, "-i", *flags)
        return self.out.removesuffix("\n")


@pytest.fixture
def replay(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Replay:
    return Replay(capsys, monkeypatch)


def test_lines_give_the_same_text_each_time_and_it_is_that_of_the_library(replay: Replay, run: Path) -> None:
    lines = "bottles\n\n, hanging\n/go 30\n"
    text = replay.of(run, lines, "-p", "green ", "--seed", "7", "-n", "20")
    assert (replay.code, replay.err) == (0, "")
    lm = charlm.load(run)
    wanted = lm.generate("green bottles", 20, temperature=0.8, seed=7) + ", hanging"
    assert text == lm.generate(wanted, 30, temperature=0.8, seed=7)
    assert replay.of(run, lines, "-p", "green ", "--seed", "7", "-n", "20") == text
    assert replay.of(run, lines.replace("\n", "\r\n"), "-p", "green ", "--seed", "7", "-n", "20") == text


def test_without_lines_the_prompt_is_the_text(replay: Replay, run: Path) -> None:
    assert replay.of(run, "", "-p", "green") == "green"
    assert replay.of(run, "/quit\nbottles\n", "-p", "green") == "green"
    assert replay.of(run, "bottles\n/q\n1\n") == "bottles"
    assert replay.code == 0


def test_a_hundred_characters_come_if_nobody_says_how_many(replay: Replay, run: Path) -> None:
    assert replay.of(run, "\n", "--seed", "1", "-v") == charlm.load(run).generate(
        "", 100, temperature=0.8, seed=1
    ).removesuffix("\n")
    assert replay.err == "seed 1\n"
    assert len(replay.of(run, "\n", "--overflow", "slide")) in {99, 100}


def test_turns_are_taken_back_and_tried_again(replay: Replay, run: Path) -> None:
    def text(*lines: str) -> str:
        return replay.of(run, "".join(f"{line}\n" for line in lines), "-p", "green ", "--seed", "7")

    assert text("bottles", "", "/undo") == "green bottles"
    assert text("bottles", "", "/undo 2") == "green "
    assert text("bottles", "", "/undo 99") == "green "  # as many as there are
    assert text("bottles", "/u", "bott", "/g 9", "/u", "les") == "green bottles"
    assert text("bottles", "", "/again") == text("bottles", "/seed 8", "")
    assert text("bottles", "", "/again", "/undo", "/seed 7", "/go") == text("bottles", "")
    assert text("bottles", "/again") == text("bottles", "/seed 8", "")  # what was typed stays
    assert text("bottles", "", "/a", "/undo") == "green bottles"
    assert text("bottles", "", "/undo", "/again") == text("bottles", "/seed 8", "")
    assert text("/temperature 0", "") != text("")
    assert text("/t 0", "") == charlm.load(run).generate("green ", 100, temperature=0).removesuffix("\n")


def test_continuations_are_taken_by_their_numbers(replay: Replay, run: Path) -> None:
    state = charlm.load(run)
    for number in (1, 2):
        text = replay.of(run, f"/{number}\n", "-p", "green ", "-t", "1")
        assert text.startswith("green ")
        assert len(text) > len("green ")
    first = replay.of(run, "/1\n", "-p", "green ", "-t", "1").removeprefix("green ")
    second = replay.of(run, "/2\n", "-p", "green ", "-t", "1").removeprefix("green ")
    assert [c for c, _ in state.rank([second, first], prompt="green ")] == [first, second]
    assert first[0] not in replay.of(run, "/1\n", "-p", "green ", "--ban", first[0]).removeprefix("green ")
    assert replay.of(run, "/6\n/0\n", "-p", "green ") == "green "
    assert replay.err == (
        "charlm: line 1: '/6' must be one of /1 to /5\ncharlm: line 2: '/0' must be one of /1 to /5\n"
    )


def test_a_typed_line_is_added_as_it_is_but_for_its_escapes(replay: Replay, tmp_path: Path) -> None:
    tokenizer = CharTokenizer("abnt/\\ \n\t")
    data = BlockDataset.from_text("ab nt/\\\t\n" * 20, tokenizer, 4)
    CharLM(NGramLM(9, 3).fit(data), tokenizer).save(tmp_path / "model")
    lines = "  a \n\\n\\t\\\\n\\b\n//t\n///\n"
    assert replay.of(tmp_path / "model", lines) == "  a \n\t\\n\\b/t//"
    assert replay.code == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("100 €", "not known to the model: '€' U+20AC"),
        ("/fo", "unknown command '/fo'; did you mean '/go'?"),
        ("/ 3", "unknown command '/'; /help shows all"),
        ("/xyzzy 3", "unknown command '/xyzzy'; /help shows all"),
        ("/undo", "there is nothing to take back"),
        ("/undo -1", "there is nothing to take back"),
        ("/" + "9" * 5000, "'/9999"),
        ("/go " + "9" * 5000, "/go must have a number behind it, got '9999"),
        ("/go x", "/go must have a number behind it, got 'x'"),
        ("/t -1", "temperature must be 0, or from 1e-6 to 1e6, got -1.0"),
        ("/t nan", "temperature must be 0, or from 1e-6 to 1e6, got nan"),
        ("/seed 1.5", "/seed must have a number behind it, got '1.5'"),
        (f"/seed {2**64}", "seed must be an int of at most 64 bits, or None, got"),
    ],
)
def test_a_line_that_cannot_be_done_is_told_of_and_changes_nothing(
    replay: Replay, run: Path, line: str, message: str
) -> None:
    wanted = replay.of(run, "bottles\n", "-p", "green ", "--seed", "7")
    text = replay.of(run, f"{line}\nbottles\n", "-p", "green ", "--seed", "7")
    assert replay.code == 1
    assert text == wanted
    assert replay.err.startswith(f"charlm: line 1: {message}")


def test_no_number_below_one_is_written(replay: Replay, run: Path) -> None:
    assert replay.of(run, "/go 0\n/go -5\n", "-p", "green ") == "green "
    assert replay.code == 1
    assert replay.err.count("/go must have a number from 1 behind it, got ") == 2


def test_unknown_characters_are_left_out_on_request(replay: Replay, run: Path) -> None:
    text = replay.of(run, "bott€les\n", "-p", "gr%een ", "--on-unknown", "skip")
    assert (replay.code, text) == (0, "green bottles")
    assert "not known to the model, and left out: '€' U+20AC; 1 in all" in replay.err


def test_a_replay_that_is_no_text_is_refused(
    replay: Replay, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
    assert replay("generate", run, "-i") == 1
    assert "is not UTF-8" in replay.err or "UTF-8" in replay.err


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["-"], "-"),
        (["--prompt-file", "-"], "--prompt-file -"),
        (["--num-samples", "2"], "--num-samples"),
        (["--regex", "a*", "--json"], "--regex, --json"),
        (["--stop", "x", "--keep-stop"], "--stop, --keep-stop"),
        (["--choice", "x", "--draft"], "--choice, --draft"),
        (["--rank", "f", "--verbatim", "f"], "--rank, --verbatim"),
    ],
)
def test_options_without_sense_are_refused_by_name_before_the_model_is_looked_for(
    replay: Replay, flags: list[str], names: str
) -> None:
    assert replay("generate", "nowhere", "-i", *flags) == 2
    assert f"-i writes one text by turns, so {names} cannot be given with it" in replay.err


def test_no_characters_at_a_time_are_refused(replay: Replay) -> None:
    for count in ("0", "-3"):
        assert replay("generate", "nowhere", "-i", "-n", count) == 2
        assert f"must be {'1' if count == '0' else '0'} or more" in replay.err


class Terminal:
    """The command on a pseudo-terminal: keys go in, and what it writes comes out."""

    def __init__(self, *args: str) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 90))
        variables = environment(TERM="xterm-256color")
        self.process = start(*args, env=variables, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.written, self._seen = "", 0

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait(self, text: str) -> str:
        """Return what is written up to a text, from where the last wait ended."""
        begin, end = self._seen, time.monotonic() + 60
        while (at := self.written.find(text, begin)) < 0:
            assert time.monotonic() < end, self.written
            if select.select([self._master], [], [], 1)[0]:
                self.written += os.read(self._master, 65536).decode(errors="replace").replace("\r\n", "\n")
        self._seen = at + len(text)
        return self.written[begin : self._seen]

    def end(self) -> str:
        """Return what it writes to its end."""
        with contextlib.suppress(OSError):  # EIO once the other end is closed
            while piece := os.read(self._master, 65536):
                self.written += piece.decode(errors="replace").replace("\r\n", "\n")
        os.close(self._master)
        self.process.wait(60)
        return self.written[self._seen :]


@pytest.fixture
def terminal(run: Path) -> Iterator[Terminal]:
    terminal = Terminal("generate", str(run), "-i", "-p", "green ", "--seed", "7")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()


@pytest.mark.slow
def test_keys_at_a_terminal_write_a_text_together(terminal: Terminal) -> None:
    shown = terminal.wait("\n> ")
    assert "seed 7, temperature 0.8; /help says what can be done\ngreen \n" in shown
    assert shown.count(" %") == 5
    terminal.press("bottles\r")
    shown = terminal.wait("\n> ")
    assert "\ngreen bottles\n" in shown
    terminal.press("/go 100000000\r")
    terminal.wait("\x1b[1m")
    time.sleep(0.3)
    terminal.process.send_signal(signal.SIGINT)  # stops the writing
    shown = terminal.wait("\n> ")
    assert len(shown) > 20
    terminal.press("forget this")
    terminal.wait("forget this")
    time.sleep(0.5)  # Python's readline sees a signal only while it waits for a key
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait("/quit or Ctrl-D ends it")
    terminal.wait("\n> ")
    terminal.press("/u\r")
    terminal.wait("green bottles\n")
    terminal.wait("\n> ")
    terminal.press("/print\r")
    terminal.wait("green bottles\n")
    terminal.wait("\n> ")
    terminal.press("/help\r")
    terminal.wait("Enter alone     lets the model go on")
    terminal.wait("\n> ")
    terminal.press("\x04")
    assert terminal.end().endswith("\ngreen bottles\n")
    assert terminal.process.returncode == 0


@pytest.mark.slow
def test_tab_completes_what_is_typed_with_the_models_words(terminal: Terminal) -> None:
    pytest.importorskip("readline")
    terminal.wait("\n> ")
    terminal.press("bott")
    terminal.press("\t\r")
    shown = terminal.wait("\n> ")
    assert "green bott" in shown
    terminal.press("/pr\t\r")
    terminal.wait("/print")
    terminal.wait("\n> ")
    terminal.process.send_signal(signal.SIGTERM)
    terminal.end()
    assert terminal.process.returncode == 143


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the process's threads")
def test_sigterm_ends_it_even_if_it_does_not_wake_readline(terminal: Terminal) -> None:
    """As when it comes in the moment before readline waits for a key: here it comes in another thread."""
    terminal.wait("\n> ")
    time.sleep(0.5)
    pid = terminal.process.pid
    other = max(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir())
    assert other != pid
    assert ctypes.CDLL(None).tgkill(pid, other, signal.SIGTERM) == 0
    terminal.end()
    assert terminal.process.returncode == 143


@pytest.mark.slow
def test_a_model_cannot_move_the_cursor(tmp_path: Path) -> None:
    evil = "a\x1b[2Jb\x07\x9b1A\u202e" * 30
    tokenizer = CharTokenizer.from_text(evil)
    data = BlockDataset.from_text(evil, tokenizer, 8)
    CharLM(NGramLM(tokenizer.vocab_size, 5).fit(data), tokenizer).save(tmp_path / "model")
    terminal = Terminal("generate", str(tmp_path / "model"), "-i", "--seed", "7", "-n", "60")
    try:
        terminal.wait("\n> ")
        for keys in ("\r", "/1\r", "\t\r", "/go 5\r", "/print\r"):
            terminal.press(keys)
            terminal.wait("\n> ")
        terminal.press("\x04")
        terminal.end()
    finally:
        terminal.process.kill()
        terminal.process.wait()
    for sign in ("\x1b[2J", "\x9b", "\u202e"):
        assert sign not in terminal.written
    assert "\\x1b[2J" in terminal.written


def test_completions_are_what_a_line_would_have_to_be(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = charlm.load(run)
    seen: list[str | None] = []

    def taken(turns: interactive._Turns, lines: object) -> bool:
        for line in ("bot", "all\\n9 ", "/te", "€"):
            with contextlib.suppress(charlm.errors.CharLMError):
                seen.extend(turns._complete(line, number) for number in range(7))
        return False

    monkeypatch.setattr(interactive._Turns, "take", taken)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8"))
    assert main(["generate", str(run), "-i", "-p", "green ", "-t", "1"]) == 0
    first = [line for line in seen[:7] if line is not None]
    assert len(first) == 5
    for line in first:
        assert line.startswith("bot")
        assert "\n" not in line
    typed = [interactive._typed(line).removeprefix("bot") for line in first]
    assert [text for text, _ in lm.rank(typed, prompt="green bot")] == typed
    assert all(line is None or line.startswith("all\\n9 ") for line in seen[7:14])
    assert seen[14:21] == ["/temperature", *[None] * 6]
