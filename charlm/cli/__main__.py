"""`charlm`: reads the command line, runs one subcommand, and turns an error into one line.

Exit codes: 0; 1 for a failure; 2 for a wrong command line; 130 after Ctrl-C; 143 after SIGTERM. A reader that
closes the pipe early ends the command quietly. A subcommand is imported when it runs, because torch takes
seconds.
"""

from __future__ import annotations

import importlib
import keyword
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from charlm.backends.host import is_under_torchrun
from charlm.cli.output import Console, UsageError, emit, product_and_messages
from charlm.cli.parser import COMMANDS, parse
from charlm.cli.signals import Interrupted, Signals
from charlm.errors import CharLMError, NotEnoughMemoryError, UnknownCharacterError

__all__ = ["main"]


_LEAST_ADDRESSES = 1_000_000_000  # bytes: with 0.85 GB and less torch was seen to abort
# In messages of torch, the system's loader and threads.
_OUT_OF_MEMORY = (
    *("allocate memory", "enough memory", "out of memory", "bad_alloc", "failed to map segment"),
    *("can't start new thread", "Resource temporarily unavailable"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: the words after `charlm`; None: those of this process.
    """
    began = time.perf_counter()
    words = sys.argv[1:] if argv is None else list(argv)
    console = Console()
    signals = Signals()
    with signals, product_and_messages(), console.warnings_shown():
        code = _guarded(words, console, signals, began)
    if argv is None:  # the program is done, and a signal could only disturb the end of Python
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if is_under_torchrun():  # gloo's threads abort about one in ten normal exits
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def _guarded(words: Sequence[str], console: Console, signals: Signals, began: float) -> int:
    """Run the command, and turn an early end into an exit code and at most one line."""
    try:
        with signals.raising():
            return _run(words, console, signals, began)
    except (Interrupted, KeyboardInterrupt):
        return signals.exit_code
    except BrokenPipeError:
        return 0
    except UsageError as error:
        command = next((word for word in words if word in COMMANDS), "")
        console.complain(f"error: {error}\nTry: {' '.join(['charlm', command]).strip()} --help")
        return 2
    except Exception as error:  # noqa: BLE001 - one line instead of a traceback
        if signals.received is not None:  # an interrupted import may raise any error
            return signals.exit_code
        if os.environ.get("CHARLM_DEBUG") == "1" or "--debug" in words:
            traceback.print_exc()
        console.complain(f"error: {_message(error)}")
        return 1


def _run(words: Sequence[str], console: Console, signals: Signals, began: float) -> int:
    try:
        args = parse(words)
    except SystemExit:  # help or version, which argparse has written
        emit("")
        return 0
    console.quiet, console.verbose = args.quiet, args.verbose
    _check_address_space()
    from charlm.cli.threads import sharing_cores  # noqa: PLC0415 - help does without

    with sharing_cores():
        with signals.ending_at_once():
            name = args.command + "_" * keyword.iskeyword(args.command)
            command = importlib.import_module(f"charlm.cli.{name}")
        signals.check()
        code: int = command.run(args, console, signals, began)
    emit("")
    return code


def _check_address_space() -> None:
    """Raise if the limit of memory is so low that loading torch would kill the process without a message."""
    try:
        import resource  # noqa: PLC0415 - Windows has none
    except ImportError:
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < _LEAST_ADDRESSES:
        raise CharLMError(
            f"PyTorch takes about 1 GB of memory, but a process may have only {limit / 1e9:.2f} GB here; "
            "raise the limit (ulimit -v)"
        )


def _message(error: Exception) -> str:
    if isinstance(error, UnknownCharacterError):
        what = str(error).partition("; encode(")[0]  # how to go on in Python
        return (
            f"{what} (eval, generate: --on-unknown skip; charlm train --from RUN teaches them to the model)"
        )
    if isinstance(error, NotEnoughMemoryError):
        return f"{error} (as flags: --batch-size, --accumulate, --block-size, --n-embd, --n-layer)"
    if isinstance(error, CharLMError):
        return str(error)
    text = " ".join(str(error).split())[:500]
    if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return (
            "the memory does not suffice. Free some of it, raise its limit (ulimit -v), or use a smaller "
            "batch, model or text (--debug shows where)"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename!r}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    return f"{type(error).__name__}: {text} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
