"""The tokenizer.json of the library tokenizers, which transformers reads too; the library is not needed.

The file has one entry for each character, and the text is split into characters. A character outside the
vocabulary is an error there, too, because the vocabulary has no entry for unknown characters. The 256 bytes
have the names that GPT-2 gave them (its encoder.py, bytes_to_unicode).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from charlm.data.foreign import read_characters
from charlm.errors import CheckpointError, InputError, quoted, shown
from charlm.files import strict_json
from charlm.files.reading import refusal
from charlm.plain import as_path
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

__all__ = ["MAX_BYTES", "known_tokenizer", "tokenizer_file", "tokenizer_from"]

MAX_BYTES = 64 * 2**20
"""Largest tokenizer.json that is read. A vocabulary of all of Unicode takes 30 MB."""

_MOST_MARKS = 8 * 1_114_112  # an entry has two quotation marks and a comma, and may be one of them
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes named by themselves
_NAMES = {byte: chr(byte) for byte in _PRINTED} | {
    byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in set(_PRINTED))
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def tokenizer_file(tokenizer: Tokenizer) -> bytes:
    """Return the content of a tokenizer.json with the ids of a tokenizer.

    Raises:
        InputError: it is neither a `CharTokenizer` nor a `ByteTokenizer`.
    """
    values: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
    }
    if isinstance(tokenizer, CharTokenizer):
        values |= {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "WordLevel",
                "vocab": {character: i for i, character in enumerate(tokenizer.vocab)},
                "unk_token": tokenizer.unknown or "<unk>",
            },
        }
    elif isinstance(tokenizer, ByteTokenizer):
        values |= {
            "pre_tokenizer": _BYTE_LEVEL,
            "post_processor": None,
            "decoder": _BYTE_LEVEL,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {_NAMES[byte]: byte for byte in range(256)},
                "merges": [],
            },
        }
    else:
        raise InputError(f"tokenizer must be a CharTokenizer or a ByteTokenizer, got {shown(tokenizer)}")
    return json.dumps(values, ensure_ascii=False, indent=1).encode() + b"\n"


def tokenizer_from(data: bytes | bytearray, path: str) -> tuple[Tokenizer, list[int] | None]:
    """Make a tokenizer from the content of a tokenizer.json.

    Returns:
        The tokenizer, and for bytes the id of each byte in the file; None for characters.

    Raises:
        FileFormatError: its entries are neither single characters nor the 256 bytes, or it changes the text.
    """
    values = strict_json.loads(data, path=path, max_bytes=MAX_BYTES, max_marks=_MOST_MARKS)
    model = strict_json.take(values, "model", dict, path=path)
    ids: dict[str, Any] = dict(strict_json.take(model, "vocab", dict, path=path))
    for added in strict_json.take({"added_tokens": [], **values}, "added_tokens", list, path=path):
        if not isinstance(added, dict):
            raise refusal(path, f"must hold objects in 'added_tokens', got {shown(added)}.")
        ids[strict_json.take(added, "content", str, path=path)] = added.get("id")
    for entry in ids:
        if len(entry) != 1:
            raise refusal(
                path,
                f"must hold entries of one character each, got {shown(entry)}: charlm has neither subwords "
                "nor special tokens.",
            )
    by_id = {i: entry for entry, i in ids.items() if type(i) is int}
    if len(by_id) < len(ids) or set(by_id) != set(range(len(ids))):
        raise refusal(path, "must number its entries 0, 1, 2 …, each once.")
    steps = _steps(values.get("pre_tokenizer"))
    if values.get("normalizer") is not None or not steps <= {"Split", "ByteLevel"}:
        raise refusal(path, "must cut a text into characters without changing it, got other steps.")
    if "ByteLevel" in steps:
        if set(ids) != set(_NAMES.values()):
            raise refusal(path, f"must hold the 256 bytes and nothing else, got {len(ids)} entries.")
        return ByteTokenizer(), [ids[_NAMES[byte]] for byte in range(256)]
    characters, unknown = [by_id[i] for i in range(len(ids))], model.get("unk_token")
    try:
        return CharTokenizer(characters, unknown=unknown if unknown in characters else None), None
    except InputError as error:
        raise refusal(path, f"holds no vocabulary of characters: {error}.") from error


def known_tokenizer(vocabulary: str | Path | Tokenizer) -> Tokenizer:
    """Return the given tokenizer, or that of nanoGPT's meta.pkl.

    Raises:
        FileFormatError: the file holds something else.
        CheckpointError: there is no such file.
        InputError: the argument is neither a path nor a tokenizer.
    """
    if isinstance(vocabulary, Tokenizer):
        return vocabulary
    if not isinstance(vocabulary, str | Path):
        raise InputError(f"vocabulary must be a meta.pkl or a tokenizer, got {shown(vocabulary)}")
    try:
        return read_characters(as_path(vocabulary))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no vocabulary {quoted(str(vocabulary))}") from error


def _steps(step: object) -> set[str]:
    """Return the types of a pre-tokenizer and its parts; "" stands for one that removes or adds text."""
    if not isinstance(step, dict):
        return set()
    inner = step.get("pretokenizers")
    if isinstance(inner, list):
        return {name for one in inner for name in _steps(one)}
    kind = str(step.get("type"))
    adds = kind == "ByteLevel" and step.get("add_prefix_space") is not False
    return {"" if adds or step.get("behavior") == "Removed" else kind}
