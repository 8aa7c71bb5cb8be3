"""Reading texts: exactly what the file holds, or an error that says what is wrong with it."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import charlm
from charlm.errors import CharLMError, CorpusError, InputError, InvalidTextError
from charlm.text import corpus, pieces
from charlm.text.corpus import load_corpus, read_text

ODD = "\ufeffbegin\x00\r\nmiddle\n\rlast\u2028\u2029\x85\x1a😀 e\u0301"


# Reading a file


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_every_text_is_read_exactly(tmp_path: Path, text: str) -> None:
    (tmp_path / "text.txt").write_bytes(text.encode())
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(text.encode(), 1))
    assert read_text(tmp_path / "text.txt") == text
    assert read_text(str(tmp_path / "text.txt.gz")) == text
    assert load_corpus([tmp_path / "text.txt", str(tmp_path / "text.txt.gz")]) == text + text


def test_line_ends_marks_and_nul_are_kept(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(ODD.encode())
    assert read_text(tmp_path / "odd") == ODD


def test_an_empty_file_is_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert load_corpus(tmp_path / "empty") == ""


def test_gzip_is_recognised_by_its_content_too(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(gzip.compress(ODD.encode()))
    assert read_text(tmp_path / "text") == ODD


def test_other_encodings_are_read_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("né\r\n".encode("latin-1"))
    assert read_text(path, encoding="latin-1") == "né\r\n"
    path.write_bytes("né’\r\n".encode("utf-16"))
    assert read_text(path, encoding="utf-16") == "né’\r\n"


@pytest.mark.parametrize("encoding", [None, 8, "utf-99", "rot13", "base64", "a\x00b", "", "\x1b[31m"])
def test_an_encoding_that_is_none_is_refused(encoding: Any, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"abc")
    with pytest.raises(InputError, match="encoding must be a text encoding of Python, got '") as caught:
        read_text(tmp_path / "text", encoding=encoding)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("data", "offset", "line", "byte"),
    [
        (b"abc\n\xff", 4, 2, 0xFF),
        (b"\xe2\x80", 0, 1, 0xE2),
        (b"ab\xe2\x80", 2, 1, 0xE2),
        (b"a\r\nb\r\n\xc0\x80", 6, 3, 0xC0),
        (b"\xed\xa0\x80", 0, 1, 0xED),
        (b"\xf4\x90\x80\x80", 0, 1, 0xF4),
    ],
)
def test_invalid_utf8_is_refused_with_its_offset(
    data: bytes, offset: int, line: int, byte: int, tmp_path: Path
) -> None:
    (tmp_path / "bad").write_bytes(data)
    (tmp_path / "bad.gz").write_bytes(gzip.compress(data))
    for name in ("bad", "bad.gz"):
        with pytest.raises(InvalidTextError) as caught:
            load_corpus(tmp_path / name)
        assert caught.value.offset == offset
        message = str(caught.value)
        assert message.startswith(f"'{tmp_path / name}' must be valid utf-8, got byte 0x{byte:02x}")
        assert f" at offset {offset} (line {line})" in message
        assert message.endswith(
            "; convert it to UTF-8, or name its encoding, such as latin-1: encoding=... in Python, "
            "--encoding of the command"
        )


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_told_apart_from_damage(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "wide").write_bytes("\ufeffHello".encode(encoding))
    with pytest.raises(InvalidTextError, match=r'it looks like UTF-16: .* or say so: encoding="UTF-16"'):
        read_text(tmp_path / "wide")
    assert read_text(tmp_path / "wide", encoding="UTF-16") == "Hello"


def test_the_offset_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\xef\xbb\xbfab\xff")
    for encoding in ("utf-8", "utf-8-sig"):
        with pytest.raises(InvalidTextError, match="byte 0xff at offset 5") as caught:
            read_text(tmp_path / "bad", encoding=encoding)
        assert caught.value.offset == 5


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"cannot be read: Is a directory; name the files in it") as caught:
        read_text(tmp_path)
    assert caught.value.errno == errno.EISDIR
    assert pickle.loads(pickle.dumps(caught.value)).errno == errno.EISDIR


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for read in (read_text, load_corpus):
        with pytest.raises(
            CorpusError, match=r"nowhere\\n' cannot be read: No such file .*; check the path"
        ) as caught:
            read(tmp_path / "nowhere\n")
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(CorpusError, match="cannot be read: "):
        read_text("a\x00b")
    with pytest.raises(CorpusError, match="cannot be read: "):
        load_corpus("a" * 5000)


@pytest.mark.parametrize("name", ["text.gz", "text"])
def test_a_damaged_gzip_file_is_refused(name: str, tmp_path: Path) -> None:
    whole = gzip.compress(ODD.encode() * 100)
    for damaged in (
        whole[:-1],
        whole[:20],
        whole[:5],
        whole[:30] + b"\xff\xff\xff" + whole[33:],
        whole + b"more",
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CorpusError, match=r"is damaged and cannot be decompressed: .*; copy it again"):
            read_text(tmp_path / name)


def test_a_gzip_name_needs_gzip_content(tmp_path: Path) -> None:
    (tmp_path / "text.gz").write_bytes(b"plain")
    with pytest.raises(CorpusError, match="must be compressed with gzip, as its name says"):
        read_text(tmp_path / "text.gz")


# Standard input


def read_from(data: bytes) -> subprocess.CompletedProcess[bytes]:
    code = "import sys, charlm; sys.stdout.buffer.write(charlm.load_corpus('-').encode())"
    environment = {**os.environ, "PYTHONPATH": str(Path(charlm.__file__).parent.parent), "LC_ALL": "C"}
    command = [sys.executable, "-X", "utf8=0", "-c", code]
    return subprocess.run(command, input=data, env=environment, capture_output=True, check=False)


@pytest.mark.slow
def test_standard_input_is_read_exactly() -> None:
    for data in (ODD.encode(), gzip.compress(ODD.encode())):
        done = read_from(data)
        assert (done.returncode, done.stdout) == (0, ODD.encode()), done.stderr
    assert (
        b"InvalidTextError: standard input must be valid utf-8, got byte 0xff at offset 1"
        in read_from(b"a\xff").stderr
    )


def test_a_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.TextIOWrapper(io.BytesIO(b"x"), encoding="utf-8")
    closed.close()
    for stdin in (None, closed):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(CorpusError, match="standard input cannot be read: "):
            read_text("-")


def test_a_standard_input_that_does_not_wait_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with os.fdopen(reader, encoding="utf-8") as stdin, os.fdopen(writer, "wb"):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(CorpusError, match=r"standard input cannot be read: it does not wait .*; give a"):
            read_text("-")


def test_a_path_called_minus_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes(b"a file")
    assert read_text(Path("-")) == "a file"
    assert load_corpus(Path("-")) == "a file"


# Names


def test_several_files_are_joined_as_they_are(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b""), ("c", b"\ntwo\n"), ("d", b"\xef\xbb\xbfthree")):
        (tmp_path / name).write_bytes(content)
    paths: list[str | Path] = [tmp_path / "a", str(tmp_path / "b"), tmp_path / "c", tmp_path / "d"]
    assert load_corpus(paths) == load_corpus(tuple(paths)) == "one\ntwo\n\ufeffthree"


def test_pythons_documentation_is_on_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data.topics import topics

    monkeypatch.chdir(tmp_path)
    text = load_corpus("python-docs")
    assert len(text) > 300_000
    assert text == "\n".join(topics[name] for name in sorted(topics))


def test_a_python_without_its_documentation_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(
        CorpusError, match="python-docs is not part of this Python; pass the path of a text file"
    ):
        load_corpus("python-docs")


def test_a_file_is_read_in_stead_of_a_corpus_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("python-docs").mkdir()
    assert len(load_corpus("python-docs")) > 300_000  # a directory is no text
    Path("python-docs").rmdir()
    Path("python-docs").write_bytes(b"mine")
    assert load_corpus("python-docs") == "mine"
    Path("python-docs").unlink()
    with pytest.raises(CorpusError, match="'python-docs' cannot be read: No such file"):
        load_corpus(Path("python-docs"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tiny-shakespeare", "did you mean 'tinyshakespeare'?"),
        ("python_docs", "did you mean 'python-docs'?"),
        ("enwik8", "the named corpora are python-docs and tinyshakespeare"),
        ("", "the named corpora are python-docs and tinyshakespeare"),
    ],
)
def test_a_name_that_is_neither_gets_a_hint(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name:
        with pytest.raises(CorpusError) as caught:
            load_corpus(name)
        assert str(caught.value) == f"'{name}' is neither a file nor a named corpus; {hint}"
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(CorpusError, match="is neither a file nor a named corpus"):
            load_corpus(["python-docs", name])
    else:  # the empty path is the current directory
        with pytest.raises(CorpusError, match="Is a directory"):
            load_corpus(name)


@pytest.mark.parametrize("source", [[], (), 123, None, [1], b"abc", {"a"}, ["a", ["b"]]])
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises(InputError, match="source must "):
        load_corpus(source)


def test_tiny_shakespeare_comes_from_the_data_folder(
    shakespeare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "fetch", None)  # whatever happens, no download
    assert load_corpus("tinyshakespeare") == shakespeare


ENCODINGS = (
    *("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32-le"),
    *("latin-1", "cp1252", "shift_jis", "gb18030", "utf-7"),
)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    encoding=st.sampled_from(ENCODINGS),
    piece=st.integers(16, 40),
    damage=st.none() | st.tuples(st.integers(0, 10**6), st.integers(0, 255)),
    packed=st.booleans(),
)
def test_a_text_read_in_pieces_is_the_text_or_the_error_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    encoding: str,
    piece: int,
    damage: tuple[int, int] | None,
    packed: bool,
) -> None:
    data = bytearray(text.encode(encoding, "replace"))
    if damage is not None and data:
        data[damage[0] % len(data)] = damage[1]
    path = tmp_path_factory.mktemp("pieces") / "text"
    path.write_bytes(gzip.compress(data) if packed else data)

    def outcome(size: int) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "_PIECE", size)
            try:
                return read_text(path, encoding=encoding)
            except CharLMError as error:
                return type(error), str(error), getattr(error, "offset", None)

    found, whole = outcome(piece), outcome(2**20)
    if "looks like" in str(found) + str(whole):  # told by the first bytes, of which there are fewer here
        return
    assert found == whole
    if isinstance(found, str):
        assert found == bytes(data).decode(encoding)
    elif isinstance(found, tuple) and found[2] is not None:
        with pytest.raises(UnicodeDecodeError) as caught:
            bytes(data).decode(encoding)
        error = caught.value
        assert found[2] == error.start + len(data) - len(error.object)
        assert f"line {bytes(data[: found[2]]).count(10) + 1})" in found[1]
        assert error.reason in found[1]


def test_a_codec_that_decodes_nothing_is_no_text_encoding(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"text")
    with pytest.raises(InputError, match="encoding must be a text encoding of Python"):
        read_text(path, encoding="undefined")


def test_a_file_that_fails_in_the_middle_is_not_called_damaged() -> None:
    packed = io.BytesIO(gzip.compress(os.urandom(2**20)))

    def read(count: int) -> bytes:
        if packed.tell():
            raise CorpusError("the disk is gone")
        return packed.read(100)

    with pytest.raises(CorpusError, match=r"^the disk is gone$"):
        list(pieces._unpacked(read, "text", gzip_wanted=True, is_wide=False))
