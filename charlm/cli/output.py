"""Output of the command: the product on standard output, everything else on standard error.

A character that a console cannot show is written as a backslash escape. So are characters that would move the
cursor of a terminal, in every message and in the product; they may come from a model, a text or the name of a
file. A pipe gets the product exactly. Losing standard error (a closed pipe, a full disk) never ends the work;
losing standard output does.
"""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from charlm.errors import CharLMError, quoted

if TYPE_CHECKING:
    from charlm.cli.signals import Signals

__all__ = [
    "Console",
    "Invocation",
    "UsageError",
    "aligned",
    "as_word",
    "check_output",
    "emit",
    "product_and_messages",
    "refuse",
    "shell_word",
    "writing",
]

# Control characters but "\n" and "\t", line and paragraph separators, and marks of the writing direction.
_CODES = (*range(32), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_MOVING = {code: chr(code).encode("unicode_escape").decode() for code in _CODES if chr(code) not in "\n\t"}


class UsageError(CharLMError):
    """The command line itself is wrong; the command ends with the exit code 2."""


def refuse(problems: Sequence[str]) -> None:
    """Raise a UsageError that lists the problems, if there are any."""
    if problems:
        raise UsageError("; ".join(problems))


class Console:
    """Standard error, with the level of detail that the user wants.

    Args:
        quiet: errors and warnings only.
        verbose: details, too.

    Attributes:
        bar: the progress bar, if one is shown; text is written above it.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.silent = False
        self.bar: Any = None

    def say(self, text: str) -> None:
        """Write a line, unless the console is quiet."""
        if not self.quiet:
            self._write(text)

    def detail(self, text: str) -> None:
        """Write a line if the console is verbose."""
        if self.verbose and not self.quiet:
            self._write(text)

    def complain(self, text: str) -> None:
        """Write an error or a warning."""
        self._write(f"charlm: {text}")

    def _write(self, text: str) -> None:
        if self.silent:
            return
        text = text.translate(_MOVING)
        try:
            if self.bar is None:
                print(text, file=sys.stderr, flush=True)
            else:
                self.bar.write(text, file=sys.stderr)
        except OSError:
            _discard(sys.stderr)

    @contextmanager
    def warnings_shown(self) -> Iterator[None]:
        """Show the library's warnings as lines inside the block."""

        def show(  # noqa: PLR0917 - the signature is that of warnings.showwarning
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, DeprecationWarning | FutureWarning):
                self.complain(f"warning: {message}")

        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = show
            yield


class Invocation(NamedTuple):
    """One call of the command: its messages, its signals, and the time when it began."""

    console: Console
    signals: Signals
    began: float
    """`time.perf_counter()` at the start of the command."""


@contextmanager
def product_and_messages() -> Iterator[None]:
    r"""Let both streams escape what they cannot encode inside the block, and a pipe get the product exactly.

    On Windows a pipe would have an encoding of a few hundred characters, and get "\r\n" for each "\n".
    """
    before: list[tuple[io.TextIOWrapper, dict[str, Any]]] = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            before.append((stream, {"errors": stream.errors}))
            stream.reconfigure(errors="backslashreplace")
            if sys.platform == "win32" and stream is sys.stdout and not stream.isatty():
                before[-1][1].update(encoding=stream.encoding, newline=None)
                encoding = stream.encoding if "PYTHONIOENCODING" in os.environ else "utf-8"
                stream.reconfigure(encoding=encoding, errors="backslashreplace", newline="\n")
    try:
        yield
    finally:
        for stream, options in before:
            stream.reconfigure(**options)


def emit(text: str, *, flush: bool = True, painted: bool = False) -> None:
    """Write a part of the product to standard output; on a terminal, cursor movements are escaped.

    Args:
        text: any text.
        flush: flush the buffer, too.
        painted: whether the text has colours, and is escaped already.

    Raises:
        BrokenPipeError: the reader is gone; standard output is discarded from now on.
        OSError: it cannot be written, for example because a disk is full.
    """
    try:
        sys.stdout.write(text if painted or not sys.stdout.isatty() else text.translate(_MOVING))
        if flush:
            sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if sys.platform == "win32" and error.errno == errno.EINVAL:  # its word for a closed pipe
            raise BrokenPipeError(errno.EPIPE, "nobody reads it any more") from error
        raise


def check_output(path: str | Path, *, directory: bool = False) -> None:
    """Raise CharLMError before the work if its result could not be written.

    Args:
        path: a file in an existing directory.
        directory: whether it is a directory, which is made if it is missing.

    Raises:
        CharLMError: it cannot be written.
    """
    with writing(path):
        from charlm.files.atomic import check_writable  # noqa: PLC0415 - not for the help

        check_writable(path, directory=directory)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name the target in errors of writing inside the block, since the system names a temporary file.

    Raises:
        CharLMError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise CharLMError(f"cannot write {quoted(str(path))}: {error.strerror or error}") from error


def aligned(rows: Iterable[Sequence[str]], *, indent: str = "") -> str:
    """Return rows of cells as lines with aligned columns, two spaces apart."""
    table = [list(row) for row in rows]
    widths = [
        max(len(row[i]) for row in table if i < len(row)) for i in range(max(map(len, table), default=0))
    ]
    return "".join(
        indent
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        + "\n"
        for row in table
    )


def as_word(path: str) -> str:
    """Return a path as a word of a command line that can be pasted.

    Example:
        >>> print(as_word("my text"), as_word("-o"), as_word("-"))
        'my text' ./-o -
    """
    return shell_word(f"./{path}" if path.startswith("-") and path != "-" else path)


def shell_word(word: str) -> str:
    """Return a word as the shell takes it into which somebody may paste it: on Windows in double quotes."""
    if sys.platform == "win32":
        from subprocess import list2cmdline  # noqa: PLC0415 - not for the help

        return list2cmdline([word])
    return shlex.quote(word)


def _discard(stream: Any) -> None:
    """Discard the buffered and all later output of a stream whose reader is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
