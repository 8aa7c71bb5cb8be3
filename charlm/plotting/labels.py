"""Labels of pictures: every character is readable.

A newline is ↵, a tab ⇥, a space ␣. A character without a shape of its own (a control character, a combining
mark) or without a glyph in the installed fonts is shown by its code point, such as U+4E00. matplotlib would
draw an empty box and warn.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

from charlm.text.tokenizer import ByteTokenizer, Tokenizer

if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties

__all__ = ["readable", "token_labels"]

_SYMBOLS = {"\n": "↵", "\t": "⇥", " ": "␣"}


def token_labels(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Return a label for each id: its character, or the number of a byte that is only a part of one.

    Args:
        tokenizer: of the ids.
        ids: token ids.

    Raises:
        InputError: an id is out of range.

    Example:
        >>> from charlm import ByteTokenizer
        >>> token_labels(ByteTokenizer(), ByteTokenizer().encode("né"))
        ['n', '0xC3', '0xA9']
    """
    of_bytes = isinstance(tokenizer, ByteTokenizer)
    texts = [(i, tokenizer.decode([i])) for i in ids]
    return [f"0x{i:02X}" if of_bytes and i > 127 else text for i, text in texts]


def readable(
    texts: Iterable[str], properties: FontProperties, *, spaces: bool = True
) -> tuple[list[str], list[str]]:
    """Return texts that fonts can draw, and the families of these fonts.

    Args:
        texts: any.
        properties: the font. Characters that it lacks are looked up in all installed fonts.
        spaces: show spaces by a symbol, too.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font  # noqa: PLC0415 - an extra

    fonts = []
    for family in properties.get_family():  # matplotlib tries each, too
        one = FontProperties(family=family, style=properties.get_style(), weight=properties.get_weight())
        try:
            fonts.append(get_font(findfont(one, fallback_to_default=False)))
        except ValueError:  # not installed
            continue
    fonts = fonts or [get_font(findfont(properties))]
    texts = list(texts)
    symbols = {c: _SYMBOLS.get(c, c) if spaces or c != " " else " " for c in set().union(*texts)}
    alone = {s for s in symbols.values() if s.isprintable() and not unicodedata.category(s).startswith("M")}
    lacking = {symbol for symbol in alone if not any(font.get_char_index(ord(symbol)) for font in fonts)}
    families = [*properties.get_family(), *_families_with(lacking)]

    def drawn(character: str) -> str:
        symbol = symbols[character]
        return symbol if symbol in alone and symbol not in lacking else f"U+{ord(character):04X}"

    return ["".join(map(drawn, text)) for text in texts], families


def _families_with(characters: set[str]) -> list[str]:
    """Return installed families that have the characters, and remove these characters from the set."""
    from matplotlib.font_manager import fontManager, get_font  # noqa: PLC0415 - an extra

    families = []
    for entry in sorted(
        fontManager.ttflist, key=lambda entry: (entry.style, entry.weight != 400, entry.name)
    ):
        if not characters:
            break
        if entry.style != "normal" or entry.name in families or "Last Resort" in entry.name:  # only boxes
            continue
        try:
            font = get_font(entry.fname)
        except (OSError, RuntimeError):  # damaged, or removed since matplotlib made its list
            continue
        if covered := {character for character in characters if font.get_char_index(ord(character))}:
            families.append(entry.name)
            characters -= covered
    return families
