"""`charlm compress`: files in fewer bytes and back. The options are gzip's, but the input stays."""

from __future__ import annotations

import argparse
import os
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from charlm.cli.output import Console, UsageError, aligned, check_output, emit, refuse, writing
from charlm.cli.preparing import Bar
from charlm.cli.signals import Signals
from charlm.compression.archive import ArchiveInfo, archive_info, block_of
from charlm.compression.codec import compress, decompress, recover
from charlm.errors import CharLMError, FileFormatError, quoted
from charlm.files.atomic import write_file
from charlm.lm import CharLM, load
from charlm.terminal import escaped
from charlm.text.corpus import load_corpus

__all__ = ["run"]

_SUFFIX = ".clm"


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Process the files in order. The first error ends the command."""
    _check(args)
    if args.list:
        _list(args.files, console)
        return 0
    targets = [_target(file, args) for file in args.files]
    model = None if args.model is None else _model(args.model, args.encoding)
    code = 0
    for file, target in zip(args.files, targets, strict=True):
        try:
            if args.test:
                _test(file, model, console)
            elif model is not None:
                code |= _do(file, target, model, args, console)
        except CharLMError as error:
            raise CharLMError(f"{quoted(file)}: {error}") from error
    return code


def _is_backwards(args: argparse.Namespace) -> bool:
    return args.command == "decompress" or bool(args.decompress)


def _check(args: argparse.Namespace) -> None:
    problems = []
    if not args.files:
        problems += ["a FILE is needed, or - for standard input"]
    if args.model is None and not (args.list or args.test):
        problems += ["-m MODEL is needed"]
    if args.list and args.test:
        problems += ["-l and -t exclude each other; give one of them"]
    if args.recover and not _is_backwards(args):
        problems += ["--recover is for decompressing"]
    refuse(problems)


def _target(file: str, args: argparse.Namespace) -> Path | None:
    """Return the file to write, or None for standard output and with --test.

    Raises:
        CharLMError: the file cannot be written.
    """
    backwards = _is_backwards(args)
    if args.test:
        return None
    if args.stdout or file == "-":
        if not backwards and not args.force and _is_terminal():
            raise UsageError("compressed bytes are nothing for a terminal; -f writes them all the same")
        return None
    path = Path(file)
    if backwards != (path.suffix == _SUFFIX):
        what = "has not" if backwards else "has already"
        raise UsageError(f"{quoted(file)} {what} the suffix {_SUFFIX}; -c writes to standard output")
    target = path.with_suffix("") if backwards else path.with_name(path.name + _SUFFIX)
    if target.exists() and not args.force:
        raise CharLMError(f"{quoted(str(target))} is there already; -f overwrites it")
    check_output(target)
    return target


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _model(name: str, encoding: str) -> CharLM | str:
    return load(name, device="cpu") if Path(name).is_dir() else load_corpus(name, encoding=encoding)


def _read(file: str) -> bytes:
    return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()


def _do(
    file: str, target: Path | None, model: CharLM | str, args: argparse.Namespace, console: Console
) -> int:
    """Compress or decompress one file, and return the exit code."""
    began, data, backwards, lost = time.perf_counter(), _read(file), _is_backwards(args), 0
    with Bar(console) as bar:
        if not backwards:
            made = compress(data, model, on_progress=lambda done, of: bar.tell("compressing", done, of))
        elif not args.recover:
            made = decompress(data, model, on_progress=lambda done, of: bar.tell("decompressing", done, of))
        else:
            parts = recover(data, model, on_progress=lambda done, of: bar.tell("decompressing", done, of))
            made, lost = b"".join(part for part in parts if part is not None), parts.count(None)
            for number in [number for number, part in enumerate(parts, 1) if part is None]:
                console.complain(f"{escaped(file)}: block {number} of {len(parts)} is lost")
    if target is None:
        sys.stdout.buffer.write(made)
        sys.stdout.buffer.flush()
    else:
        mode = stat.S_IMODE(Path(file).stat().st_mode)
        before = os.umask(0o777 & ~mode)  # the new file gets no more permissions than the old one
        try:
            with writing(target):
                write_file(target, made)
        finally:
            os.umask(before)
    small, large = (data, made) if backwards else (made, data)
    ratio = f"{8 * len(small) / len(large):.3f} bits per byte" if large else "nothing in it"
    seconds = time.perf_counter() - began
    console.say(
        f"{escaped(file)}: {len(data):,} to {len(made):,} bytes, {ratio}, in {seconds:.1f} s "
        f"({len(large) / 1e3 / seconds:,.0f} kB/s)"
    )
    return int(lost > 0)


def _test(file: str, model: CharLM | str | None, console: Console) -> None:
    """Raise an error if a compressed file is damaged or, with a model, does not decompress."""
    data = _read(file)
    if model is not None:
        with Bar(console) as bar:
            decompress(data, model, on_progress=lambda done, of: bar.tell("decompressing", done, of))
        console.say(f"{escaped(file)}: decompresses to the original bytes")
        return
    info = archive_info(data)
    lost = [number + 1 for number in range(len(info.blocks)) if block_of(data, info, number) is None]
    if lost or len(data) != info.size:
        where = f"of its {len(info.blocks)} blocks {', '.join(map(str, lost[:10]))}" if lost else "its size"
        raise FileFormatError(f"it is damaged or cut short: {where}")
    console.say(f"{escaped(file)}: its checksums are right")


def _list(files: Sequence[str], console: Console) -> None:
    rows = [["compressed", "bytes", "bits per byte", "model", "sha256", "name"]]
    for file in files:
        try:
            info: ArchiveInfo = archive_info(_read(file))
        except CharLMError as error:
            raise CharLMError(f"{quoted(file)}: {error}") from error
        kind = f"{info.kind} of a text" if info.settings else info.kind
        ratio = f"{8 * info.size / info.n_bytes:.3f}" if info.n_bytes else "-"
        sha256 = info.model_sha256 if console.verbose else info.model_sha256[:12]
        rows.append([f"{info.size:,}", f"{info.n_bytes:,}", ratio, kind, sha256, escaped(file)])
    emit(aligned(rows))
