"""Bits per character and speed of charlm's compression, beside gzip, bzip2, xz and zstd.

The first 0.9 of the text are known to both sides, the rest is compressed. charlm counts an n-gram model of
the known part; --models adds runs or saved models that were trained on it. The others are measured alone,
and xz and zstd also with the known part before the text: what of it they make shorter. Sizes are of whole
files; "with the model" adds what a receiver who has nothing needs: the known part in xz, or the weights.

    cd tests
    python -m benchmarks.compression --models runs/one --json compression.json
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import Json, announce, machine, new_parser, report, table

from charlm import CharLM, load, load_corpus
from charlm.compression import compress, decompress

__all__ = ["main"]

Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]

_XZ = 9 | lzma.PRESET_EXTREME


def main(argv: Sequence[str] | None = None) -> None:
    """Compress and decompress with each, once, and report."""
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="*", default=[], metavar="RUN", help="trained on the first 0.9")
    parser.add_argument("--chars", type=int, metavar="N", help="compress at most so many (default: all)")
    args = parser.parse_args(argv)
    measured_on = machine()
    text = load_corpus(args.data)
    at = int(0.9 * len(text))
    most = 300 if args.quick else args.chars
    known, new = text[:at], text[at:][:most]
    packed = len(lzma.compress(known.encode(), preset=_XZ))
    codecs: dict[str, tuple[Codec, int | None]] = {
        "gzip -9": ((gzip.compress, gzip.decompress), None),
        "bzip2 -9": ((bz2.compress, bz2.decompress), None),
        "xz -9e": ((lambda data: lzma.compress(data, preset=_XZ), lzma.decompress), None),
    }
    if zstd := shutil.which("zstd"):
        codecs["zstd -19"] = _zstd(zstd, None), None
        codecs["zstd -19, known text"] = _zstd(zstd, known.encode()), packed
    codecs["charlm, n-grams of the known text"] = _ours(known), packed
    for name in args.models:
        lm = load(name, device="cpu")
        weights = sum(tensor.nbytes for tensor in lm.model.state_dict().values())
        codecs[f"charlm, {lm.model.kind} {Path(name).name}"] = _ours(lm), weights
    data = new.encode()
    results: Json = {name: _measured(codec, data, len(new), more) for name, (codec, more) in codecs.items()}
    rows = [
        [
            name,
            f"{one['bytes']:,}",
            f"{one['bits_per_char']:.3f}",
            f"{one['bytes_with_model']:,}" if one["bytes_with_model"] else "",
            f"{one['compress_kb_per_second']:,.0f}",
            f"{one['decompress_kb_per_second']:,.0f}",
        ]
        for name, one in results.items()
    ]
    head = ["", "bytes", "bits per character", "with the model", "kB/s", "back, kB/s"]
    settings = {"known_chars": len(known), "chars": len(new), "bytes": len(data)}
    report(
        "compression",
        args,
        measured_on=measured_on,
        settings=settings,
        results=results,
        text=table(head, rows),
    )


def _measured(codec: Codec, data: bytes, chars: int, more: int | None) -> Json:
    forth, back = codec
    began = time.perf_counter()
    small = forth(data)
    middle = time.perf_counter()
    if back(small) != data:
        raise SystemExit("what came back is not what was compressed")
    ended = time.perf_counter()
    announce(f"{len(small):,} bytes in {ended - began:.1f} s")
    return {
        "bytes": len(small),
        "bits_per_char": 8 * len(small) / chars,
        "bytes_with_model": None if more is None else len(small) + more,
        "compress_kb_per_second": len(data) / 1e3 / (middle - began),
        "decompress_kb_per_second": len(data) / 1e3 / (ended - middle),
    }


def _ours(model: CharLM | str) -> Codec:
    return (lambda data: compress(data, model)), (lambda data: decompress(data, model))


def _zstd(program: str, known: bytes | None) -> Codec:
    """Return the command as a codec; with a known text it takes what is new relative to that."""

    def call(data: bytes, *options: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "in").write_bytes(data)
            if known is not None:
                (Path(folder) / "known").write_bytes(known)
                options = (*options, f"--patch-from={folder}/known")
            words = [program, "-qq", *options, f"{folder}/in", "-o", f"{folder}/out"]
            subprocess.run(words, check=True)
            return (Path(folder) / "out").read_bytes()

    return (lambda data: call(data, "-19")), (lambda data: call(data, "-d"))


if __name__ == "__main__":
    main()
