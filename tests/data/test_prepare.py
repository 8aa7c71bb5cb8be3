"""A text prepared on disk against the same text in memory, and what is noticed of damage."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from charlm import BlockDataset, ByteTokenizer, CharTokenizer
from charlm.data.prepare import prepare_corpus
from charlm.data.prepared import (
    INDEX_FILE,
    PREPARING_FILE,
    CorpusIndex,
    PreparedCorpus,
    is_prepared,
    shard_name,
)
from charlm.data.sources import in_order
from charlm.errors import (
    CharLMError,
    CorpusError,
    DataError,
    FileFormatError,
    InputError,
    InvalidTextError,
    UnknownCharacterError,
)
from charlm.files import strict_json
from charlm.files.reading import OpenFile
from charlm.text import pieces
from charlm.training.saving import fingerprint

TEXT = "It starts where the lecture starts, \u00e9 and \u4e16\U0001f600 ends as a library.\n" * 40


def prepared_text(folder: Path, text: str = TEXT, **options: Any) -> Path:
    (folder / "text.txt").write_text(text, encoding="utf-8", newline="")
    prepare_corpus(folder / "text.txt", folder / "data", **options)
    return folder / "data"


def batches(data: BlockDataset, seed: int = 1) -> list[list[list[int]]]:
    drawn = data.sample_batch(5, generator=torch.Generator().manual_seed(seed))
    some = [batch for most in (None, 3) for batch in data.blocks(4, most=most)]
    return [tensor.tolist() for pair in (drawn, data[0], data[-1], *some) for tensor in pair]


@settings(max_examples=25, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=24, max_size=200),
    T=st.integers(1, 4),
    shard_bytes=st.integers(4, 90),
    tokenizer=st.sampled_from(["char", "byte"]),
    piece=st.integers(4, 50),
)
def test_batches_are_those_of_the_text_in_memory(
    tmp_path_factory: pytest.TempPathFactory, text: str, T: int, shard_bytes: int, tokenizer: Any, piece: int
) -> None:
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_PIECE", piece)
        data = prepared_text(folder, text, tokenizer=tokenizer, shard_bytes=shard_bytes)
    made = ByteTokenizer() if tokenizer == "byte" else CharTokenizer.from_text(text)
    there, here = BlockDataset.open(data, T), BlockDataset.from_text(text, made, T)
    assert there.tokenizer == here.tokenizer == made
    for on_disk, in_memory in zip(
        [there, *there.split(0.5), *there.set_aside(6), there.in_blocks_of(2)],
        [here, *here.split(0.5), *here.set_aside(6), here.in_blocks_of(2)],
        strict=True,
    ):
        assert on_disk.ids.tolist() == in_memory.ids.tolist()
        assert batches(on_disk) == batches(in_memory)
    again = [part.set_aside(T + 1)[0] for part in (there.set_aside(6)[0], here.set_aside(6)[0])]
    assert again[0].ids.tolist() == again[1].ids.tolist()
    shutil.rmtree(folder)


def test_folders_patterns_compressed_files_and_names_are_joined_as_documents(tmp_path: Path) -> None:
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / ".hidden").write_text("#", encoding="utf-8")
    (tmp_path / "texts" / "b.txt").write_text("two", encoding="utf-8")
    (tmp_path / "texts" / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"three" * 1000))
    (tmp_path / "texts" / "a.txt").write_text("one", encoding="utf-8")
    index = prepare_corpus([tmp_path / "texts", str(tmp_path / "texts" / "*.txt")], tmp_path / "data")
    corpus = PreparedCorpus(tmp_path / "data")
    assert corpus.documents().tolist() == [3, 6, 5006, 5009, 5012]
    assert (index.n_documents, index.n_chars, index.n_bytes) == (5, 5012, 5012)
    data = BlockDataset.open(tmp_path / "data", 3)
    assert data.tokenizer is not None
    assert data.tokenizer.decode(data.ids) == "onetwo" + "three" * 1000 + "onetwo"


def test_the_files_of_a_folder_have_one_order_on_all_systems() -> None:
    """Windows compares paths without upper and lower case."""
    names = ["a/z", "B/b", "b/a", "a/B", "B/c", "a b"]
    for kind in (PurePosixPath, PureWindowsPath):
        found = [path.as_posix() for path in in_order(map(kind, names))]
        assert found == ["B/b", "B/c", "a/B", "a/z", "a b", "b/a"]


def test_a_split_without_a_fraction_is_the_recorded_one(tmp_path: Path) -> None:
    data = BlockDataset.open(prepared_text(tmp_path, val_fraction=0.25), 2)
    for opened in (data, pickle.loads(pickle.dumps(data)), data.in_blocks_of(5)):
        assert opened.split()[1].n_ids == len(TEXT) // 4
        assert opened.split(0.9)[0].n_ids == int(0.9 * len(TEXT))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_it_travels_to_workers_and_through_pickle_without_its_ids(tmp_path: Path) -> None:
    data = BlockDataset.open(prepared_text(tmp_path), 8).split()[0]
    stored = pickle.dumps(data)
    assert len(stored) < 2_000
    assert batches(pickle.loads(stored)) == batches(data)
    loader = DataLoader(data, batch_size=50, num_workers=2)
    assert torch.equal(torch.cat([x for x, _ in loader]), torch.stack([x for x, _ in DataLoader(data, None)]))
    shutil.rmtree(tmp_path / "data")
    prepared_text(tmp_path, TEXT[::-1])
    with pytest.raises(CorpusError, match="holds another prepared corpus than before"):
        pickle.loads(stored)


def test_reading_all_pieces_holds_little_and_the_whole_is_asked_for_by_name(tmp_path: Path) -> None:
    data = BlockDataset.open(prepared_text(tmp_path), 8)
    with pytest.raises(IndexError, match="start 99999 is out of range"):
        data.blocks_at(torch.tensor([0, 99_999]))
    assert data.ids_between(5, 9).tolist() == data.ids[5:9].tolist()
    assert data.ids_between(-3, 10**9).tolist() == data.ids[-3:].tolist()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    other = path.with_name(shard_name(1))
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


DAMAGE: dict[str, tuple[Callable[[Path], object], type[CharLMError], str]] = {
    "changed": (flip, FileFormatError, "'.*ids-000000.bin' must have the sha256 .* it was changed"),
    "cut": (
        lambda path: os.truncate(path, 99),
        FileFormatError,
        "ids-000000.bin' must have 500 bytes, got 99",
    ),
    "swapped": (swap, FileFormatError, "ids-000000.bin' must have the sha256"),
    "missing": (lambda path: path.unlink(), CorpusError, "lacks ids-000000.bin, which its index.json names"),
    "documents": (lambda path: flip(path.with_name("documents.bin")), FileFormatError, "documents.bin"),
    "tokenizer": (lambda path: flip(path.with_name("tokenizer.json")), FileFormatError, "tokenizer.json"),
    "no index": (lambda path: path.with_name(INDEX_FILE).unlink(), CorpusError, "it has no index.json"),
    "link": (
        link,
        FileFormatError,
        "must be a regular file, got a symbolic link",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("opened_before", [False, True])
def test_what_is_not_as_the_index_says_is_noticed(
    tmp_path: Path,
    damage: Callable[[Path], object],
    error: type[CharLMError],
    message: str,
    opened_before: bool,
) -> None:
    data = prepared_text(tmp_path, TEXT, shard_bytes=500, tokenizer="byte")
    if opened_before:
        BlockDataset.open(data, 8)
    damage(data / shard_name(0))
    with pytest.raises(error, match=message):
        PreparedCorpus(data).verify()


def test_a_file_that_gets_shorter_while_it_is_read_ends_no_process(tmp_path: Path) -> None:
    data = BlockDataset.open(prepared_text(tmp_path), 8)
    os.truncate(tmp_path / "data" / shard_name(0), 20)
    with pytest.raises(FileFormatError, match="has become shorter"):
        list(data.blocks(4))


def test_files_are_hashed_once_until_somebody_writes_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared_text(tmp_path, shard_bytes=2_000)
    hashed: list[str] = []
    own = OpenFile.sha256

    def noted(file: OpenFile) -> str:
        hashed.append(file.path.name)
        return own(file)

    monkeypatch.setattr(OpenFile, "sha256", noted)
    names = [path.name for path in sorted(data.glob("ids-*"))]
    for expected in (names, [], []):
        PreparedCorpus(data)
        assert sorted(hashed) == expected
        hashed.clear()
    content = (data / names[1]).read_bytes()
    (data / names[1]).write_bytes(content)  # the same, but who knows
    PreparedCorpus(data)
    assert hashed == names[1:2]
    (data / "checked.json").write_bytes(b"{")
    PreparedCorpus(data)
    assert len(hashed) == 1 + len(names)
    hashed.clear()
    PreparedCorpus(data).verify()
    assert sorted(hashed) == names


BAD_INDEXES: dict[str, tuple[str, Any]] = {
    "number of ids": ("n_ids", 5),
    "negative": ("train_ids", -1),
    "type of the ids": ("dtype", "float64"),
    "largest id": ("max_id", 10**6),
    "no list": ("shards", {}),
    "no object": ("shards", [3]),
    "no hash": ("shards", [{"ids": 1, "sha256": "../../etc/passwd"}]),
    "other files": ("files", {"/etc/passwd": {"size": 1, "sha256": "0" * 64}}),
    "true": ("n_documents", True),
    "version": ("version", 2),
}


@pytest.mark.parametrize(("field", "value"), BAD_INDEXES.values(), ids=BAD_INDEXES.keys())
def test_an_index_that_fits_nothing_is_refused(tmp_path: Path, field: str, value: object) -> None:
    data = prepared_text(tmp_path)
    values = CorpusIndex.from_dict(  # what was written is accepted
        strict_json.loads((data / INDEX_FILE).read_bytes(), path="x"), path="x"
    ).to_dict()
    (data / INDEX_FILE).write_bytes(strict_json.dumps({**values, field: value}))
    with pytest.raises(FileFormatError, match=re.escape(INDEX_FILE)):
        PreparedCorpus(data)


REFUSED: dict[str, tuple[bytes, dict[str, Any], type[CharLMError], str]] = {
    "empty": (b"", {}, DataError, "a vocabulary needs at least one character"),
    "no UTF-8": (b"ab\xff", {}, InvalidTextError, "must be valid utf-8, got byte 0xff at offset 2"),
    "archive": (b"PK\x03\x04" + b"\0" * 99, {}, CorpusError, "must be a text, got a zip archive"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
        {},
        CorpusError,
        "a pointer of Git LFS",
    ),
    "unknown character": (
        b"aba\nabc",
        {"tokenizer": CharTokenizer("ab\n")},
        UnknownCharacterError,
        r"'c' \(U\+0063\) is not in the vocabulary, in '.*text' at position 6 \(line 2, column 3\)",
    ),
    "tokenizer": (b"a", {"tokenizer": "word"}, InputError, 'must be "char", "byte" or a tokenizer'),
    "fraction": (b"a", {"val_fraction": 1.0}, InputError, "val_fraction must be at least 0 and below 1"),
    "size": (b"a", {"shard_bytes": 0}, InputError, "shard_bytes must be an int, 4 or more"),
}


@pytest.mark.parametrize(("content", "options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_prepared_is_refused_as_reading_it_is(
    tmp_path: Path,
    content: bytes,
    options: dict[str, Any],
    error: type[CharLMError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 64)
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(error, match=message):
        prepare_corpus(tmp_path / "text", tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_sources_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for source, message in (
        (tmp_path / "none", "No such file"),
        ("python-doc", "neither a file nor a named corpus; did you mean 'python-docs'"),
        (str(tmp_path / "*.txt"), "no file fits"),
        (tmp_path, "there is no file to prepare"),
    ):
        with pytest.raises(CorpusError, match=message):
            prepare_corpus(source, tmp_path / "data")
    with pytest.raises(InputError, match="standard input can be read only once"):
        prepare_corpus("-", tmp_path / "data")


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    data = prepared_text(tmp_path)
    with pytest.raises(CorpusError, match="holds a prepared corpus already"):
        prepare_corpus(tmp_path / "text.txt", data)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear", encoding="utf-8")
    for taken in (tmp_path / "mine", tmp_path / "text.txt"):
        with pytest.raises(CorpusError, match="is not empty; choose another folder"):
            prepare_corpus(tmp_path / "text.txt", taken)
    assert (tmp_path / "mine" / "letter").is_file()


class Interrupted(Exception):  # noqa: N818 - what a test raises
    """In the place of Ctrl-C."""


def test_what_was_interrupted_goes_on_with_the_first_missing_file(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    prepare_corpus(tmp_path / "text.txt", tmp_path / "whole", shard_bytes=500)

    def stop(what: str, done: int, total: int) -> None:
        told.append(what)
        if what == "writing" and done >= 1_500:
            raise Interrupted

    told: list[str] = []
    with pytest.raises(Interrupted):
        prepare_corpus(tmp_path / "text.txt", tmp_path / "data", shard_bytes=500, on_progress=stop)
    assert is_prepared(tmp_path / "data")
    with pytest.raises(CorpusError, match="was not brought to its end"):
        PreparedCorpus(tmp_path / "data")
    first = (tmp_path / "data" / shard_name(0)).stat()
    told.clear()
    prepare_corpus(
        tmp_path / "text.txt",
        tmp_path / "data",
        shard_bytes=500,
        on_progress=lambda what, *_: told.append(what),
    )
    assert set(told) == {"writing"}
    assert (tmp_path / "data" / shard_name(0)).stat().st_mtime_ns == first.st_mtime_ns
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("change", ["text", "setting", "damaged note"])
def test_another_preparation_begins_anew_in_what_an_interrupted_one_left(tmp_path: Path, change: str) -> None:
    data = prepared_text(tmp_path, shard_bytes=500)
    (data / INDEX_FILE).unlink()
    (data / PREPARING_FILE).write_bytes(b'{"format": "charlm.preparing", "version": 1, "key": "old"}')
    text = TEXT
    if change == "damaged note":
        (data / PREPARING_FILE).write_bytes(b"{")
    if change == "text":
        text = TEXT.upper() + "!"
    options = {"shard_bytes": 700 if change == "setting" else 500}
    prepared_text(tmp_path, text, **options)
    (tmp_path / "anew").mkdir()
    assert contents(data) == contents(prepared_text(tmp_path / "anew", text, **options))


def test_a_text_that_changes_between_the_passes_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def change(what: str, done: int, total: int) -> None:
        if what == "reading" and done == total:
            (tmp_path / "text.txt").write_text(TEXT[:-5], encoding="utf-8")

    with pytest.raises(DataError, match="has changed while it was prepared"):
        prepare_corpus(tmp_path / "text.txt", tmp_path / "data", on_progress=change)
    assert not (tmp_path / "data" / INDEX_FILE).exists()


def prepare_and_die(folder: Path, moment: int) -> None:
    """Prepare, and be killed at one of the moments when something is told or written."""
    calls = 0
    for name in ("write", "fsync", "replace"):
        own = getattr(os, name)

        def counted(*args: Any, own: Callable[..., Any] = own) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*args)

        setattr(os, name, counted)
    prepare_corpus(folder / "text.txt", folder / "data", shard_bytes=900)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_every_write_leaves_nothing_half_and_the_end_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    prepare_corpus(tmp_path / "text.txt", tmp_path / "whole", shard_bytes=900)
    whole = contents(tmp_path / "whole")
    context = multiprocessing.get_context("fork")
    moment = 0
    while True:
        moment += 3
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        process = context.Process(target=prepare_and_die, args=(tmp_path, moment))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        left = contents(tmp_path / "data") if (tmp_path / "data").exists() else {}
        assert all(
            content == whole[name]
            for name, content in left.items()
            if not name.startswith(".tmp-") and name != PREPARING_FILE
        )
        if INDEX_FILE not in left:
            prepare_corpus(tmp_path / "text.txt", tmp_path / "data", shard_bytes=900)
        (tmp_path / "data" / PREPARING_FILE).unlink(missing_ok=True)
        assert contents(tmp_path / "data") == whole
    assert moment > 30


def test_ids_of_every_width_are_the_smallest_that_hold_them(tmp_path: Path) -> None:
    for number, (size, dtype) in enumerate([(256, "uint8"), (257, "uint16"), (65_537, "uint32")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000)][:size])) * 2
        data = BlockDataset.open(prepared_text(folder, text, shard_bytes=100_000), 8)
        assert data.row.dtype == getattr(torch, dtype)
        assert data.tokenizer is not None
        assert data.tokenizer.decode(data.ids) == text
        assert data.max_id == size - 1


def test_an_array_that_may_only_be_read_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes(np.arange(1000, dtype="<u2").tobytes())
    mapped = np.memmap(tmp_path / "ids", "<u2", "r")
    data = BlockDataset(mapped, 8)
    assert data.ids.data_ptr() == mapped.ctypes.data
    assert data[500][0].tolist() == list(range(500, 508))


def test_a_fingerprint_is_of_the_ids_and_their_places(tmp_path: Path) -> None:
    data = BlockDataset.open(prepared_text(tmp_path, shard_bytes=900), 8)
    again = BlockDataset.open(tmp_path / "data", 8)
    parts = [data, *data.split(), *data.split(0.5), *data.set_aside(100), data.split()[0].set_aside(100)[0]]
    found = [fingerprint(part) for part in parts]
    assert len(set(found)) == len(found)
    assert fingerprint(again.split()[0].in_blocks_of(3)) == found[1]
