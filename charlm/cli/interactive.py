"""`charlm generate -i`: a person and a model write a text by turns, line by line.

On a terminal the likeliest continuations stand above each prompt, and readline, where Python has it, edits
lines and completes them with the model's words. Elsewhere the lines of standard input are the turns, and
nothing is shown but the text at the end: a dialogue can be replayed.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import re
import secrets
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from charlm.cli.colours import wants_colour
from charlm.cli.output import Console, UsageError, emit
from charlm.cli.reading import known_text
from charlm.cli.session import Candidate, Session, options_of, refusal_of
from charlm.cli.signals import Signals
from charlm.errors import CharLMError, InputError, did_you_mean, quoted
from charlm.lm import CharLM
from charlm.text.corpus import read_text
from charlm.text.tokenizer import OnUnknown

__all__ = ["refuse_others", "run"]

_AT_A_TIME = 100  # characters that the model adds by itself
_CANDIDATES = 5
_TAIL_LINES, _TAIL = 2, 240  # what is shown of the text, in lines and characters
_BOLD, _DIM, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"

_HELP = r"""
a text          is added as it is; \n is a line feed, \t a tab, \\ a backslash
Enter alone     lets the model go on; Ctrl-C stops it
Tab             goes through the model's continuations of what you type
/1 to /5        take one of the continuations that are shown
/go N           let the model go on for N characters
/again          take back what the model wrote last, and let it go on with the next seed
/undo N         take back the last N turns (1)
/temperature X  from now on; and so /seed N
/print          the whole text
/quit           or Ctrl-D: end, with the whole text
A command may be shortened (/t 0.5); a text that begins with / is typed with two of them.
""".strip()


def refuse_others(args: argparse.Namespace) -> None:
    """Raise a UsageError that names the options of a command line which have no sense with -i."""
    given = {
        "-": args.stdin is not None,
        "--prompt-file -": args.prompt_file == "-",
        "--num-samples": args.num_samples != 1,
        "--stop": args.stop,
        "--keep-stop": args.keep_stop,
        "--regex": args.regex is not None,
        "--choice": args.choice,
        "--rank": args.rank is not None,
        "--verbatim": args.verbatim is not None,
        "--json": args.json,
        "--draft": args.draft,
    }
    if names := [name for name, value in given.items() if value]:
        raise UsageError(f"-i writes one text by turns, so {', '.join(names)} cannot be given with it")
    if args.max_new_tokens == 0:
        raise UsageError("--max-new-tokens must be 1 or more with -i, got 0")


def run(lm: CharLM, prompt: str, args: argparse.Namespace, console: Console, signals: Signals) -> int:
    """Take turns until the person ends it, and write the text; 1 if a line of a replay was refused."""
    seed = secrets.randbits(32) if args.seed is None else args.seed
    session = Session(lm, prompt, options_of(args, lm.tokenizer, seed))
    turns = _Turns(session, lm, args, console)
    if sys.stdin.isatty() and sys.stdout.isatty():
        console.say(f"seed {seed}, temperature {args.temperature:g}; /help says what can be done")
        with signals.calling(turns.interrupt):
            turns.take(turns.lines_of_terminal())
        refused = False
    else:
        console.detail(f"seed {seed}")
        text = read_text("-", encoding=args.encoding)
        refused = turns.take(line.removesuffix("\n") for line in io.StringIO(text, newline=None))
    text = session.text
    emit(text if text.endswith("\n") else text + "\n")
    return int(refused)


class _Turns:
    """What lines do to a session, and what is shown of it."""

    def __init__(self, session: Session, lm: CharLM, args: argparse.Namespace, console: Console) -> None:
        self._session, self._tokenizer, self._console = session, lm.tokenizer, console
        self._on_unknown: OnUnknown = args.on_unknown or "error"
        self._count: int = args.max_new_tokens or _AT_A_TIME
        self._candidates: list[Candidate] | None = None  # of the text as it is
        self._terminal = self._asking = self._stopped = self._model_was_last = False
        self._colour = wants_colour(sys.stdout)
        self._completions: list[str] = []
        self._commands: dict[str, Callable[[str], object]] = {
            "again": self._again,
            "go": lambda word: self._go_on(_number("/go", word, self._count)),
            "help": lambda _: console.say(_HELP),
            "print": lambda _: emit(session.text + "\n") if self._terminal else None,
            "quit": lambda _: None,
            "seed": lambda word: self._choose(seed=_number("/seed", word, session.options.seed)),
            "temperature": lambda word: self._choose(
                temperature=_number("/temperature", word, session.options.temperature, float)
            ),
            "undo": lambda word: self._undo(_number("/undo", word, 1)),
        }

    def interrupt(self) -> None:
        """Do what Ctrl-C is to do: forget the line that is typed, or stop the model."""
        if self._asking:
            raise KeyboardInterrupt
        self._stopped = True

    def take(self, lines: Iterable[str]) -> bool:
        """Do what each line says, until one says that it is the end; return whether one was refused."""
        refused = False
        for number, line in enumerate(lines, 1):
            if len(line) > 1 and "/quit".startswith(line.rstrip()):
                break
            try:
                self._obey(line)
            except CharLMError as error:
                said = refusal_of(error)
                self._console.complain(said if self._terminal else f"line {number}: {said}")
                refused = True
        return refused

    def lines_of_terminal(self) -> Iterator[str]:
        """Show what may come next and yield what is typed, again and again."""
        self._terminal = True
        self._prepare_keys()
        self._show_text()
        while True:
            cells = (
                f"/{n} {c.text!r} {100 * c.probability:.1f} %" for n, c in enumerate(self._likeliest(), 1)
            )
            line = "   ".join(cell.replace(" ", "\0") for cell in cells)  # no cell is broken
            rows = textwrap.fill(line, shutil.get_terminal_size().columns, break_on_hyphens=False)
            rows = rows.replace("\0", " ")
            emit(f"{_DIM}{rows}{_PLAIN}\n" if self._colour else f"{rows}\n", painted=True)
            try:
                self._asking = True
                line = input("> ")
            except KeyboardInterrupt:
                emit("\n/quit or Ctrl-D ends it\n")
                continue
            except UnicodeDecodeError:
                self._console.complain("what was typed is no UTF-8, so nothing was added")
                continue
            except EOFError:
                emit("\n")
                return
            finally:
                self._asking = False
            yield line

    def _obey(self, line: str) -> None:
        """Do what a line says, or raise a CharLMError; the text is then as it was."""
        if not line:
            self._go_on(self._count)
        elif not line.startswith("/") or line.startswith("//"):
            text, notes = known_text(_typed(line), self._tokenizer, self._on_unknown)
            for note in notes:
                self._console.complain(f"note: {note}")
            self._write(text)
        elif (word := line[1:].rstrip()).isdecimal():
            candidates = {str(n): c.text for n, c in enumerate(self._likeliest(), 1)}
            if word not in candidates:
                raise InputError(f"{quoted(f'/{word}', 40)} must be one of /1 to /{len(candidates)}")
            self._write(candidates[word])
        else:
            word, _, rest = word.partition(" ")
            name = next((name for name in self._commands if word and name.startswith(word)), None)
            if name is None:
                hint = did_you_mean(f"/{word}", [f"/{name}" for name in self._commands], "/help shows all")
                raise InputError(f"unknown command {quoted(f'/{word}', 40)}; {hint}")
            self._commands[name](rest.strip())

    def _write(self, text: str) -> None:
        self._session.write(text)
        self._show_text()

    def _go_on(self, count: int) -> None:
        if count < 1:
            raise InputError(f"/go must have a number from 1 behind it, got {count}")
        self._stopped, last = False, "\n"
        if self._terminal:
            emit(_tail(self._session.text))
            emit(_BOLD * self._colour, painted=True)
        try:
            for last in self._session.go_on(count):
                if self._terminal:
                    emit(last)
                if self._stopped:
                    break
        finally:
            self._candidates, self._model_was_last = None, True
            if self._terminal:
                emit(_PLAIN * self._colour + "\n" * (last != "\n"), painted=True)

    def _again(self, word: str) -> None:
        if self._model_was_last:
            self._session.undo()
        self._choose(seed=(self._session.options.seed or 0) + 1)
        self._go_on(self._count)

    def _undo(self, count: int) -> None:
        taken = sum(itertools.takewhile(bool, (self._session.undo() for _ in range(count))))
        if not taken:
            raise InputError("there is nothing to take back")
        if self._terminal and taken < count:
            self._console.say(f"no more than {taken:,} could be taken back")
        self._show_text()

    def _choose(self, **changes: Any) -> None:
        self._session.options = dataclasses.replace(self._session.options, **changes)
        self._candidates = None
        if self._terminal:
            self._console.say(", ".join(f"{name} {value}" for name, value in changes.items()))

    def _likeliest(self) -> list[Candidate]:
        if self._candidates is None:
            self._candidates = self._session.candidates(_CANDIDATES)
        return self._candidates

    def _show_text(self) -> None:
        """Show where the text ends now; what was likely before is so no more."""
        self._candidates, self._model_was_last = None, False
        if self._terminal and (tail := _tail(self._session.text)):
            emit(tail + "\n" * (not tail.endswith("\n")))

    def _prepare_keys(self) -> None:
        """Let readline edit lines and complete them, where Python has it."""
        try:
            import readline  # noqa: PLC0415 - Windows has none
        except ImportError:
            return
        readline.set_completer(self._complete)
        readline.set_completer_delims("")
        editline = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if editline else "tab: menu-complete")

    def _complete(self, line: str, number: int) -> str | None:
        """Return the line with one continuation; readline asks for one by one, until there is None."""
        if number == 0 and line.startswith("/") and not line.startswith("//"):
            self._completions = [f"/{name}" for name in self._commands if f"/{name}".startswith(line)]
        elif number == 0:
            candidates = self._session.candidates(_CANDIDATES, _typed(line))
            added = [
                c.text.replace("\\", r"\\").replace("\n", r"\n").replace("\t", r"\t") for c in candidates
            ]
            self._completions = [line + text for text in added if text.isprintable()]
        return self._completions[number] if number < len(self._completions) else None


def _number(name: str, word: str, default: Any, kind: Callable[[str], float] = int) -> Any:
    """Return the number behind a command; without one, the default."""
    try:
        return kind(word) if word else default
    except ValueError:
        raise InputError(f"{name} must have a number behind it, got {quoted(word, 40)}") from None


def _typed(line: str) -> str:
    """Return the text that a line stands for."""
    signs = {"n": "\n", "t": "\t", "\\": "\\"}
    line = line[1:] if line.startswith("//") else line
    return re.sub(r"\\([nt\\])", lambda found: signs[found[1]], line)


def _tail(text: str) -> str:
    """Return the last lines of a text."""
    tail = "\n".join(text[-_TAIL:].split("\n")[-_TAIL_LINES:])
    return tail if len(tail) == len(text) else f"…{tail}"
