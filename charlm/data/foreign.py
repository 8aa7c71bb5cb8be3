"""Reads the token files of nanoGPT and llm.c, as a source of a prepared corpus. No torch.

nanoGPT has a folder with train.bin and val.bin, uint16 without a header, and meta.pkl if the tokens are
characters (https://github.com/karpathy/nanoGPT, data/shakespeare_char/prepare.py). llm.c has uint16 after a
header of 256 int32: 20240520, the version 1, the number of tokens, and zeros
(https://github.com/karpathy/llm.c, dev/data/data_common.py). The pickle is read without executing it.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charlm.data.sources import Counted, Progress, listed, stamp
from charlm.errors import FileFormatError, InputError
from charlm.files.reading import OpenFile, read_file, refusal
from charlm.plain import as_path
from charlm.text.tokenizer import CharTokenizer

__all__ = ["TokenFiles", "read_characters", "read_plain_pickle", "token_files"]

_MAGIC, _HEADER = 20_240_520, 1_024
_AT_ONCE = 2**20  # tokens
_MOST_PICKLE = 2**24  # bytes


@dataclass(frozen=True)
class _Part:
    """The tokens of one file, uint16 from `offset` on."""

    path: Path
    size: int
    offset: int

    @property
    def tokens(self) -> int:
        return (self.size - self.offset) // 2


class TokenFiles:
    """Token files, each of which is a document.

    Args:
        train: the files for training, which come first.
        val: the files for validation.
        meta: nanoGPT's meta.pkl, if there is one.
    """

    def __init__(self, train: Sequence[Path], val: Sequence[Path], meta: Path | None = None) -> None:
        self._train, self._val = [_part(path) for path in train], [_part(path) for path in val]
        self._meta = meta

    def key(self) -> list[object]:
        """Return values of JSON that change when the files do."""
        return [[stamp(part.path) for part in (*self._train, *self._val)], len(self._train)]

    def count(self, report: Progress) -> Counted:
        """Find the largest token, and read the tokenizer of meta.pkl."""
        parts = [*self._train, *self._val]
        ends = np.cumsum([part.tokens for part in parts])
        done = highest = 0
        for piece in self._read(parts, 0):
            highest = max(highest, int(piece.max()))
            done += 2 * len(piece)
            report("reading", done, 2 * int(ends[-1]))
        tokenizer = None if self._meta is None else read_characters(self._meta)
        vocab_size = highest + 1 if tokenizer is None else tokenizer.vocab_size
        if highest >= vocab_size:
            raise refusal(str(self._meta), f"must name all tokens, got {vocab_size}, and there is {highest}.")
        return Counted(
            tokenizer=tokenizer,
            ends=ends,
            n_chars=None if tokenizer is None else int(ends[-1]),
            n_bytes=None,
            vocab_size=vocab_size,
            max_id=highest,
            train_ids=int(ends[len(self._train) - 1]),
        )

    def pieces(self, counted: Counted, skipped: int) -> Iterator[NDArray[Any]]:
        """Yield all tokens after the first `skipped`."""
        return self._read([*self._train, *self._val], skipped)

    @staticmethod
    def _read(parts: Sequence[_Part], skipped: int) -> Iterator[NDArray[np.uint16]]:
        for part in parts:
            file = OpenFile(part.path, part.size)
            for start in range(min(skipped, part.tokens), part.tokens, _AT_ONCE):
                ids = np.empty(min(_AT_ONCE, part.tokens - start), "<u2")
                file.read_into(ids.view(np.uint8).data, part.offset + 2 * start)
                yield ids
            skipped = max(0, skipped - part.tokens)


def token_files(sources: str | Path | Sequence[str | Path]) -> TokenFiles | None:
    """Return the token files among the sources; None: the sources are texts.

    Raises:
        FileFormatError: a file of llm.c is damaged.
        InputError: the sources are token files and texts, or none is for training.
    """
    alone = sources if isinstance(sources, str | Path) else sources[0] if len(sources) == 1 else None
    folder = None if alone is None else as_path(alone)
    if folder is not None and (folder / "train.bin").is_file():
        meta, val = folder / "meta.pkl", folder / "val.bin"
        return TokenFiles(
            [folder / "train.bin"], [val] if val.is_file() else [], meta if meta.is_file() else None
        )
    several = [sources] if isinstance(sources, str | Path) else sources
    if not any(".bin" in str(source) or as_path(source).is_dir() for source in several):
        return None
    files = [as_path(file) for file in listed(several)]
    of_llmc = [
        file for file in files if file.suffix == ".bin" and file.is_file() and _header(file) is not None
    ]
    if not of_llmc:
        return None
    if len(of_llmc) < len(files):
        raise InputError("token files and texts cannot be prepared together; give one kind")
    train = [file for file in files if "val" not in file.stem]
    if not train:
        raise InputError("there must be a token file for training, one whose name does not have 'val' in it")
    return TokenFiles(train, [file for file in files if "val" in file.stem])


def _header(path: Path) -> tuple[int, int] | None:
    """Return version and number of tokens of a file of llm.c; None: it is another file."""
    size = path.stat().st_size
    if size < _HEADER:
        return None
    header = bytearray(12)
    OpenFile(path, size).read_into(header, 0)
    magic, version, tokens = struct.unpack("<3i", header)
    return (version, tokens) if magic == _MAGIC else None


def _part(path: Path) -> _Part:
    size, header = path.stat().st_size, _header(path)
    part = _Part(path, size, 0 if header is None else _HEADER)
    if header is not None and header != (1, part.tokens):
        version, tokens = header
        raise refusal(
            path, f"must be version 1 with {part.tokens} tokens by its size, got version {version}, {tokens}."
        )
    if not part.tokens or size % 2:
        raise refusal(path, f"must hold tokens of two bytes each, got {size} bytes.")
    return part


def read_characters(path: Path) -> CharTokenizer:
    """Return the tokenizer of a meta.pkl.

    Raises:
        FileFormatError: the file holds something else.
        OSError: it cannot be read.
    """
    itos = read_plain_pickle(path).get("itos")
    if not isinstance(itos, dict) or set(itos) != set(range(len(itos))):
        raise refusal(path, "must hold a dict 'itos' from the numbers 0, 1, 2 … to characters.")
    try:
        return CharTokenizer([itos[i] for i in range(len(itos))])
    except InputError as error:
        raise refusal(path, f"must hold characters in 'itos': {error}.") from error


def read_plain_pickle(path: Path) -> dict[Any, Any]:
    """Read a pickled dict of dicts, texts and integers. Nothing is executed; anything else is refused.

    Raises:
        FileFormatError: the file holds something else.
        OSError: it cannot be read.
    """
    data = bytes(read_file(path, max_bytes=_MOST_PICKLE))
    stack: list[Any] = []
    memo: list[Any] = []
    numbered: dict[int, Any] = {}
    mark = object()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name in _VALUES:
                stack.append(_VALUES[name] if argument is None else argument)
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "MARK":
                stack.append(mark)
            elif name in {"SETITEM", "SETITEMS"}:
                start = len(stack) - 2 if name == "SETITEM" else len(stack) - 1 - stack[::-1].index(mark)
                items = stack[start + (name == "SETITEMS") :]
                del stack[start:]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            elif name == "MEMOIZE":
                memo.append(stack[-1])
                numbered[len(memo) - 1] = stack[-1]
            elif name in {"BINPUT", "LONG_BINPUT"}:
                numbered[int(argument or 0)] = stack[-1]
            elif name in {"BINGET", "LONG_BINGET"}:
                stack.append(numbered[int(argument or 0)])
            elif name not in {"PROTO", "FRAME", "STOP"}:
                raise refusal(path, f"must hold dicts, texts and integers alone, got a pickle with {name}.")
        (value,) = stack
    except FileFormatError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise refusal(path, f"must be a pickled dict, got something else: {error}.") from error
    if not isinstance(value, dict):
        raise refusal(path, "must hold a dict.")
    return value


_VALUES: dict[str, object] = dict.fromkeys(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "NONE")
)
_VALUES |= {"NEWTRUE": True, "NEWFALSE": False}
