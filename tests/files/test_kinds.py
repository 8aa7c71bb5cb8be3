"""What lies in the place of a text, of JSON or of weights is named, and no text is taken for it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import shutil
import sqlite3
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from harness.texts import TEXTS
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from charlm import BigramLM, CharLM, CharTokenizer, load
from charlm.errors import CorpusError, FileFormatError, InvalidTextError
from charlm.files import safetensors, strict_json
from charlm.files.kinds import encoding_of, kind_of, other_than_data
from charlm.files.reading import read_file
from charlm.text.corpus import load_corpus, read_text

TEXT = "It was a bright cold day in April.\n" * 20
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def a_zip(name: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, TEXT)
    return packed.getvalue()


def a_tar(form: int) -> bytes:
    packed, info = io.BytesIO(), tarfile.TarInfo("a.txt")
    info.size = len(TEXT)
    with tarfile.open(fileobj=packed, mode="w", format=form) as archive:
        archive.addfile(info, io.BytesIO(TEXT.encode()))
    return packed.getvalue()


def a_torch_save(*, as_zip: bool) -> bytes:
    packed = io.BytesIO()
    torch.save({"a": torch.ones(3)}, packed, _use_new_zipfile_serialization=as_zip)
    return packed.getvalue()


def a_database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table text (line)")
        return connection.serialize()


OTHERS = {
    "Git LFS; fetch the file itself with git lfs pull": [POINTER],
    "git-annex; fetch the file itself with git annex get": [b"/annex/objects/SHA256E-s9--ab.txt\n"],
    "xz; unpack": [lzma.compress(TEXT.encode())],
    "bzip2; unpack": [bz2.compress(TEXT.encode())],
    "zstd; unpack": [b"\x28\xb5\x2f\xfd\x24\0\1\2\3"],
    "a zip archive, as .docx": [a_zip("a.txt"), a_zip("word/document.xml")],
    "a tar archive; unpack": [a_tar(tarfile.USTAR_FORMAT), a_tar(tarfile.GNU_FORMAT)],
    "a 7z archive": [b"7z\xbc\xaf\x27\x1c\0\4"],
    "a RAR archive": [b"Rar!\x1a\x07\x01\0"],
    "a PDF; extract its text": [b"%PDF-1.7\n%all of it ASCII"],
    "an old Office": [bytes.fromhex("d0cf11e0a1b11ae1")],
    "an SQLite database": [a_database()],
    "a picture": [b"\x89PNG\r\n\x1a\n\0\0", b"\xff\xd8\xff\xe0\0\x10JFIF", b"GIF89a\x01\0\x01\0\x80\0\0"],
    "a pickle, which could run code; save its tensors with safetensors": [
        pickle.dumps([TEXT], 2),
        pickle.dumps([TEXT], 4),
        a_torch_save(as_zip=True),
        a_torch_save(as_zip=False),
    ],
}
EACH = [(kind, data) for kind, several in OTHERS.items() for data in several]


@pytest.mark.parametrize(("kind", "data"), EACH)
def test_what_is_no_text_is_named_by_every_reader(kind: str, data: bytes, tmp_path: Path) -> None:
    for name, content in (("a.txt", data), ("b.gz", gzip.compress(data)), ("c.gz", data)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CorpusError, match=f"{name}' must be a text, got .*{kind}"):
            load_corpus(tmp_path / name)
    with pytest.raises(CorpusError, match="must be a text"):  # in whatever encoding it is read
        read_text(tmp_path / "a.txt", encoding="latin-1")
    saved_and_named_in_its_place(tmp_path, kind, data)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("a page of HTML or XML", b"\n<!DOCTYPE html>\n<title>404 Not Found</title>"),
        ("a page of HTML or XML", b"\xef\xbb\xbf<?xml version='1.0'?><Error>AccessDenied</Error>"),
        ("text in UTF-16LE; convert it with iconv -f UTF-16LE", '{"format": "charlm"}'.encode("utf-16-le")),
        ("text in UTF-16; convert it with iconv -f UTF-16 ", '{"format": 1}'.encode("utf-16")),
        ("gzip; unpack it with gunzip", gzip.compress(b"{}", mtime=0)),
    ],
)  # fmt: skip
def test_what_may_be_a_text_is_named_in_place_of_data(kind: str, data: bytes, tmp_path: Path) -> None:
    saved_and_named_in_its_place(tmp_path, kind, data)


def saved_and_named_in_its_place(folder: Path, kind: str, data: bytes) -> None:
    CharLM(BigramLM(3), CharTokenizer("abc")).save(folder / "good")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copytree(folder / "good", folder / name)
        (folder / name / name).write_bytes(data)
        with pytest.raises(FileFormatError, match=f"{name}' must .*, got .*{kind}"):
            load(folder / name, device="cpu")
    for exact in (None, 10**9):  # as a manifest has it
        with pytest.raises(FileFormatError, match=rf"bytes, got {len(data)} of .*{kind}"):
            read_file(folder / "config.json" / "config.json", max_bytes=exact or 1, exact_size=exact)


def test_weights_are_no_text_and_no_json(tmp_path: Path) -> None:
    for size in (1, 9):
        data = b"".join(safetensors.dumps({"weight": torch.zeros(size)}))
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(CorpusError, match="must be a text, got safetensors, which are weights"):
            load_corpus(tmp_path / "model.safetensors")
        with pytest.raises(FileFormatError, match="must be JSON in UTF-8, got safetensors"):
            strict_json.loads(data, path="config.json")


def test_weights_that_begin_like_a_pickle_or_gzip_are_read() -> None:
    for length in (0x0280, 0x088B1F):
        header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
        data = bytearray(length.to_bytes(8, "little") + header + b"\0" * 4)
        tensors, _ = safetensors.loads(data, path="model.safetensors")
        assert tensors["w"].tolist() == [0.0]


@pytest.mark.parametrize(
    "text",
    [
        *("GIF89a is the version", "GIF87a \u2014 the older", "%PDF-1.7 is how", "%PDF- begins"),
        "version https://git-lfs.github.com/spec/v1\nis how a pointer begins",
        *("version https://git-lfs.github.com/spec/ says", "/annex/objects/ is where", "BZh91AY&SY is how"),
    ],
)
def test_a_text_about_such_files_is_a_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert load_corpus(tmp_path / "a.txt") == text


# Encodings


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("first", "考耂耄者耀ᾋʀҀր謟")
def test_a_wide_text_may_begin_like_a_pickle_or_gzip(first: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "wide.txt"
    for text in (first, first + "丈夫" * 20, first + "古文 abc\n" * 50):
        path.write_bytes(text.encode(encoding))
        assert read_text(path, encoding=encoding) == text
        path.write_bytes(gzip.compress(path.read_bytes()))
        assert read_text(path, encoding=encoding) == text


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_wide_text_is_not_read_in_the_wrong_order_or_width(mark: str, bits: int, tmp_path: Path) -> None:
    path = tmp_path / "wide.txt"
    codecs = {f"utf-{width}{order}" for width in (16, 32) for order in ("", "-le", "-be")}
    for order in ("le", "be"):
        path.write_bytes((mark + TEXT).encode(f"utf-{bits}-{order}"))
        right = {f"utf-{bits}-{order}"} | ({f"utf-{bits}"} if mark or sys.byteorder[0] == order[0] else set())
        for codec in codecs - right:
            with pytest.raises(InvalidTextError, match=f"must be valid {codec}; it looks like UTF-{bits}"):
                read_text(path, encoding=codec)
        for codec in right:
            assert read_text(path, encoding=codec).lstrip("\ufeff") == TEXT


@pytest.mark.parametrize("data", [b"|\b/\b-\b\\\b" * 20, b"x\x1ey\x1f" * 20, b"a\x1eb\x1ec\x1f" * 20])
def test_letters_between_control_characters_are_no_utf_16(data: bytes, tmp_path: Path) -> None:
    for text in (data, b"\n" + data, data + b"\0"):
        (tmp_path / "a.txt").write_bytes(text)
        assert load_corpus(tmp_path / "a.txt").encode() == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    "line",
    [
        *("bright and cold\n", "“Straße” — naïve\r\n", "Привет, мир!\n", "Καλημέρα\tκόσμε\n", "שלום עולם\n"),
        *("यह एक हिंदी वाक्य है।\n", "สวัสดี ชาวโลก\n", "a smile 😀 for you\n"),
    ],
)
def test_a_text_in_utf_16_or_32_is_refused_with_the_way_out(line: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "wide.txt"
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    for text in (line, line * 500):  # the second is longer than what is looked at
        for mark, called in (("", name), ("\ufeff", name[:6])):
            path.write_bytes((mark + text).encode(encoding))
            with pytest.raises(InvalidTextError) as caught:
                load_corpus(path)
            assert f"it looks like {called}: convert it with iconv -f {called} " in str(caught.value)
            assert f'encoding="{called}" in Python, --encoding {called} of the command' in str(caught.value)
            assert read_text(path, encoding=called) == text
            path.write_bytes(gzip.compress(path.read_bytes()))
            with pytest.raises(InvalidTextError, match=f"it looks like {called}: "):
                load_corpus(path)


@pytest.mark.parametrize("kind", TEXTS)
def test_every_kind_of_text_stays_a_text(kind: str) -> None:
    for tail in (TEXTS[kind], TEXTS[kind][1:], TEXTS[kind].replace(" ", "\0")):
        data = tail.encode()
        assert (kind_of(data), encoding_of(data), other_than_data(data)) == (None, None, None)


@settings(max_examples=100)
@given(st.text("ab01 \0\n\t\r\vé€", min_size=1, max_size=60), st.integers(1, 40))
@example("1\n", 40)
@example("1\t0\n", 40)
@example("word\0", 40)
@example("ab\0", 40)
@example("\0", 40)
@example("1\t1\0", 40)
@example("00\r\0", 4)
def test_utf_8_may_hold_nuls(text: str, times: int) -> None:
    data = (text * times).encode()
    halves = [data[place::2] for place in (0, 1)]
    assume(not any(2 * half.count(0) >= len(half) for half in halves) or not text.strip("\0"))
    assert encoding_of(data) is None
