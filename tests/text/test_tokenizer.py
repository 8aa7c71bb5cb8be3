"""Tokenizers in memory: ids and texts, what is refused, and how the refusal reads."""

from __future__ import annotations

import pickle
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.plain_tokenizer import plain_encode

import charlm
from charlm.errors import DataError, InputError, InvalidTextError, UnknownCharacterError
from charlm.text import tokenizer as tokenizer_module
from charlm.text.tokenizer import ByteTokenizer, CharTokenizer, OnUnknown, Tokenizer

EVERY_CHARACTER = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))


def first_characters(count: int) -> str:
    return EVERY_CHARACTER[:count]


# The lecture


def test_tiny_shakespeare_has_the_numbers_of_the_lecture(shakespeare: str) -> None:
    tokenizer = CharTokenizer.from_text(shakespeare)
    assert len(shakespeare) == 1_115_394
    assert tokenizer.vocab_size == 65
    assert "".join(tokenizer.vocab) == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert tokenizer.encode("Hii, there!") == [20, 47, 47, 6, 1, 58, 46, 43, 56, 43, 2]
    assert tokenizer.decode(tokenizer.encode("hii there")) == "hii there"
    ids = tokenizer.encode_array(shakespeare)
    assert ids[:9].tolist() == [18, 47, 56, 57, 58, 1, 15, 47, 58]
    assert ids.dtype == np.uint8
    assert tokenizer.decode(ids) == shakespeare


# Encoding


@given(st.text(min_size=1))
def test_every_text_survives_encoding_and_decoding(text: str) -> None:
    for tokenizer in (CharTokenizer.from_text(text), ByteTokenizer()):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode_array(text)) == text


@given(st.data(), st.sampled_from(["error", "skip", "replace"]), st.sampled_from([1, 3, 2**16]))
def test_encoding_equals_a_dictionary_lookup(
    data: st.DataObject, on_unknown: OnUnknown, stretch: int
) -> None:
    alphabet = data.draw(st.sampled_from(["abc\n", "aé\xff\x00", "a’…\u2028", "a😀é\U0010ffff"]))
    vocab = data.draw(st.lists(st.sampled_from(alphabet), min_size=1, unique=True))
    text = data.draw(st.text(st.sampled_from(alphabet)))
    unknown = data.draw(st.sampled_from(vocab))
    tokenizer = CharTokenizer(vocab, unknown=unknown)
    with pytest.MonkeyPatch.context() as patch:  # a stretch's end may fall anywhere
        patch.setattr(tokenizer_module, "_STRETCH", stretch)
        try:
            expected = plain_encode(vocab, text, on_unknown, unknown)
        except KeyError:
            with pytest.raises(UnknownCharacterError):
                tokenizer.encode(text, on_unknown=on_unknown)
            return
        assert tokenizer.encode(text, on_unknown=on_unknown) == expected
        assert tokenizer.encode_array(text, on_unknown=on_unknown).tolist() == expected


@pytest.mark.parametrize("vocab_size", [1, 254, 255, 256, 257, 65_535, 65_536, 65_537])
def test_ids_have_the_smallest_type_that_holds_them_all(vocab_size: int) -> None:
    vocab = first_characters(vocab_size)
    tokenizer = CharTokenizer(vocab)
    ids = tokenizer.encode_array(vocab[-1] + vocab[0])
    assert ids.tolist() == [vocab_size - 1, 0]
    assert ids.dtype == (np.uint8 if vocab_size <= 256 else np.uint16 if vocab_size <= 65_536 else np.uint32)
    for beyond in (EVERY_CHARACTER[vocab_size], "\U0010ffff"):
        with pytest.raises(UnknownCharacterError):
            tokenizer.encode(beyond)


def test_a_text_longer_than_one_stretch_is_whole_and_in_order() -> None:
    text = ("abc" * 30_000) + "’" + ("cab" * 30_000)
    vocab = "abc’"
    tokenizer = CharTokenizer(vocab)
    assert tokenizer.encode(text) == plain_encode(vocab, text, "error", None)
    assert CharTokenizer("abc").encode(text, on_unknown="skip") == plain_encode("abc", text, "skip", None)


def test_the_array_belongs_to_the_caller() -> None:
    for tokenizer in (CharTokenizer("ab"), ByteTokenizer()):
        for on_unknown in ("error", "skip"):
            ids = tokenizer.encode_array("abba", on_unknown=on_unknown)
            ids[0] = 1
            assert tokenizer.encode("abba")[0] != 1
    skipped = CharTokenizer("ab").encode_array("a" + "x" * 1000, on_unknown="skip")
    assert skipped.base is None  # no thousand ids held behind one


def test_the_empty_text_has_no_ids() -> None:
    for tokenizer in (CharTokenizer("ab", unknown="a"), ByteTokenizer()):
        for on_unknown in ("error", "skip", "replace"):
            assert tokenizer.encode("", on_unknown=on_unknown) == []
        assert tokenizer.encode_array("").dtype == np.uint8
        assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    "text", ["\ufeffa", "a\x00b", "a\r\nb\rc", "a\u2028b\u2029c", "e\u0301 é", "\u202eabc"]
)
def test_odd_characters_are_kept_exactly(text: str) -> None:
    for tokenizer in (CharTokenizer.from_text(text), ByteTokenizer()):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_are_those_of_utf8() -> None:
    assert ByteTokenizer().encode("é’😀") == list("é’😀".encode())
    assert ByteTokenizer().vocab_size == 256
    assert ByteTokenizer().encode("\U0010ffff", on_unknown="skip") == [0xF4, 0x8F, 0xBF, 0xBF]


def test_bytes_that_are_not_utf8_decode_to_replacement_characters() -> None:
    assert ByteTokenizer().decode([0xFF, 97, 0xC3]) == "\ufffda\ufffd"
    assert ByteTokenizer().decode(range(128)) == "".join(map(chr, range(128)))


# Unknown characters and invalid text


def test_unknown_characters_are_named_with_their_places() -> None:
    with pytest.raises(UnknownCharacterError) as caught:
        CharTokenizer("it’s abcdefgh".replace("’", "")).encode("ab cd it efgh ’s abc… ’")
    assert str(caught.value) == (
        "2 characters are not in the vocabulary: '’' (U+2019) at position 14 (line 1, column 15), "
        "'…' (U+2026) at position 20 (line 1, column 21); "
        'encode(..., on_unknown="skip") leaves such out, and a ByteTokenizer knows all'
    )
    error = caught.value
    assert (error.characters, error.count) == (("’", "…"), 3)
    assert (error.position, error.line, error.column) == (14, 1, 15)
    assert isinstance(error, ValueError)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.__dict__) == (str(error), error.__dict__)


def test_one_unknown_character_reads_as_one_and_shows_its_line() -> None:
    with pytest.raises(UnknownCharacterError) as caught:
        CharTokenizer("ab\n\r").encode("ab\r\nab\n\nab\x07\x07")
    assert str(caught.value).startswith(
        r"1 character is not in the vocabulary: '\x07' (U+0007) at position 10 (line 4, column 3); encode"
    )
    assert caught.value.count == 2


@pytest.mark.parametrize(("known", "given"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("word", ["café", "Việt", "각하", "Ångström"])
def test_a_text_that_fails_by_its_normal_form_alone_gets_the_way_out(
    known: Literal["NFC", "NFD"], given: Literal["NFC", "NFD"], word: str
) -> None:
    tokenizer = CharTokenizer.from_text(unicodedata.normalize(known, word))
    text = unicodedata.normalize(given, word)
    advice = f'; all are in the normal form {known} of the text: unicodedata.normalize("{known}", text)'
    with pytest.raises(UnknownCharacterError) as caught:
        tokenizer.encode(text)
    assert str(caught.value).endswith(advice)
    assert tokenizer.decode(tokenizer.encode(unicodedata.normalize(known, text))) != text
    with pytest.raises(UnknownCharacterError) as caught:  # this character no form has
        tokenizer.encode(text + "?")
    assert "normal form" not in str(caught.value)


def test_at_most_five_unknown_characters_are_shown() -> None:
    text = "a" * 70_000 + "zyxwv" + "u" * 70_000 + "t"
    with pytest.raises(UnknownCharacterError) as caught:
        CharTokenizer("a").encode(text)
    assert str(caught.value).startswith(
        "7 characters are not in the vocabulary: 'z' (U+007A) at position 70000 "
    )
    assert "'v' (U+0076) at position 70004 (line 1, column 70005), and 2 more; encode" in str(caught.value)
    assert caught.value.characters == tuple("zyxwvut")
    assert caught.value.count == 70_006


@pytest.mark.parametrize("code", [0xD800, 0xDBFF, 0xDC00, 0xDFFF])
def test_a_lone_surrogate_is_refused_with_its_place(code: int) -> None:
    surrogate = chr(code)
    text = "a" * 70_000 + "\nb" + surrogate + surrogate
    wide = CharTokenizer(first_characters(300))
    for encode in (
        CharTokenizer("ab\n").encode,
        CharTokenizer("ab\n").encode_array,
        CharTokenizer("a").encode,  # here "b" is unknown too; the text is invalid first
        lambda text: CharTokenizer("ab\n").encode(text, on_unknown="skip"),
        wide.encode,
        ByteTokenizer().encode,
        ByteTokenizer().encode_array,
        CharTokenizer.from_text,
        lambda text: CharTokenizer.from_text(["fine", text]),
    ):
        with pytest.raises(InvalidTextError) as caught:
            encode(text)
        assert caught.value.offset == 70_002
        assert f"got the lone surrogate U+{code:04X} at position 70002 (line 2, column 2)" in str(
            caught.value
        )
        assert surrogate not in str(caught.value)


@pytest.mark.parametrize("text", [123, None, b"ab", ["a"]])
def test_a_text_that_is_no_string_is_refused(text: Any) -> None:
    message = f"text must be a str, got {type(text).__name__}"
    for tokenizer in (CharTokenizer("ab"), ByteTokenizer()):
        for encode in (tokenizer.encode, tokenizer.encode_array):
            with pytest.raises(InputError) as caught:
                encode(text)
            assert str(caught.value) == message


@pytest.mark.parametrize("on_unknown", ["ignore", None, True, [], "Error"])
def test_an_unheard_of_way_with_unknown_characters_is_refused(on_unknown: Any) -> None:
    for tokenizer in (CharTokenizer("ab"), ByteTokenizer()):
        for encode in (tokenizer.encode, tokenizer.encode_array):
            with pytest.raises(InputError, match='on_unknown must be "error", "skip" or "replace", got '):
                encode("ab", on_unknown=on_unknown)


def test_replacing_needs_a_character_to_replace_with() -> None:
    with pytest.raises(InputError, match=r"needs a tokenizer with an unknown character; make one with"):
        CharTokenizer("ab").encode("ab", on_unknown="replace")


# Decoding


@pytest.mark.parametrize(
    "ids",
    [
        [0, 2, 1],
        (0, 2, 1),
        iter([0, 2, 1]),
        [np.int64(0), np.uint8(2), 1],
        [torch.tensor(0), torch.tensor(2), torch.tensor(1)],
        b"\x00\x02\x01",
        np.array([0, 2, 1], np.uint8),
        np.array([0, 2, 1], np.uint64),
        np.array([0, 2, 1], ">i4"),
        np.array([0, 9, 2, 9, 1])[::2],
        torch.tensor([0, 2, 1]),
        torch.tensor([0, 2, 1], dtype=torch.uint8),
        torch.tensor([0, 2, 1], dtype=torch.uint16),
    ],
)
def test_ids_may_come_as_any_row_of_integers(ids: Any) -> None:
    assert CharTokenizer("a’c").decode(ids) == "ac’"


def test_a_row_without_ids_is_the_empty_text() -> None:
    for ids in (np.array([], np.int64), torch.tensor([], dtype=torch.int64), range(0)):
        assert CharTokenizer("ab").decode(ids) == ""


@pytest.mark.parametrize("bad", [-1, 3, 255, 2**40, -(2**63), 2**63, 10**30])
def test_an_id_out_of_range_is_named_with_its_place(bad: int) -> None:
    rows: list[Any] = [[0, 1, bad, -1]]
    if -(2**63) <= bad < 2**63:
        rows += [np.array(rows[0]), torch.tensor(rows[0])]
    for ids in rows:
        with pytest.raises(InputError) as caught:
            CharTokenizer("abc").decode(ids)
        got = "a larger number" if bad == 10**30 else str(bad)
        assert str(caught.value).startswith(
            f"ids must be in [0, 3), as vocab_size is 3, got {got} at position 2; decode with"
        )
    with pytest.raises(InputError, match=r"in \[0, 256\)"):
        ByteTokenizer().decode([256])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array(1), "one dimension, got shape (); decode rows one by one"),
        (torch.tensor(1), "one dimension, got shape (); decode rows one by one"),
        (np.zeros((2, 3), int), "one dimension, got shape (2, 3); decode rows one by one"),
        (torch.zeros((2, 3), dtype=torch.int64), "one dimension, got shape (2, 3); decode rows one by one"),
        ([[0, 1], [1, 0]], "ints, got list at position 0; decode rows one by one"),
        ([0, np.array([1, 0])], "ints, got int64 at position 1; decode rows one by one"),
        ([0, 1.0], "ints, got float at position 1"),
        ([0, None], "ints, got NoneType at position 1"),
        ("01", "ints, got str at position 0"),
        ([0, True], "ints, got bool at position 1"),
        ([np.True_], "ints, got bool at position 0"),
        ([torch.tensor(True)], "ints, got torch.bool at position 0"),
        ([np.float32(1)], "ints, got float32 at position 0"),
        (np.array([0.0]), "integers, got float64; convert"),
        (np.array([True]), "integers, got bool; convert"),
        (np.array(["a"]), "integers, got <U1; convert"),
        (np.array([0], object), "integers, got object; convert"),
        (torch.tensor([0.0]), "integers, got float32; convert"),
        (torch.tensor([True]), "integers, got bool; convert"),
        (torch.tensor([0.0], requires_grad=True), "integers, got float32; convert"),
        (torch.tensor([0], dtype=torch.bfloat16), "integers, got a torch.bfloat16 tensor on cpu"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), "integers, got a torch.int64 tensor on meta"),
        (1, "a list, array or tensor of ints, got int"),
        (None, "a list, array or tensor of ints, got NoneType"),
    ],
)
def test_what_is_no_row_of_integers_is_refused(ids: Any, message: str) -> None:
    for tokenizer in (CharTokenizer("ab"), ByteTokenizer()):
        with pytest.raises(InputError) as caught:
            tokenizer.decode(ids)
        assert message in str(caught.value)


# Vocabularies


def test_the_vocabulary_of_several_texts_is_sorted_by_code_point() -> None:
    tokenizer = CharTokenizer.from_text(line for line in ["b’", "", "aB\n"])
    assert tokenizer.vocab == ("\n", "B", "a", "b", "’")
    assert tokenizer == CharTokenizer.from_text("b’aB\n")


def test_the_order_of_a_given_vocabulary_is_kept() -> None:
    assert CharTokenizer("zab").encode("abz") == [1, 2, 0]
    assert CharTokenizer(["z", "a", "b"]) == CharTokenizer("zab") == CharTokenizer(("z", "a", "b"))


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ("", "vocab must hold at least one character, got none"),
        ([], "vocab must hold at least one character, got none"),
        (["a", ""], "vocab must hold single characters, got '' at index 1"),
        (["a", "bc"], "vocab must hold single characters, got 'bc' at index 1"),
        (["a", "\r\n"], r"vocab must hold single characters, got '\r\n' at index 1"),
        (["a", 1], "vocab must hold single characters, got 1 at index 1"),
        (["a", None], "vocab must hold single characters, got None at index 1"),
        (b"ab", "vocab must hold single characters, got 97 at index 0"),
        ("abcb", "vocab must hold each character once, got 'b' at index 1 and again at index 3"),
        (["\n", "\n"], r"vocab must hold each character once, got '\n' at index 0 and again at index 1"),
        ("a\ud800", "vocab must hold valid Unicode, got the lone surrogate U+D800 at index 1"),
        ({"a", "b"}, "vocab must be a string or a list of characters, got set"),
        (65, "vocab must be a string or a list of characters, got int"),
    ],
)
def test_a_wrong_vocabulary_is_refused(vocab: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        CharTokenizer(vocab)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("unknown", "shown"), [("c", "'c'"), ("ab", "'ab'"), ("", "''"), (0, "0"), (False, "False")]
)
def test_an_unknown_character_outside_the_vocabulary_is_refused(unknown: Any, shown: str) -> None:
    with pytest.raises(InputError) as caught:
        CharTokenizer("ab", unknown=unknown)
    assert str(caught.value) == f"unknown must be one character of vocab or None, got {shown}"


def test_a_vocabulary_cannot_come_from_nothing() -> None:
    for nothing in ("", [], ["", ""]):
        with pytest.raises(DataError, match="at least one character"):
            CharTokenizer.from_text(nothing)
    wrong: Any
    for wrong in (123, None, [123]):
        with pytest.raises(InputError, match="text must be a str"):
            CharTokenizer.from_text(wrong)


# Values


def test_tokenizers_are_values() -> None:
    one, same, other = CharTokenizer("ab"), CharTokenizer(["a", "b"]), CharTokenizer("ba")
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != CharTokenizer("ab", unknown="a")
    assert one != "ab"
    assert ByteTokenizer() == ByteTokenizer()
    assert hash(ByteTokenizer()) == hash(ByteTokenizer())
    assert ByteTokenizer() != one
    assert len({one, same, other, ByteTokenizer(), ByteTokenizer()}) == 3


def test_tokenizers_cannot_be_changed() -> None:
    tokenizer: Any
    for tokenizer in (CharTokenizer("ab"), ByteTokenizer()):
        for name in ("vocab", "vocab_size", "unknown", "anything"):
            with pytest.raises(AttributeError):
                setattr(tokenizer, name, 1)


class Subclass(CharTokenizer):
    """A tokenizer of somebody else."""


def test_tokenizers_pickle() -> None:
    for tokenizer in (CharTokenizer("b’a", unknown="a"), ByteTokenizer(), Subclass("ab")):
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again == tokenizer
        assert type(again) is type(tokenizer)
        assert again.encode("ab") == tokenizer.encode("ab")


def test_a_repr_shows_the_vocabulary_without_control_characters() -> None:
    assert repr(CharTokenizer("\na")) == r"<CharTokenizer of 2 characters: '\na'>"
    assert repr(CharTokenizer("ab?", unknown="?")) == "<CharTokenizer of 3 characters: 'ab?', unknown='?'>"
    assert len(repr(CharTokenizer(EVERY_CHARACTER))) < 500
    assert repr(ByteTokenizer()) == "ByteTokenizer()"


def test_both_are_tokenizers_to_the_protocol() -> None:
    protocols: list[Tokenizer] = [CharTokenizer("ab"), ByteTokenizer()]
    assert all(isinstance(tokenizer, Tokenizer) for tokenizer in protocols)
    assert not isinstance("ab", Tokenizer)


@pytest.mark.slow
def test_the_wing_works_without_torch() -> None:
    code = (
        "import sys; from charlm.text import corpus, tokenizer; t = tokenizer.CharTokenizer('ab'); "
        "t.decode(t.encode('ab')); print('torch' in sys.modules)"
    )
    root = str(Path(charlm.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "False\n"


def test_ways_with_unknown_characters_are_three() -> None:
    way: Literal["error", "skip", "replace"] = "skip"
    assert CharTokenizer("ab", unknown="a").encode("bxb", on_unknown=way) == [1, 1]
    assert CharTokenizer("ab", unknown="a").encode("bxb", on_unknown="replace") == [1, 0, 1]
