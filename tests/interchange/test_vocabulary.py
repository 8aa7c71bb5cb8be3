"""The tokenizer.json of others, written and read back; what its library makes of it: test_transformers."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interchange.test_families import ANYTHING

from charlm import ByteTokenizer, CharTokenizer
from charlm.errors import CheckpointError, FileFormatError, InputError
from charlm.interchange.vocabulary import known_tokenizer, tokenizer_file, tokenizer_from

MANY = "".join(chr(code) for code in (*range(0xD800), *range(0x10000, 0x11000)))
TOKENIZERS = {
    "characters": CharTokenizer("\n abc"),
    "one that stands for unknown ones": CharTokenizer("ab?", unknown="?"),
    "ends of lines and quotation marks": CharTokenizer('\r\n\x00\u2028"\\\x7f'),
    "more than other JSON may hold": CharTokenizer(MANY),
    "bytes": ByteTokenizer(),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_tokenizer_comes_back_as_it_went_out(tokenizer: CharTokenizer | ByteTokenizer) -> None:
    back, order = tokenizer_from(tokenizer_file(tokenizer), "tokenizer.json")
    assert back == tokenizer
    assert order == (None if isinstance(tokenizer, CharTokenizer) else list(range(256)))


def changed(**changes: Any) -> bytes:
    """Return the file of three characters with changed fields."""
    values = json.loads(tokenizer_file(CharTokenizer("abc")))
    for name, value in changes.items():
        (values["model"] if name in values["model"] or name == "merges" else values)[name] = value
    return json.dumps(values).encode()


SPACE_IN_FRONT = {"type": "ByteLevel", "add_prefix_space": True}
REFUSED = {
    "subwords": (changed(vocab={"a": 0, "th": 1}), "one character each, got 'th'"),
    "special tokens": (
        changed(added_tokens=[{"id": 3, "content": "<s>", "special": True}]),
        "one character each, got '<s>'",
    ),
    "a gap": (changed(vocab={"a": 0, "b": 2}), "number its entries 0, 1, 2"),
    "an id twice": (changed(vocab={"a": 0, "b": 0}), "number its entries 0, 1, 2"),
    "no number": (changed(vocab={"a": 0, "b": "1"}), "number its entries 0, 1, 2"),
    "nothing": (changed(vocab={}), "holds no vocabulary of characters"),
    "a list": (changed(vocab=[["a", 0.0]]), "must hold an object in 'vocab', got a list"),
    "lower case": (changed(normalizer={"type": "Lowercase"}), "without changing it"),
    "words": (changed(pre_tokenizer={"type": "Whitespace"}), "without changing it"),
    "without spaces": (
        changed(pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"}),
        "without changing it",
    ),
    "a space in front": (
        changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [SPACE_IN_FRONT]}),
        "without changing it",
    ),
    "some bytes": (
        changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False}),
        "the 256 bytes and nothing else, got 3",
    ),
    "a space in front, as nothing is said": (
        changed(pre_tokenizer={"type": "ByteLevel"}),
        "without changing",
    ),
    "no object in added_tokens": (changed(added_tokens=[3]), "added_tokens"),
    "added_tokens a number": (changed(added_tokens=3), "added_tokens"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_neither_characters_nor_bytes_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(FileFormatError, match=reason):
        tokenizer_from(content, "tokenizer.json")


@given(st.data())
def test_any_json_is_a_tokenizer_or_refused(data: st.DataObject) -> None:
    values = json.loads(tokenizer_file(CharTokenizer("abc")))
    inner = data.draw(
        st.sampled_from([values, values["model"], values["model"]["vocab"], values["pre_tokenizer"]])
    )
    inner[data.draw(st.sampled_from([*inner, "pretokenizers", "merges"]))] = data.draw(ANYTHING)
    with contextlib.suppress(FileFormatError):
        tokenizer_from(json.dumps(values).encode(), "tokenizer.json")


def test_bytes_in_another_order_are_put_in_ours() -> None:
    values = json.loads(tokenizer_file(ByteTokenizer()))
    values["model"]["vocab"] = {name: 255 - i for name, i in values["model"]["vocab"].items()}
    tokenizer, order = tokenizer_from(json.dumps(values).encode(), "tokenizer.json")
    assert tokenizer == ByteTokenizer()
    assert order == list(range(255, -1, -1))


def test_a_tokenizer_of_another_class_is_refused() -> None:
    class Mine(ByteTokenizer):
        pass

    assert tokenizer_file(Mine()) == tokenizer_file(ByteTokenizer())
    with pytest.raises(InputError, match="must be a CharTokenizer or a ByteTokenizer"):
        tokenizer_file(object())  # type: ignore[arg-type]  # for those without a type checker
    with pytest.raises(CheckpointError, match="there is no vocabulary 'nowhere'"):
        known_tokenizer("nowhere")
