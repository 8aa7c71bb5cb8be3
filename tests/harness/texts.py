"""Small texts of many kinds, each drawn anew and always the same, to try promises on more than English."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from charlm.testing import tiny_corpus

__all__ = ["LONG", "TEXTS"]

_LENGTH = 3_000
_ENGLISH = tiny_corpus(_LENGTH)
_LINES = _ENGLISH.splitlines()


def _words(draw: random.Random, letters: Sequence[str], count: int, longest: int = 7) -> list[str]:
    """Return words of letters of which the first are by far the most frequent."""
    weights = [1 / (i + 1) for i in range(len(letters))]
    return ["".join(draw.choices(letters, weights, k=draw.randint(1, longest))) for _ in range(count)]


def _sentences(draw: random.Random, words: Sequence[str], stop: str, space: str = " ") -> str:
    """Return lines of these words, about as long as the other texts, each with a full stop."""
    lines: list[str] = []
    while sum(map(len, lines)) < _LENGTH:
        lines.append(space.join(draw.choices(words, k=draw.randint(3, 9))) + stop + "\n")
    return "".join(lines)


def _chinese_like(draw: random.Random) -> str:
    letters = list(map(chr, draw.sample(range(0x4E00, 0x9FA6), 500)))
    return _sentences(draw, _words(draw, letters, 900, longest=3), "。", "")


def _arabic_like(draw: random.Random) -> str:
    letters = list(map(chr, [*range(0x0627, 0x063B), *range(0x0641, 0x064B)]))
    marked = [
        letter + draw.choice(["", "", "\u064e", "\u064f", "\u0650", "\u0651\u064e"]) for letter in letters
    ]
    return _sentences(draw, [*_words(draw, marked, 200), "\u0661\u0662\u0663", "\u200f2024\u200f"], "\u061f")


def _emoji_and_astral(draw: random.Random) -> str:
    whole = [
        "\U0001f600",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\U0001f44d\U0001f3fd",
        "\U0001f1eb\U0001f1f7",
        "\u2764\ufe0f\u200d\U0001f525",
        "\U00020000\U0002a6d6",
        "\U00010348",
        "\U0001d518",
        "\U0010ffff",
    ]
    return _sentences(
        draw, [*whole, *_words(draw, list("\U0001f431\U0001f436ok"), 60)], "\U0001f44b\U0001f3ff"
    )


def _source_code(draw: random.Random) -> str:
    pieces = [
        *("if (a[i] != '\\n') {", "}", "return f(x, &y) ? 0x1F : ~z;", "// TODO: 100 % </script>", ""),
        *("#define MAX(a, b) ((a) > (b) ? (a) : (b))", 'char *s = "<b>\\t%d\\x1b[0m&amp;";', "{TEXT} %DATA%"),
        *("while (*p++ |= 1 << 3) { $x^=`y`; @z }", "    spaces instead = 4;  ", "-- --help"),
    ]
    lines: list[str] = []
    depth = 0
    while sum(map(len, lines)) < _LENGTH:
        depth = max(0, min(4, depth + draw.choice([-1, 0, 1])))
        lines.append("\t" * depth + draw.choice(pieces) + "\n")
    return "".join(lines)


def _mixed_line_ends(draw: random.Random) -> str:
    return "".join(line + draw.choice(["\n", "\r\n", "\r", "\n\r", "\r\r\n"]) for line in _LINES)


def _sorted_word_list(draw: random.Random) -> str:
    words = set(_words(draw, draw.sample("abcdefghijklmnopqrstuvwxyz", 26), 600, longest=9))
    return "\n".join(sorted(words)) + "\n"


def _large_vocabulary(draw: random.Random) -> str:
    blocks = (range(0xA1, 0x250), range(0x400, 0x530), range(0xA000, 0xA48D), range(0xAC00, 0xD7A4))
    characters = [chr(code) for block in blocks for code in draw.sample(block, 190)]
    twice = characters + draw.sample(characters, len(characters) // 3)
    draw.shuffle(twice)
    return "".join(twice)


def _controls(draw: random.Random) -> str:
    odd = [*map(chr, range(0x20)), "\x7f", "\x85", "\x9b", "\xad", "\u061c", "\u200b", "\u2028", "\u2029"]
    odd += [
        "\u202e",
        "\u2066",
        "\ufeff",
        "\ufffd",
        "\ufffe",
        "\ue000",
        "\x1b[2J",
        "\x1b]0;title\x07",
        "\x00\x00",
    ]
    return "".join(word + draw.choice([" ", " ", " ", *odd]) for word in _ENGLISH.split())


def _decomposed(draw: random.Random) -> str:
    words = ["Tiếng", "Việt", "được", "những", "Äpfel", "größer", "señor", "Ångström", "façade", "각하", "ệ"]
    return unicodedata.normalize("NFD", _sentences(draw, words, "!"))


def _white_space(draw: random.Random) -> str:
    return "".join(draw.choices(" \t\n\xa0\u3000\u2003", [9, 2, 2, 1, 1, 1], k=_LENGTH))


_MADE: dict[str, Callable[[random.Random], str]] = {
    # What most other tests use.
    "english-like": lambda _: _ENGLISH,
    # Hundreds of characters of three bytes each, and no spaces between words.
    "chinese-like": _chinese_like,
    # From right to left, with combining marks, marks of direction and digits of its own.
    "arabic-like": _arabic_like,
    # Four bytes and two units of UTF-16 each, several to one picture, up to the last code point.
    "emoji and astral": _emoji_and_astral,
    # Tabs, deep and trailing spaces, backslashes, and what HTML, C and format strings take for their own.
    "source code": _source_code,
    # Line ends of two characters, which reading and writing text like to change.
    "windows": lambda _: "\r\n".join([*_LINES, ""]),
    # Not one line feed, though there are lines; a carriage return sends a terminal back.
    "old mac": lambda _: "\r".join([*_LINES, ""]),
    # Line ends of every sort, some that look like others side by side.
    "mixed line ends": _mixed_line_ends,
    # Validation is unlike training, and some of its letters may be new.
    "sorted word list": _sorted_word_list,
    # Nothing is left to learn, a loss comes down to nearly 0, and training and validation share all.
    "repetitive": lambda _: "ab " * (_LENGTH // 3),
    # A vocabulary of one: no choice, no entropy, losses of exactly 0.
    "one character": lambda _: "a" * _LENGTH,
    # The smallest vocabulary with a choice, without any pattern.
    "two characters": lambda draw: "".join(draw.choices("01", k=_LENGTH)),
    # Each character occurs once or twice: ids of two bytes, and validation has characters of its own.
    "large vocabulary": _large_vocabulary,
    # One line of everything: an empty prompt cannot begin after a line feed.
    "no newline": lambda _: " ".join(_LINES),
    # What moves a cursor, ends a C string, or cannot be seen; and a code point that is no character.
    "controls": _controls,
    # Letters apart from their accents (NFD), which nobody may put together again.
    "decomposed": _decomposed,
    # A text that could be taken for numbers.
    "digits only": lambda draw: "".join(draw.choices("0123456789", k=_LENGTH)),
    # Nothing that strip() would leave.
    "white space": _white_space,
    # A mark at the beginning that decoders like to eat.
    "byte order mark": lambda _: "\ufeff" + _ENGLISH,
    # Enough for a tokenizer, too little for a split into blocks.
    "very short": lambda _: "to be or not to be!\n",
}

TEXTS: Mapping[str, str] = MappingProxyType({kind: make(random.Random(kind)) for kind, make in _MADE.items()})
"""A text of each kind, a few thousand characters long unless its kind says otherwise."""

LONG: Mapping[str, str] = MappingProxyType({kind: text for kind, text in TEXTS.items() if len(text) >= 500})
"""Those that are long enough to be split into training and validation."""
