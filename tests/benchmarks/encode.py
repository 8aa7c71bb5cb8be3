"""Megabytes of UTF-8 a second, of encoding and decoding characters.

And of preparing the text on disk, in a file system in memory where there is one. Two texts: the corpus,
repeated (ASCII, if it is Tiny Shakespeare), and words drawn from alphabets of one, two, three and four bytes
a character. Beside charlm's functions stand the lecture's: a list comprehension over a dictionary, and a
join. One process, in turns.

    cd tests
    python -m benchmarks.encode --json encode.json
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common import Json, in_turns, machine, new_parser, report, spread, table

from charlm import CharTokenizer, load_corpus
from charlm.data.prepare import prepare_corpus

__all__ = ["main"]

_ALPHABETS = (  # first and last code point: one, two, two, three and four bytes a character
    (0x61, 0x7A),
    (0x3B1, 0x3C9),
    (0x430, 0x44F),
    (0x4E00, 0x51FF),
    (0x1F600, 0x1F64F),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Time all functions on both texts in turns and report."""
    parser = new_parser(__doc__)
    parser.add_argument("--megabytes", type=float, default=10, help="of each text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.quick:
        args.megabytes, args.rounds = 0.02, 2
    measured_on = machine()
    size = int(args.megabytes * 1e6)
    corpus = load_corpus(args.data)
    texts = {"corpus": _repeated(corpus, size), "any text": _any_text(size)}
    results: Json = {}
    for name, text in texts.items():
        megabytes = len(text.encode()) / 1e6
        with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            seconds = in_turns({**_functions(text), **_preparing(text, Path(folder))}, args.rounds)
        results[name] = {
            "characters": len(text),
            "megabytes": megabytes,
            "vocab_size": len(set(text)),
            "ascii": text.isascii(),
            "megabytes_per_second": {
                function: spread([megabytes / s for s in times]) for function, times in seconds.items()
            },
        }
    report("encode", args, measured_on=measured_on, settings={}, results=results, text=_text(results))


def _functions(text: str) -> dict[str, Callable[[], object]]:
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode_array(text)
    id_list = ids.tolist()
    stoi = {character: i for i, character in enumerate(tokenizer.vocab)}
    itos = dict(enumerate(tokenizer.vocab))
    return {
        "encode_array": lambda: tokenizer.encode_array(text),
        "encode": lambda: tokenizer.encode(text),
        "lecture's encode": lambda: [stoi[c] for c in text],
        "decode of an array": lambda: tokenizer.decode(ids),
        "decode of a list": lambda: tokenizer.decode(id_list),
        "lecture's decode": lambda: "".join([itos[i] for i in id_list]),
    }


def _preparing(text: str, folder: Path) -> dict[str, Callable[[], object]]:
    (folder / "text").write_text(text, encoding="utf-8", newline="")

    def prepare() -> None:
        shutil.rmtree(folder / "data", ignore_errors=True)
        prepare_corpus(folder / "text", folder / "data")

    return {"prepare_corpus": prepare}


def _repeated(text: str, size: int) -> str:
    return (text * (size // len(text) + 1))[:size]


def _any_text(size: int) -> str:
    """Return words, each from one alphabet, of about `size` bytes in all; always the same for one size."""
    draw = random.Random(1337)
    words: list[str] = []
    bytes_so_far = 0
    while bytes_so_far < min(size, 1_000_000):  # drawing is slow; what is longer repeats
        first, last = draw.choice(_ALPHABETS)
        word = "".join(chr(draw.randint(first, last)) for _ in range(draw.randint(2, 9)))
        words.append(word)
        bytes_so_far += len(word.encode()) + 1
    return (" ".join(words) + "\n") * max(1, round(size / bytes_so_far))


def _text(results: Json) -> str:
    rows = [
        [
            name,
            function,
            f"{mb['median']:,.1f}",
            f"{mb['least']:,.1f} to {mb['most']:,.1f}",
        ]
        for name, values in results.items()
        for function, mb in values["megabytes_per_second"].items()
    ]
    return table(["text", "function", "MB/s", "range"], rows)


if __name__ == "__main__":
    main()
