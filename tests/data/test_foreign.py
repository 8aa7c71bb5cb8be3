"""Token files of nanoGPT's and llm.c's, and pickles that are not executed."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from charlm import BlockDataset
from charlm.data.foreign import read_plain_pickle
from charlm.data.prepare import prepare_corpus
from charlm.errors import CharLMError, FileFormatError, InputError

CHARS = "\n !abcdefg\u00e9"


def nanogpt(folder: Path, *, protocol: int = 4) -> tuple[list[int], list[int]]:
    """Write what nanoGPT's data/shakespeare_char/prepare.py writes."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    train, val = (generator.integers(0, len(CHARS), n, dtype=np.uint16) for n in (900, 100))
    train.tofile(folder / "train.bin")
    val.tofile(folder / "val.bin")
    meta = {
        "vocab_size": len(CHARS),
        "itos": dict(enumerate(CHARS)),
        "stoi": {c: i for i, c in enumerate(CHARS)},
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol=protocol))
    return train.tolist(), val.tolist()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nanogpts_characters_keep_their_ids_their_letters_and_their_split(
    tmp_path: Path, protocol: int
) -> None:
    train, val = nanogpt(tmp_path / "nano", protocol=protocol)
    index = prepare_corpus(tmp_path / "nano", tmp_path / "data", shard_bytes=64)
    assert (index.dtype, index.vocab_size, index.n_documents) == ("uint8", len(CHARS), 2)
    data = BlockDataset.open(tmp_path / "data", 8)
    assert [part.ids.tolist() for part in data.split()] == [train, val]
    assert data.tokenizer is not None
    assert data.tokenizer.encode(CHARS) == list(range(len(CHARS)))


def llmc(path: Path, tokens: list[int], *, version: int = 1, count: int | None = None) -> None:
    header = [20_240_520, version, len(tokens) if count is None else count, *[0] * 253]
    path.write_bytes(struct.pack("<256i", *header) + np.array(tokens, "<u2").tobytes())


def test_llmcs_shards_are_joined_those_for_validation_last(tmp_path: Path) -> None:
    llmc(tmp_path / "text_val_000000.bin", [7, 8, 9] * 5)
    llmc(tmp_path / "text_train_000001.bin", [50_256, 1, 2] * 5)
    llmc(tmp_path / "text_train_000002.bin", [3, 4] * 5)
    prepare_corpus(str(tmp_path / "text_*.bin"), tmp_path / "data", shard_bytes=16)
    data = BlockDataset.open(tmp_path / "data", 4)
    train, val = data.split()
    assert train.ids.tolist() == [50_256, 1, 2] * 5 + [3, 4] * 5
    assert val.ids.tolist() == [7, 8, 9] * 5
    assert (data.tokenizer, data.max_id, data.unit) == (None, 50_256, "character")


class Trap:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


PICKLES: dict[str, bytes] = {
    "code": pickle.dumps({"itos": Trap()}),
    "code of old": pickle.dumps(Trap(), protocol=0),
    "a list": pickle.dumps([1, 2]),
    "a text": pickle.dumps("abc"),
    "a set": pickle.dumps({"itos": {1, 2}}),
    "cut": pickle.dumps({"a": 1})[:-3],
    "nothing": b"",
    "no pickle": b"hello",
    "no mark": b"\x80\x04}u.",
    "on nothing": b"\x80\x04s.",
    "a text with items": b"\x80\x04\x8c\x01a\x8c\x01b\x8c\x01cs.",
    "what was not put": b"\x80\x04h\x05.",
    "dict in a dict's key": b"\x80\x04}}\x8c\x01as.",
    "two": b"\x80\x04}}.",
    "numbers without end": pickle.dumps({"itos": 10**30}, protocol=0),
}


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES.keys())
def test_a_pickle_that_is_no_plain_dict_is_refused_and_not_executed(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"meta\.pkl"):
        read_plain_pickle(tmp_path / "meta.pkl")
    assert not (tmp_path / "executed").exists()


def test_a_plain_dict_of_any_shape_is_read_as_pickle_reads_it(tmp_path: Path) -> None:
    shared = {1: "a"}
    value: dict[Any, Any] = {
        "a": {0: "x" * 300, -1: None},
        2**70: True,
        "b": shared,
        "c": shared,
        **{i: i for i in range(3000)},
    }
    for protocol in (2, 3, 4, 5):
        (tmp_path / "p").write_bytes(pickle.dumps(value, protocol=protocol))
        assert read_plain_pickle(tmp_path / "p") == value


def damaged_count(folder: Path) -> Path:
    llmc(folder / "train.bin.bin", [1, 2, 3], count=4)
    return folder / "train.bin.bin"


def newer(folder: Path) -> Path:
    llmc(folder / "a.bin", [1, 2, 3], version=7)
    return folder / "a.bin"


def only_val(folder: Path) -> Path:
    llmc(folder / "val.bin", [1, 2, 3])
    return folder / "val.bin"


def odd(folder: Path) -> Path:
    nanogpt(folder / "nano")
    (folder / "nano" / "val.bin").write_bytes(b"abc")
    return folder / "nano"


def few_characters(folder: Path) -> Path:
    nanogpt(folder / "nano")
    (folder / "nano" / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a", 1: "b"}}))
    return folder / "nano"


def no_characters(folder: Path) -> Path:
    nanogpt(folder / "nano")
    (folder / "nano" / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "ab"}}))
    return folder / "nano"


def no_table(folder: Path) -> Path:
    nanogpt(folder / "nano")
    (folder / "nano" / "meta.pkl").write_bytes(pickle.dumps({"itos": {1: "a"}}))
    return folder / "nano"


def mixed(folder: Path) -> Path:
    llmc(folder / "train_1.bin", [1, 2, 3])
    (folder / "text.txt").write_text("a text", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (damaged_count, FileFormatError, "must be version 1 with 3 tokens by its size, got version 1, 4"),
        (newer, FileFormatError, "got version 7"),
        (only_val, InputError, "there must be a token file for training"),
        (odd, FileFormatError, "must hold tokens of two bytes each"),
        (few_characters, FileFormatError, "must name all tokens, got 2"),
        (no_characters, FileFormatError, "must hold characters in 'itos'"),
        (no_table, FileFormatError, "must hold a dict 'itos' from the numbers"),
        (mixed, InputError, "cannot be prepared together"),
    ],
)
def test_token_files_that_do_not_fit_are_refused(
    tmp_path: Path, make: Any, error: type[CharLMError], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare_corpus(make(tmp_path), tmp_path / "data")
