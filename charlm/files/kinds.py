"""The kind of a file by its first bytes, for files that are no text, JSON or weights.

Each answer completes "got …" in a reader's message, with advice: "a pointer of Git LFS; fetch the file itself
with git lfs pull".
"""

from __future__ import annotations

import codecs
import re
from collections import Counter

__all__ = ["GZIP", "encoding_of", "kind_of", "other_than_data"]

GZIP = rb"\x1f\x8b\x08[\0-\x1f]"  # no UTF-8 text begins like this, and no likely one in UTF-16

_SAMPLE = 4096  # bytes that are examined
_UNPACK = "; unpack it, and give the files in it"
_PICKLE = "a pickle, which could run code; save its tensors with safetensors.torch.save_file"
_PICKLED = rb"\x80[\x02-\x05]"
# A text about such files may begin with their first letters, so each pattern has bytes that no text has
# there. The first match counts.
_KINDS = {
    rb"version https://git-lfs\.github\.com/spec/v\d+\r?\n(ext-[^\n]*\n)*oid sha256:": (
        "a pointer of Git LFS; fetch the file itself with git lfs pull"
    ),
    rb"/annex/objects/[A-Z0-9]+(-[smSC]\d+)*--\S": (
        "a pointer of git-annex; fetch the file itself with git annex get"
    ),
    rb"..[\x00-\x0f]\0{5}\{": "safetensors, which are weights; give a text",
    GZIP: "gzip; unpack it with gunzip",
    rb"\xfd7zXZ\0": "xz; unpack it with unxz",
    rb"BZh[1-9]1AY&SY.{4}[\0-\x06]": "bzip2; unpack it with bunzip2",
    rb"\x28\xb5\x2f\xfd": "zstd; unpack it with unzstd",
    rb"PK\x03\x04.{26,90}/data\.pkl": _PICKLE,  # torch.save
    _PICKLED: _PICKLE,
    rb"PK\x03\x04": "a zip archive, as .docx and .epub are; unpack it, or save its text in UTF-8",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive" + _UNPACK,
    rb"Rar!\x1a\x07": "a RAR archive" + _UNPACK,
    rb".{257}ustar(\0|  \0)": "a tar archive" + _UNPACK,
    rb"%PDF-\d\.\d[ \t]*[\r\n]": "a PDF; extract its text, with pdftotext for example",
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a document of an old Office; save its text in UTF-8",
    rb"SQLite format 3\0": "an SQLite database; export its text",
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a.{0,6}\0": "a picture; give the text itself",
}
# Byte order marks, longer ones before their beginnings.
_MARKED = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# The width of a character, the place of its high byte, and a decoder that imports no codec.
_UNMARKED = {
    "UTF-32LE": (4, 3, codecs.utf_32_le_decode),
    "UTF-32BE": (4, 0, codecs.utf_32_be_decode),
    "UTF-16LE": (2, 1, codecs.utf_16_le_decode),
    "UTF-16BE": (2, 0, codecs.utf_16_be_decode),
}
_LAST = "\U0003ffff"  # there are no letters behind it
_SPACES = b"\t\n\v\f\r"
_ODD = bytes(range(32)).translate(None, _SPACES)  # control characters that no text has many of
_NO_SCRIPT = bytes([0, *range(32, 256)])


def kind_of(data: bytes | bytearray, *, wide: bool = False) -> str | None:
    r"""Return the kind of a file that can be no text, or None.

    Args:
        data: its first bytes, or all of them.
        wide: the file is declared as UTF-16 or UTF-32, where the first two bytes of a pickle are a letter.

    Example:
        >>> kind_of(b"%PDF-1.7\n"), kind_of(b"It was a bright cold day"), kind_of(b"")
        ('a PDF; extract its text, with pdftotext for example', None, None)
    """
    for pattern, kind in _KINDS.items():
        if re.match(pattern, data, re.DOTALL) and not (wide and pattern == _PICKLED):
            return kind
    return None


def encoding_of(data: bytes | bytearray) -> str | None:
    r"""Return the encoding of a text in UTF-16 or UTF-32, with a byte order mark or without, or None.

    Without a mark, two properties identify it. Most high bytes of the characters are NULs or, beside some
    NULs, one or two control characters, those of a script; and the decoded text has no control characters.
    So UTF-8 may hold control characters, and also NULs unless nearly every second byte is one. (Chinese and
    other scripts have larger high bytes, and are not valid as UTF-8.)

    Args:
        data: the first bytes of a file, or all of them.

    Returns:
        A name that both Python and iconv know.

    Example:
        >>> encoding_of("bright and cold".encode("utf-16-le")), encoding_of(b"bright\0and\0cold\0days\0")
        ('UTF-16LE', None)
    """
    for mark, encoding in _MARKED.items():
        if data.startswith(mark):
            return encoding
    sample = bytes(data[: min(_SAMPLE, len(data) // 4 * 4)])
    if len(sample) < 16:  # too short to tell
        return None
    for encoding, (width, place, decode) in _UNMARKED.items():
        high, low = sample[place::width], sample[place ^ 1 :: width]
        script = bytes(byte for byte, _ in Counter(high.translate(None, _NO_SCRIPT)).most_common(2))
        # The high byte of Devanagari is a tab, of others a line end: then low bytes are controls, too.
        told = _share(high, b"\0") >= 0.01 and (
            _share(high, b"\0" + script.translate(None, _SPACES)) >= 0.75
            or (_share(high, b"\0" + script) >= 0.75 and _share(low, _ODD[1:]) >= 0.05)
        )
        text = decode(sample, "replace", False)[0] if told else ""  # may end inside one
        if text and max(text) <= _LAST and not set(_ODD.decode() + "\ufffd") & set(text):
            return encoding
    return None


def _share(part: bytes, among: bytes) -> float:
    return 1 - len(part.translate(None, among)) / len(part)


def other_than_data(data: bytes | bytearray) -> str | None:
    """Return the kind of a file that is neither JSON nor safetensors, or None.

    Args:
        data: its first bytes, or all of them.

    Example:
        >>> other_than_data(b"<!DOCTYPE html><title>404 Not Found</title>")
        'a page of HTML or XML, perhaps in place of a download; download the file again'
    """
    if kind := kind_of(data):
        return kind
    if encoding := encoding_of(data):
        return f"text in {encoding}; convert it with iconv -f {encoding} -t UTF-8"
    if data[:_SAMPLE].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "a page of HTML or XML, perhaps in place of a download; download the file again"
    return None
