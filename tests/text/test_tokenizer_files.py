"""tokenizer.json: what is saved is loaded, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import charlm
from charlm.errors import CharLMError, FileFormatError
from charlm.text.tokenizer import (
    MAX_FILE_BYTES,
    ByteTokenizer,
    CharTokenizer,
    load_tokenizer,
    tokenizer_from_dict,
)

pytestmark = pytest.mark.slow

CHARACTER = {"format": "charlm.tokenizer", "version": 1, "kind": "character", "vocab": "ab", "unknown": None}
BYTE = {"format": "charlm.tokenizer", "version": 1, "kind": "byte"}


@pytest.mark.parametrize(
    "tokenizer",
    [
        CharTokenizer("zab"),
        CharTokenizer("ab?", unknown="?"),
        CharTokenizer('"\\\n\r\x00\x7f\u2028\ufeff{[,]}é’😀'),
        ByteTokenizer(),
    ],
)
def test_a_tokenizer_survives_saving_and_loading(
    tokenizer: CharTokenizer | ByteTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("what stood here before", encoding="utf-8")
    tokenizer.save(path)
    assert load_tokenizer(path) == tokenizer
    assert type(tokenizer).load(str(path)) == tokenizer
    assert tokenizer_from_dict(tokenizer.to_dict(), path="x") == tokenizer
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.characters(exclude_categories=["Cs"]), min_size=1, unique=True))
def test_every_vocabulary_survives_in_its_order(tmp_path: Path, vocab: list[str]) -> None:
    tokenizer = CharTokenizer(vocab, unknown=vocab[-1])
    tokenizer.save(tmp_path / "tokenizer.json")
    again = CharTokenizer.load(tmp_path / "tokenizer.json")
    assert again.vocab == tuple(vocab)
    assert again.unknown == vocab[-1]


def test_the_file_is_the_documented_json(tmp_path: Path) -> None:
    CharTokenizer("b’a").save(tmp_path / "tokenizer.json")
    values = json.loads((tmp_path / "tokenizer.json").read_bytes())
    assert values == {**CHARACTER, "vocab": "b’a"}
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer.json").read_bytes()) == BYTE


EVERY_CHARACTER = """
import sys
from charlm.text.corpus import load_corpus, read_text
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer
text = "".join(map(chr, [*range(0xE000, 0x110000), *range(0xD800)]))
assert len(text) == 1_112_064
folder = sys.argv[1]
with open(folder + "/text.txt", "wb") as file:
    file.write(text.encode("utf-8"))
assert read_text(folder + "/text.txt") == text
for tokenizer in CharTokenizer.from_text(text), CharTokenizer(text), ByteTokenizer():
    tokenizer.save(folder + "/tokenizer.json")
    again = load_tokenizer(folder + "/tokenizer.json")
    assert again == tokenizer
    ids = again.encode_array(text)
    assert again.decode(ids) == text
    assert again.encode(text) == ids.tolist()
"""


def test_every_unicode_character_survives_whatever_the_locale_is(tmp_path: Path) -> None:
    root = str(Path(charlm.__file__).parent.parent)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONPATH": root}
    command = [sys.executable, "-X", "utf8=0", "-c", EVERY_CHARACTER, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_largest_vocabulary_loads_quickly(tmp_path: Path) -> None:
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    CharTokenizer(every).save(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").stat().st_size < MAX_FILE_BYTES
    start = time.process_time()
    CharTokenizer.load(tmp_path / "tokenizer.json")
    assert time.process_time() - start < 2  # a quarter of a second, where the machine has nothing else to do


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "charlm.model"}, "'charlm.tokenizer' in 'format', got 'charlm.model'."),
        ({"format": 1}, "must hold a string in 'format', got 1."),
        ({"format": ...}, "must hold a string in 'format', got no such field."),
        ({"version": 2}, "has version 2 of charlm.tokenizer; this charlm reads up to 1. Update charlm."),
        ({"version": True}, "must hold an integer in 'version', got true."),
        ({"version": 1.0}, "must hold an integer in 'version', got 1.0."),
        ({"version": "1"}, "must hold an integer in 'version', got '1'."),
        ({"version": ...}, "got no such field."),
        ({"kind": "word"}, "must hold 'character' or 'byte' in 'kind', got 'word'."),
        ({"kind": None}, "must hold a string in 'kind', got null."),
        ({"kind": "byte"}, "must hold the fields format, version, kind only, got 'vocab'."),
        ({"vocab": ["a", "b"]}, "must hold a string in 'vocab', got a list."),
        ({"vocab": ...}, "must hold a string in 'vocab', got no such field."),
        ({"vocab": ""}, "holds no tokenizer: vocab must hold at least one character, got none."),
        (
            {"vocab": "abca"},
            "holds no tokenizer: vocab must hold each character once, got 'a' at index 0 and ",
        ),
        ({"vocab": "a\ud800"}, "got the lone surrogate U+D800 at index 1."),
        ({"unknown": "c"}, "holds no tokenizer: unknown must be one character of vocab or None, got 'c'."),
        ({"unknown": "ab"}, "unknown must be one character of vocab or None, got 'ab'."),
        ({"unknown": 0}, "must hold a string in 'unknown', got 0."),
        ({"unknown": ...}, "must hold a string in 'unknown', got no such field."),
        ({"extra": 1}, "must hold the fields format, version, kind, vocab, unknown only, got 'extra'."),
    ],
)
def test_a_wrong_field_is_refused_and_named(change: dict[str, Any], message: str) -> None:
    values: dict[str, object] = {k: v for k, v in {**CHARACTER, **change}.items() if v is not ...}
    with pytest.raises(FileFormatError) as caught:
        tokenizer_from_dict(values, path="some/tokenizer.json")
    assert str(caught.value).startswith("'some/tokenizer.json' ")
    assert message in str(caught.value)
    assert caught.value.path == "some/tokenizer.json"


def test_a_tokenizer_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    CharTokenizer("ab").save(path)
    with pytest.raises(
        FileFormatError, match=r"must hold a ByteTokenizer, got a CharTokenizer\. Use load_tokenizer"
    ):
        ByteTokenizer.load(path)
    ByteTokenizer().save(path)
    with pytest.raises(
        FileFormatError, match=r"must hold a CharTokenizer, got a ByteTokenizer\. Use load_tokenizer"
    ):
        CharTokenizer.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff\xfe", b'{"format": "charlm.tokenizer"}', b"{" * 100_000]
)
def test_a_file_that_is_no_tokenizer_is_refused_with_its_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no room
    with pytest.raises(FileFormatError, match="at most 8388608 bytes"):
        load_tokenizer(path)


def test_a_missing_file_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "tokenizer.json")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 200), piece=st.binary(max_size=4), cut=st.integers(0, 4))
def test_a_damaged_file_is_refused_or_a_tokenizer(
    position: int, piece: bytes, cut: int, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    CharTokenizer("ab’é\n", unknown="a").save(path)
    data = path.read_bytes()
    path.write_bytes(data[:position] + piece + data[position + cut :])
    try:
        tokenizer = load_tokenizer(path)
    except CharLMError:
        return
    assert tokenizer_from_dict(tokenizer.to_dict(), path="x") == tokenizer
