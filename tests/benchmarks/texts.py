"""Texts of many kinds and lengths, made or gathered from packages, for `benchmarks.minutes`.

Nothing is downloaded and nothing is kept in the repository. What comes from a package is left out with a line
where the package is missing:

    apt-get install bible-kjv bible-kjv-text debian-reference-zh-cn wamerican-huge

    cd tests
    python -m benchmarks.texts FOLDER
"""

from __future__ import annotations

import argparse
import html
import random
import re
import subprocess
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path

from charlm import load_corpus

__all__ = ["TEXTS", "main"]

_SUFFIXES = {".py", ".h", ".hpp", ".md", ".rst", ".txt", ".pyi", ".json", ".csv", ".cuh"}


def main(argv: Sequence[str] | None = None) -> None:
    """Write each text into the folder, but those that are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("only", nargs="*", help=f"names, default all: {' '.join(TEXTS)}")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.only or TEXTS:
        path = args.folder / f"{name}.txt"
        if not path.exists():
            try:
                path.write_text(TEXTS[name](), encoding="utf-8")
            except FileNotFoundError as error:
                print(f"{name}: left out, {error}")
                continue
        print(f"{name}: {path.stat().st_size:,} bytes")


def _short() -> str:
    return load_corpus("tinyshakespeare")[:20_000]


def _bible() -> str:
    """The King James Version, a verse a line, as Debian's program `bible` writes it."""
    done = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=True)
    return done.stdout


def _stdlib() -> str:
    """Python's standard library, without its tests, up to 4.7 million characters."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (p for p in sorted(root.rglob("*.py")) if not {"test", "tests", "site-packages"} & {*p.parts})
    return _joined(files, 4_700_000)


def _chinese() -> str:
    """Debian's reference in Chinese, without its markup."""
    pages = sorted(Path("/usr/share/debian-reference").glob("*.zh-cn.html"))
    if not pages:
        raise FileNotFoundError("debian-reference-zh-cn is not installed")
    plain = (re.sub(r"<[^>]*>", "", page.read_text(encoding="utf-8")) for page in pages)
    return re.sub(r"\n\s*\n+", "\n\n", html.unescape("".join(plain)))


def _words() -> list[str]:
    path = Path("/usr/share/dict/american-english-huge")
    return sorted({word for word in path.read_text(encoding="utf-8").split() if "'" not in word})


def _words_sorted() -> str:
    return "\n".join(_words()) + "\n"


def _words_shuffled() -> str:
    words = _words()
    random.Random(1).shuffle(words)
    return "\n".join(words) + "\n"


def _chess() -> str:
    """Random games of a knight, a king and a rook that do not meet, in the notation of chess."""
    draw = random.Random(2)
    games = []
    for number in range(1, 9_000):
        square = {"N": (1, 0), "K": (4, 0), "R": (7, 7)}
        moves = []
        for turn in range(1, draw.randint(12, 40)):
            piece = draw.choice("NKR")
            square[piece] = draw.choice(list(_reached(piece, square[piece])))
            file, rank = square[piece]
            moves.append(f"{turn}. {piece}{'abcdefgh'[file]}{rank + 1}")
        games.append(f'[Game "{number}"]\n{" ".join(moves)} {draw.choice(["1-0", "0-1", "1/2-1/2"])}\n')
    return "\n".join(games)


def _reached(piece: str, square: tuple[int, int]) -> Iterator[tuple[int, int]]:
    x, y = square
    for dx in range(-7, 8):
        for dy in range(-7, 8):
            far = (abs(dx), abs(dy))
            fits = {"N": sorted(far) == [1, 2], "K": max(far) == 1, "R": min(far) == 0 < max(far)}[piece]
            if fits and 0 <= x + dx < 8 and 0 <= y + dy < 8:
                yield x + dx, y + dy


def _dna() -> str:
    """Four letters by a chain that knows the last six, with motifs that come again, 70 a line."""
    draw = random.Random(3)
    chain_of: dict[str, list[float]] = {}
    motifs = ["".join(draw.choices("ACGT", k=draw.randint(20, 80))) for _ in range(40)]
    letters = list("ACGTAC")
    while len(letters) < 1_500_000:
        if draw.random() < 0.002:
            letters += draw.choice(motifs)
        behind = "".join(letters[-6:])
        if behind not in chain_of:
            chain_of[behind] = [draw.gammavariate(0.7, 1) for _ in range(4)]
        letters += draw.choices("ACGT", chain_of[behind])
    row = "".join(letters)
    return "\n".join(row[i : i + 70] for i in range(0, len(row), 70)) + "\n"


def _chat() -> str:
    """Lines of a made conversation, with emoji of every plane."""
    draw = random.Random(4)
    codes = chain(range(0x1F300, 0x1F650), range(0x2600, 0x2700))
    emoji = [chr(code) for code in codes if unicodedata.name(chr(code), "")]
    weights = [1 / (n + 1) for n in range(len(emoji))]
    names = ["ana", "ben", "chloé", "dmitri", "emeka", "fatıma", "gül", "hiro"]
    words = [word for word in re.findall(r"[a-z']+", load_corpus("python-docs").lower()) if len(word) < 9]
    lines = []
    for minute in range(14_000):
        said = " ".join(draw.choices(words, k=draw.randint(1, 9)))
        smile = "".join(draw.choices(emoji, weights, k=draw.choice([0, 0, 1, 1, 2, 3])))
        time = f"{minute // 60 % 24:02}:{minute % 60:02}"
        lines.append(f"[{time}] {draw.choice(names)}: {said} {smile}".rstrip())
    return "\n".join(lines) + "\n"


def _large() -> str:
    """Source code, headers and data of the installed packages, 200 million characters."""
    root = Path(sysconfig.get_path("purelib"))
    files = [p for p in sorted(root.rglob("*")) if p.suffix in _SUFFIXES and p.is_file()]
    random.Random(5).shuffle(files)
    return _joined(chain.from_iterable(files for _ in count()), 200_000_000)


def _joined(files: Iterator[Path], most: int) -> str:
    parts, length = [], 0
    for file in files:
        try:
            part = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        parts.append(part)
        length += len(part)
        if length >= most:
            break
    return "".join(parts)[:most]


TEXTS: dict[str, Callable[[], str]] = {
    "short": _short,
    "chat": _chat,
    "python-docs": lambda: load_corpus("python-docs"),
    "shakespeare": lambda: load_corpus("tinyshakespeare"),
    "dna": _dna,
    "chess": _chess,
    "chinese": _chinese,
    "words-sorted": _words_sorted,
    "words-shuffled": _words_shuffled,
    "bible": _bible,
    "stdlib": _stdlib,
    "large": _large,
}

if __name__ == "__main__":
    main()
