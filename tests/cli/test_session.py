"""A text that is written by turns: what is written, what is undone, what may come next, and what is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness.drawn_models import OVERFLOWS, mixed
from harness.tiny_models import tiny_config, tiny_gpt

from charlm import (
    BigramLM,
    BlockDataset,
    ByteTokenizer,
    CharLM,
    CharTokenizer,
    LanguageModel,
    NGramLM,
    Tokenizer,
)
from charlm.cli.session import Session
from charlm.errors import NonFiniteError, UnknownCharacterError
from charlm.generation import Overflow, SamplingOptions

RHYME = "this is the rat that ate the malt\nthat lay in the house that jack built.\n" * 20
LETTERS = CharTokenizer.from_text(RHYME)
BYTES = ByteTokenizer()
FOREIGN = "né à Zürich – 日本語 😀\n" * 30


def counted(text: str, tokenizer: Tokenizer, order: int = 5) -> NGramLM:
    return NGramLM(tokenizer.vocab_size, order).fit(BlockDataset.from_text(text, tokenizer, block_size=8))


def network(**changes: Any) -> LanguageModel:
    return tiny_gpt(tiny_config("cpu-1min", vocab_size=LETTERS.vocab_size, **changes))


MODELS: dict[str, Callable[[], CharLM]] = {
    "lecture": lambda: CharLM(tiny_gpt(tiny_config(vocab_size=LETTERS.vocab_size)), LETTERS),
    "gpt": lambda: CharLM(network(), LETTERS),
    "bigram": lambda: CharLM(
        BigramLM(LETTERS.vocab_size).fit(BlockDataset.from_text(RHYME, LETTERS, 4)), LETTERS
    ),
    "ngram": lambda: CharLM(counted(RHYME, LETTERS), LETTERS),
    "mixture": lambda: CharLM(mixed([network(), counted(RHYME, LETTERS)], 3), LETTERS),
    "bytes": lambda: CharLM(counted(FOREIGN, BYTES), BYTES),
}


def made(name: str) -> CharLM:
    return MODELS[name]()


def begun(name: str, prompt: str = "", **options: Any) -> Session:
    return Session(made(name), prompt, SamplingOptions(**{"seed": 5, "overflow": "restart", **options}))


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("prompt", ["", "the "])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_writes_what_generate_writes_in_one_go_or_in_several(
    name: str, prompt: str, overflow: Overflow
) -> None:
    session = begun(name, prompt, overflow=overflow, temperature=0.9)
    wanted = made(name).generate(prompt, 160, temperature=0.9, seed=5, overflow=overflow)
    whole = "".join(session.go_on(40))
    assert len(whole) == 40
    for _ in range(2):
        list(session.go_on(10))
    assert session.text == wanted[: len(prompt) + 60]
    assert session.text.startswith(prompt + whole)


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_undone_one_by_one_and_what_comes_then_is_as_if_they_had_never_been(name: str) -> None:
    prompt, *words = ("né à ", "Zür", " – ") if name == "bytes" else ("the ", "malt", "that")
    session = begun(name, prompt, temperature=0.5)
    texts = [session.text]
    for turn in (words[0], 30, words[1], 25, 20):
        if isinstance(turn, str):
            session.write(turn)
        else:
            list(session.go_on(turn))
        texts.append(session.text)
    for text in texts[-2::-1]:
        assert session.undo()
        assert session.text == text
        assert_alike(session, begun(name, text, temperature=0.5))
    assert not session.undo()
    assert "".join(session.go_on(70)) == "".join(begun(name, prompt, temperature=0.5).go_on(70))


def assert_alike(one: Session, other: Session) -> None:
    """Compare what may come next; the same ids, but for rounding the same chances."""
    found, wanted = one.candidates(4), other.candidates(4)
    assert [c.text for c in found] == [c.text for c in wanted]
    np.testing.assert_allclose(
        [c.probability for c in found], [c.probability for c in wanted], rtol=1e-4, atol=1e-9
    )


def test_a_step_reads_what_is_new_and_a_step_back_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(
        CharLM(network(block_size=400), LETTERS), "the malt " * 30, SamplingOptions(overflow="restart")
    )
    session.candidates(3)
    read: list[int] = []
    logits = type(session._state.engine).logits

    def counting(engine: Any, texts: Any, passes: Any) -> Any:
        read.extend(one.stop - one.start for one in passes)
        return logits(engine, texts, passes)

    monkeypatch.setattr(type(session._state.engine), "logits", counting)
    session.write("that")
    session.candidates(1)
    assert sum(read) <= 4 + 12
    read.clear()
    session.undo()
    session.candidates(1)
    assert sum(read) <= 1 + 12
    read.clear()
    session.write("the house")
    list(session.go_on(5))
    session.undo()
    session.undo()
    list(session.go_on(3))
    assert sum(read) <= 9 + 5 + 3 + 2


@pytest.mark.parametrize("name", MODELS)
def test_candidates_are_the_likeliest_characters_each_with_the_likeliest_end_of_its_word(name: str) -> None:
    text = "à Z" if name == "bytes" else "this is the "
    lm, session = made(name), begun(name, text)
    found = session.candidates(4)
    assert 1 <= len(found) <= 4
    state = lm.model.new_state(overflow="restart")
    state.observe(torch.tensor([lm.tokenizer.encode(text)]))
    logits = state.predict()[0]
    for candidate in found:
        ids = lm.tokenizer.encode(candidate.text)
        assert logits[ids[0]] >= logits.topk(4).values.min()
        scored = lm.rank([candidate.text], prompt=text)[0][1]
        assert candidate.probability == pytest.approx(math.exp(scored), rel=1e-4)
        beginning = candidate.text[0]
        longer = lm.generate(text + beginning, 60, temperature=0)[len(text) :]
        assert longer.startswith(candidate.text)
        after = longer[len(candidate.text)]
        last = candidate.text[-1]
        assert len(candidate.text) == 12 or last == "\n" or (last.isalnum() and not after.isalnum())
        assert not any(
            a.isalnum() and not b.isalnum() for a, b in zip(candidate.text, candidate.text[1:], strict=False)
        )
    assert [c.probability for c in found] == sorted((c.probability for c in found), reverse=True)
    assert session.text == text


def test_candidates_obey_the_options_and_show_their_chances() -> None:
    lm = made("ngram")
    plain = begun("ngram", "this is the ")
    assert len(plain.candidates(9)) == 9
    assert len(begun("ngram", "this is the ", top_k=2).candidates(9)) == 2
    (likeliest,) = plain.candidates(1)
    banned = lm.tokenizer.encode(likeliest.text[0])
    for candidate in begun("ngram", "this is the ", banned_ids=banned).candidates(9):
        assert likeliest.text[0] not in candidate.text
    sharp = begun("ngram", "this is the ", temperature=0.2).candidates(1)[0]
    assert sharp.probability > likeliest.probability
    assert begun("ngram", "this is the ", temperature=0).candidates(3) == plain.candidates(3)
    penal = begun("ngram", "this is the ", repetition_penalty=3.0)
    ids = torch.tensor([lm.tokenizer.encode("this is the ")])
    state = lm.model.new_state()
    state.observe(ids)
    chances = penal.options.filter(state.predict(), ids).softmax(-1)[0]
    one = next(c for c in penal.candidates(9) if len(c.text) == 1)
    assert one.probability == pytest.approx(chances[lm.tokenizer.encode(one.text)[0]].item(), rel=1e-5)


def test_candidates_for_what_is_typed_leave_the_text_as_it_is() -> None:
    session = begun("ngram", "this is ")
    assert session.candidates(3, "the m") == begun("ngram", "this is the m").candidates(3)
    assert session.text == "this is "
    with pytest.raises(UnknownCharacterError):
        session.candidates(3, "€")


def test_a_text_of_bytes_never_ends_within_a_character() -> None:
    session = begun("bytes", "né", seed=1, temperature=2.0)
    for count in (1, 2, 3, 30):
        before = session.text
        added = "".join(session.go_on(count))
        assert session.text == before + added
        assert count <= len(added) <= count + 3
        assert BYTES.decode(session._state.text(0)) == session.text
    for candidate in session.candidates(8):
        session.write(candidate.text)
        assert session.text.endswith(candidate.text)
        session.undo()
    stream = session.go_on(50)
    pieces = [next(stream) for _ in range(3)]
    before = session.text
    stream.close()
    assert before.startswith(session.text)
    assert session.text.endswith("".join(pieces))


def test_a_model_of_random_bytes_does_no_harm() -> None:
    torch.manual_seed(0)
    session = Session(CharLM(BigramLM(256), BYTES), "", SamplingOptions(seed=1))
    assert len("".join(session.go_on(40))) >= 40
    assert "\ufffd" in session.text
    assert all("\ufffd" not in candidate.text for candidate in session.candidates(20))
    while session.score_some():
        pass
    text, bits, end = session.scored()
    assert (text, len(bits), end) == (session.text, len(text), session.length)


def test_an_unknown_character_changes_nothing() -> None:
    session = begun("gpt", "the ")
    for change in (session.write, session.move_to):
        with pytest.raises(UnknownCharacterError):
            change("malt €")
        assert session.text == "the "
    assert not session.undo()


def test_a_writing_that_is_stopped_stays_and_is_one_step() -> None:
    session = begun("ngram", "the ")
    stream = session.go_on(100)
    added = [next(stream) for _ in range(4)]
    stream.close()
    assert session.text == "the " + "".join(added)
    assert session.undo()
    assert session.text == "the "


def test_a_model_that_says_nothing_finite_is_an_error_and_the_text_stays() -> None:
    model = BigramLM(LETTERS.vocab_size)
    torch.nn.init.constant_(next(model.parameters()), math.nan)
    session = Session(CharLM(model, LETTERS), "the ", SamplingOptions(seed=1))
    assert session.candidates(3) == []
    with pytest.raises(NonFiniteError):
        list(session.go_on(5))
    assert session.text == "the "


@pytest.mark.parametrize("name", MODELS)
def test_a_session_moves_to_any_text_as_if_it_had_begun_there(name: str) -> None:
    texts = ["this is the malt", "this is the rat\nthat ate", "", "jack", "this is the rat\nthat"]
    session = begun(name)
    for text in texts:
        session.move_to(text)
        assert session.text == text
        fresh = begun(name)
        fresh.write(text)
        assert_alike(session, fresh)
        assert "".join(session.go_on(9)) == "".join(fresh.go_on(9))
        assert session.undo()
        assert not session.undo()


@pytest.mark.parametrize("name", MODELS)
def test_surprisal_is_that_of_the_library_in_whatever_order_it_was_asked_for(name: str) -> None:
    lm, session = made(name), begun(name)
    text = (FOREIGN if name == "bytes" else RHYME)[:600]
    session.move_to(text[:300])
    assert session.score_some() == (len(lm.tokenizer.encode(text[:300])) > 256)
    session.move_to(text)
    asked = 1
    while session.score_some():
        asked += 1
    assert asked <= 6
    list(session.go_on(20))  # is scored as it comes
    assert not session.score_some()
    text, found, end = session.scored()
    assert (text, end) == (session.text, session.length)
    bits = -lm.log_probs(text) / math.log(2)
    lengths = [len(lm.tokenizer.encode(char)) for char in text]
    wanted = [part.sum() for part in np.split(bits, np.cumsum(lengths)[:-1])]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    behind = 1 + sum(lengths[:10])  # the line feed before the text is not shown
    assert session.scored(behind) == (text[10:], found[10:], end)
    session.move_to(text[:10])
    assert session.scored() == (text[:10], found[:10], behind)
