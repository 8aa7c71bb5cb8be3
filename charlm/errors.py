"""Every error that charlm raises on purpose.

Each is a `CharLMError`, and also the builtin error that fits, so that existing handlers catch it::

    CharLMError
    ├── ConfigError (ValueError)                  a config has bad, missing or unknown fields
    ├── TextError (ValueError)                    text that cannot be used as it is
    │   ├── UnknownCharacterError                 characters outside the vocabulary
    │   └── InvalidTextError                      bytes that are not UTF-8, or lone surrogates
    ├── DataError (ValueError)                    a corpus or part too short, ids outside the vocabulary
    ├── InputError (ValueError)                   a tensor or option of a wrong type, shape, range or device
    ├── CorpusError (OSError)                     a corpus that cannot be found, read or downloaded
    ├── FileFormatError (ValueError)              a file whose content is refused
    ├── CheckpointError (OSError)                 a checkpoint that cannot be found or used
    │   ├── CheckpointWriteError                  saving failed; older checkpoints are intact
    │   ├── CheckpointCorruptError                files missing, changed or from different saves
    │   └── CheckpointMismatchError (ValueError)  a whole checkpoint of another model, text or tokenizer
    ├── RunExistsError (FileExistsError)          the directory already holds a run
    ├── RunLockedError (OSError)                  another process or trainer trains in that directory
    ├── BackendError (RuntimeError)               a device that is unknown, absent, or lacks an ability
    ├── PeerError (RuntimeError)                  another process of the same training failed or is gone
    ├── NotEnoughMemoryError (MemoryError)        refused before it is allocated: it cannot fit
    ├── NonFiniteError (ArithmeticError)          NaN or infinity where a finite number is needed
    └── TrainingInterrupted                       training stopped at the caller's request, after saving

A message has three parts: what is required, what was given, and what to do. `quoted` keeps the control
characters of a file out of messages. Every error can be pickled and keeps its fields.
The pattern is that of httpx's `_exceptions.py`.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "BackendError",
    "CharLMError",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointWriteError",
    "ConfigError",
    "CorpusError",
    "DataError",
    "FileFormatError",
    "InputError",
    "InvalidTextError",
    "NonFiniteError",
    "NotEnoughMemoryError",
    "PeerError",
    "RunExistsError",
    "RunLockedError",
    "TextError",
    "TrainingInterrupted",
    "UnknownCharacterError",
]


def quoted(text: str, limit: int = 200) -> str:
    r"""Return the beginning of a foreign text, quoted and printable, for a message.

    Args:
        text: any text.
        limit: the most characters that are kept.

    Example:
        >>> print(quoted("\x1b[31mred"), quoted("a long text", limit=7))
        '\x1b[31mred' 'a long…'
    """
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "'" + "".join(c if c.isprintable() and c not in "'\\" else _escaped(c) for c in shown) + "'"


def shown(value: object) -> str:
    """Return a value for a message: one short line, with the type unless it is a plain one.

    Args:
        value: anything.

    Example:
        >>> print(shown("text"), shown(0.5), shown([1, 2]))
        'text' 0.5 [1, 2] (list)
    """
    if isinstance(value, str):
        return quoted(value, 40)
    if type(value) is int and value.bit_length() > 128:  # repr refuses the really long ones
        return f"an int of {value.bit_length()} bits"
    if type(value) in (bool, int, float, type(None)):
        return repr(value)
    text = reprlib.repr(value)[:200]  # lists of lists of lists take more
    return f"{text if text.isprintable() else quoted(text)} ({type(value).__name__})"


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name that is most similar to `name`, or None if none is similar.

    Example:
        >>> nearest("cpu-1mn", ["cpu-10s", "cpu-1min"])
        'cpu-1min'
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def warn(message: str) -> None:
    """Warn with a RuntimeWarning that points at the line which called into charlm."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def _is_ours(module: object) -> bool:
    # contextlib stands between a context manager of ours and the block that it is for.
    return str(module).startswith("charlm.") or module == "contextlib"


def renamed(owner: str, name: str, new_names: Mapping[str, str]) -> AttributeError:
    """Return the error for a name that an owner lacks. For a former name, the message has the present one."""
    now = f": it is called {new_names[name]} now" if name in new_names else ""
    return AttributeError(f"{owner} has no attribute {name!r}{now}", name=name)


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return the hint for an unknown name: the most similar known name, or else `otherwise`.

    Example:
        >>> did_you_mean("temprature", ["temperature"], "the options are temperature")
        "did you mean 'temperature'?"
    """
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else otherwise


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii") if character != "'" else "\\'"


def _rebuild(cls: type[CharLMError], message: str, fields: dict[str, Any]) -> CharLMError:
    error = cls(message)
    for name, value in fields.items():
        setattr(error, name, value)
    return error


class CharLMError(Exception):
    """Base of every error that charlm raises on purpose. `str(error)` is the whole message.

    Attributes:
        message: what is required, what was given, and what to do.

    Example:
        >>> from charlm import CharTokenizer
        >>> try:
        ...     ids = CharTokenizer("abc").encode("cab!")
        ... except CharLMError as error:
        ...     print(type(error).__name__, error.characters)
        UnknownCharacterError ('!',)
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        fields = dict(self.__dict__)
        if isinstance(self, OSError):  # kept outside __dict__ by the builtin
            fields["errno"] = self.errno
        return _rebuild, (type(self), self.message, fields)


class ConfigError(CharLMError, ValueError):
    """One or more fields of a config are wrong.

    Attributes:
        problems: one sentence per bad field.
    """

    def __init__(self, message: str, *, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[str, ...] = tuple(problems)


class TextError(CharLMError, ValueError):
    """Text that cannot be used as it is."""


class UnknownCharacterError(TextError):
    """The text holds characters that the vocabulary lacks.

    Attributes:
        characters: the distinct unknown characters, in order of appearance.
        position: index of the first of them in the text, from 0.
        line: its line, from 1.
        column: its column, from 1.
        count: how many characters of the text are unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        characters: Sequence[str] = (),
        position: int = 0,
        line: int = 1,
        column: int = 1,
        count: int = 0,
    ) -> None:
        super().__init__(message)
        self.characters: tuple[str, ...] = tuple(characters)
        self.position = position
        self.line = line
        self.column = column
        self.count = count


class InvalidTextError(TextError):
    """The text is no valid Unicode: bytes that are not UTF-8, or a lone surrogate.

    Attributes:
        offset: the place of the first fault: in bytes for a file, in characters for a string.
    """

    def __init__(self, message: str, *, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset


class DataError(CharLMError, ValueError):
    """A corpus or a part of it is too short, or has ids outside the vocabulary."""


class InputError(CharLMError, ValueError):
    """A tensor or an option has the wrong type, shape, range or device."""


class CorpusError(CharLMError, OSError):
    """A corpus cannot be found, read or downloaded."""


class FileFormatError(CharLMError, ValueError):
    """The content of a file is refused.

    Attributes:
        path: the file, or a name for the source of the bytes.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class CheckpointError(CharLMError, OSError):
    """A checkpoint or saved model cannot be found or used."""


class CheckpointWriteError(CheckpointError):
    """Saving failed. Older checkpoints are intact; `errno` is the operating system's reason."""

    def __init__(self, message: str, *, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class CheckpointCorruptError(CheckpointError):
    """A checkpoint's files are missing, changed, or come from different saves."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """A whole checkpoint belongs to another model, text or tokenizer than the one given."""


class RunExistsError(CharLMError, FileExistsError):
    """The directory already holds a run or other files."""


class RunLockedError(CharLMError, OSError):
    """Another process or trainer trains in that directory, or has continued the run since it was read."""


class BackendError(CharLMError, RuntimeError):
    """A device is unknown or absent, or lacks an ability."""


class PeerError(CharLMError, RuntimeError):
    """Another process of the same training has failed or is gone, so this one cannot continue.

    Attributes:
        rank: the process that reported a failure, or None if a process is gone or does not answer.
    """

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class NotEnoughMemoryError(CharLMError, MemoryError):
    """A model or a batch cannot fit into the memory. Nothing of it was allocated.

    Attributes:
        needed_bytes: the estimated need.
        available_bytes: the memory that is free.
        batch_size: the largest that would fit, or None if none does or no batch is concerned.
    """

    def __init__(
        self,
        message: str,
        *,
        needed_bytes: int = 0,
        available_bytes: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.batch_size = batch_size


class NonFiniteError(CharLMError, ArithmeticError):
    """A NaN or an infinity stands where a finite number is needed.

    Attributes:
        step: the training step, counted from 1, or None outside training.
        parameter: name of the first parameter with a bad gradient, where there is one.
        loss: the loss of that step in nats.
        grad_norm: the global norm of its gradient.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int | None = None,
        parameter: str | None = None,
        loss: float | None = None,
        grad_norm: float | None = None,
    ) -> None:
        super().__init__(message)
        self.step = step
        self.parameter = parameter
        self.loss = loss
        self.grad_norm = grad_norm


class TrainingInterrupted(CharLMError):  # noqa: N818 - it ends a training without being a failure of it
    """Training stopped because it was asked to. Its state is saved if the run saves anything.

    Attributes:
        step: the number of steps that are done.
        checkpoint: the folder of the saved state, or None if the run saves nothing.
    """

    def __init__(self, message: str, *, step: int = 0, checkpoint: str | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.checkpoint = checkpoint
