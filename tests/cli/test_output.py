"""The product and the words of a command line on Windows: what is computed there, computed here."""

from __future__ import annotations

import errno
import io
import shlex
import sys

import pytest

from charlm.cli import output
from charlm.cli.output import as_word, emit, product_and_messages, shell_word


class Stream(io.TextIOWrapper):
    """Standard output as Python makes it on Windows, where it is no console."""

    def __init__(self, *, terminal: bool = False) -> None:
        self.held, self._terminal = io.BytesIO(), terminal
        super().__init__(self.held, encoding="cp1252", errors="strict", newline="\r\n")

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    return monkeypatch


def test_on_windows_a_pipe_gets_the_product_exactly(windows: pytest.MonkeyPatch) -> None:
    stream = Stream()
    windows.setattr(sys, "stdout", stream)
    with product_and_messages():
        emit("é → ♞\n\r\n")
    assert stream.held.getvalue() == "é → ♞\n\r\n".encode()
    assert (stream.encoding, stream.errors) == ("cp1252", "strict")


@pytest.mark.parametrize("how", ["a console", "asked for", "another system"])
def test_elsewhere_its_encoding_stays_and_it_gets_escapes(windows: pytest.MonkeyPatch, how: str) -> None:
    stream = Stream(terminal=how == "a console")
    windows.setattr(sys, "stdout", stream)
    if how == "asked for":
        windows.setenv("PYTHONIOENCODING", "cp1252")
    elif how == "another system":
        windows.setattr(sys, "platform", "linux")
    with product_and_messages():
        emit("é →")
    assert stream.held.getvalue() == b"\xe9 \\u2192"


@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_a_closed_pipe_has_another_name_on_windows(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    class Closed(Stream):
        is_closed = True

        def flush(self) -> None:
            if self.is_closed:
                raise OSError(errno.EINVAL, "Invalid argument")

    stream = Closed()
    discarded: list[object] = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(output, "_discard", discarded.append)
    with pytest.raises(OSError) as caught:
        emit("text")
    assert isinstance(caught.value, BrokenPipeError) == (platform == "win32")
    assert discarded == [stream]
    stream.is_closed = False  # for the end of the stream


def test_on_windows_a_word_that_may_be_pasted_stands_in_double_quotes(windows: pytest.MonkeyPatch) -> None:
    assert shell_word(r"C:\my runs\one") == r'"C:\my runs\one"'
    assert shell_word(r"C:\runs\one") == r"C:\runs\one"
    assert shell_word("") == '""'
    assert as_word("-o") == "./-o"


@pytest.mark.parametrize("word", ["one", "my runs/one", "it's", "", "$HOME", 'a "b"', "-", "-o"])
def test_elsewhere_a_shell_gives_the_word_back(word: str) -> None:
    assert shlex.split(shell_word(word)) == [word]
