"""CharLM: text in, text out; and load, which finds a model wherever one was saved."""

from __future__ import annotations

import math
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import tiny_config, tiny_gpt
from harness.tiny_training import TEXT, TOKENIZER, global_generators, quick_config, same_tensors, tiny_split
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles.plain_evaluation import plain_evaluation
from torch import Tensor
from typing_extensions import override

from charlm import GPT, BigramLM, ByteTokenizer, CharLM, CharTokenizer, LanguageModel, Trainer, load
from charlm.errors import (
    BackendError,
    CheckpointCorruptError,
    CheckpointError,
    DataError,
    FileFormatError,
    InputError,
    UnknownCharacterError,
)
from charlm.runs.checkpoint import read_checkpoint
from charlm.testing import RecordingBackend
from charlm.training import list_checkpoints

LETTERS = "\nabcdefghijkl"


def gpt(vocab_size: int = 13) -> LanguageModel:
    # In float64 the rounding that depends on the batch's size is far below what a sample could show.
    return tiny_gpt(tiny_config("lecture", vocab_size=vocab_size), dtype=torch.float64).eval()


def lm_of_letters() -> CharLM:
    return CharLM(gpt(), CharTokenizer(LETTERS))


def lm_of_bytes() -> CharLM:
    return CharLM(gpt(256), ByteTokenizer())


LM, BYTES = lm_of_letters(), lm_of_bytes()
prompts = st.text(alphabet=LETTERS, max_size=20)


def test_one_prompt_gives_one_text_and_several_give_a_list() -> None:
    assert len(LM.generate("ab", 10, seed=1)) == 12
    assert [len(text) for text in LM.generate(["ab", "abc"], 10, seed=1)] == [12, 13]
    assert [len(text) for text in LM.generate(("ab",), 0)] == [2]
    assert LM.generate([], 10) == []
    assert len(LM.generate("a")) == 501
    assert LM.generate("ab", 0) == "ab"


@settings(deadline=None, max_examples=20)
@given(st.lists(prompts, min_size=1, max_size=5), st.data(), st.integers(0, 2**40), st.integers(0, 25))
def test_a_text_depends_on_its_prompt_and_its_place_alone(
    texts: list[str], data: st.DataObject, seed: int, count: int
) -> None:
    """Row i is the same whatever the other prompts are, as long as it stands at place i."""
    got = LM.generate(texts, count, seed=seed)
    row = data.draw(st.integers(0, len(texts) - 1))
    others = data.draw(st.lists(prompts, min_size=row, max_size=row + 2))
    changed = [*others[:row], texts[row], *others[row:]]
    assert LM.generate(changed, count, seed=seed)[row] == got[row]
    assert all(new.startswith(text) for new, text in zip(got, texts, strict=True))
    assert [len(new) - len(text) for new, text in zip(got, texts, strict=True)] == [count] * len(texts)
    assert LM.generate(texts[0], count, seed=seed) == got[0]


def test_equal_prompts_at_different_places_get_different_texts() -> None:
    assert len(set(LM.generate(["ab"] * 4, 20, seed=1))) == 4


@settings(deadline=None, max_examples=20)
@given(
    prompts,
    st.integers(0, 2**40),
    st.integers(0, 40),
    st.lists(st.text(alphabet=LETTERS, min_size=1, max_size=3), max_size=3),
    st.sampled_from(["slide", "restart"]),
)
def test_the_stream_joins_to_what_generate_returns(
    prompt: str, seed: int, count: int, stop: list[str], overflow: Any
) -> None:
    whole = LM.generate(prompt, count, seed=seed, stop=stop, overflow=overflow)
    parts = list(LM.stream(prompt, count, seed=seed, stop=stop, overflow=overflow))
    assert prompt + "".join(parts) == whole
    assert all(parts)
    free = LM.generate(prompt, count, seed=seed, overflow=overflow)[len(prompt) :]
    cuts = [end - len(s) for end in range(len(free) + 1) for s in stop if free.endswith(s, 0, end)]
    if not cuts:
        assert whole == prompt + free
    else:
        new = whole[len(prompt) :]
        assert free.startswith(new)
        assert len(new) in cuts
        first_end = min(free.find(s) + len(s) for s in stop if s in free)
        assert len(new) == min(first_end - len(s) for s in stop if free.endswith(s, 0, first_end))


@settings(deadline=None, max_examples=12)
@given(st.text(max_size=6), st.integers(0, 2**40), st.lists(st.text(min_size=1, max_size=2), max_size=2))
def test_bytes_come_out_as_whole_characters(prompt: str, seed: int, stop: list[str]) -> None:
    whole = BYTES.generate(prompt, 30, seed=seed, stop=stop)
    parts = list(BYTES.stream(prompt, 30, seed=seed, stop=stop))
    assert prompt + "".join(parts) == whole
    whole.encode()
    if not stop:
        ids = BYTES.model.generate(
            torch.tensor([list(prompt.encode()) or [10]]), 30, seed=seed, overflow="restart"
        )
        new = bytes(ids[0, -30:].tolist()).decode("utf-8", "replace")
        assert whole == prompt + new


@settings(deadline=None, max_examples=12)
@given(st.text(LETTERS, min_size=1, max_size=20), st.integers(0, 40), st.integers(0, 2**40))
def test_a_text_goes_on_from_its_string_wherever_it_was_cut(prompt: str, cut: int, seed: int) -> None:
    first = LM.generate(prompt, cut, seed=seed)
    assert LM.generate(first, 40 - cut, seed=seed) == LM.generate(prompt, 40, seed=seed)


@settings(deadline=None, max_examples=12)
@given(st.text(min_size=1, max_size=6), st.integers(0, 40), st.integers(0, 2**40))
@example("é", 1, 0)  # cut inside a character, or behind what is none
def test_bytes_go_on_from_their_ids_wherever_they_were_cut(prompt: str, cut: int, seed: int) -> None:
    ids = torch.tensor([BYTES.tokenizer.encode(prompt)])  # (1, T)
    first = BYTES.model.generate(ids, cut, seed=seed, overflow="restart")
    whole = BYTES.model.generate(first, 40 - cut, seed=seed, overflow="restart")
    assert BYTES.tokenizer.decode(whole[0]) == BYTES.generate(prompt, 40, seed=seed)


class Typist(LanguageModel):
    """Writes a given text, one character after the other, by position; counts its forward passes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        from charlm.models.config import BigramConfig

        self.config = BigramConfig(vocab_size=len(LETTERS))
        self.ids = [LETTERS.index(c) for c in text]
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.calls = 0

    @override
    @classmethod
    def from_config(cls, config: Any) -> Typist:
        return cls("a")

    @override
    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: object = None
    ) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        B, T = idx.shape
        logits = torch.full((B, T, self.vocab_size), -100.0)
        for t in range(T):
            logits[:, t, self.ids[t % len(self.ids)]] = 100.0
        return logits, None


def typed(text: str, stop: list[str], count: int = 10) -> tuple[str, int]:
    """Return what a typist of `text` adds to a prompt of one character, and how many passes that took."""
    model = Typist(text)
    new = CharLM(model, CharTokenizer(LETTERS)).generate("a", count, stop=stop, temperature=0)[1:]
    streamed = CharLM(model, CharTokenizer(LETTERS)).stream("a", count, stop=stop, temperature=0)
    calls = model.calls
    assert "".join(streamed) == new
    return new, calls


@pytest.mark.parametrize(
    ("stop", "new", "calls"),
    [
        ([], "bcdbcdefgh", 10),
        (["bcde"], "bcd", 7),  # begins again inside its own first try
        (["cdb", "dbc"], "b", 4),
        (["dbcd", "bc"], "", 2),
        (["gh", "fgh"], "bcdbcde", 10),  # complete at once: the one that began first
        (["hi"], "bcdbcdefgh", 10),  # held back, and given back at the end
        (["b"], "", 1),
    ],
)
def test_the_text_ends_before_the_first_stop_string(stop: list[str], new: str, calls: int) -> None:
    assert typed("bcdbcdefghij", stop) == (new, calls)


def test_the_stop_string_can_be_kept() -> None:
    order = "bcdbcdefghij"
    lm = CharLM(Typist(order), CharTokenizer(LETTERS))
    options: dict[str, Any] = {"stop": ["de"], "temperature": 0, "keep_stop": True}
    assert lm.generate("a", 10, **options) == "a" + order[: order.index("de") + 2]
    assert "".join(lm.stream("a", 10, **options)) == order[: order.index("de") + 2]
    assert lm.generate(["a", "a"], 10, **options) == ["a" + order[: order.index("de") + 2]] * 2


def test_rows_that_have_stopped_wait_and_the_work_ends_with_the_last() -> None:
    model = Typist("bcdefghijk")
    lm = CharLM(model, CharTokenizer(LETTERS))
    # The typist goes by position: from prompts of one and two characters it writes "bcd…" and "cde…".
    assert lm.generate(["a", "aa", "l"], 9, stop=["d", "f"], temperature=0) == ["abc", "aac", "lbc"]
    assert model.calls == 3 + 2  # rows of one length share their passes
    assert lm.generate(["a", "aa"], 9, stop=["g"], temperature=0) == ["abcdef", "aacdef"]


def test_closing_a_stream_ends_the_work_and_leaves_nothing_open() -> None:
    model = Typist("bcd")
    model.train()
    stream = CharLM(model, CharTokenizer(LETTERS)).stream("a", 1_000_000, temperature=0)
    assert next(stream) == "b"
    assert model.training
    assert torch.is_grad_enabled()
    calls = model.calls
    close = getattr(stream, "close")  # noqa: B009 - an Iterator in its type, a generator in fact
    close()
    assert list(stream) == []
    assert model.calls == calls == 1


def test_an_empty_prompt_begins_after_a_line_break_that_is_not_returned() -> None:
    new = LM.generate("", 30, seed=5)
    assert len(new) == 30
    assert LM.generate("\n", 30, seed=5) == "\n" + new
    assert "".join(LM.stream(max_new_tokens=30, seed=5)) == new
    other = CharLM(gpt(3), CharTokenizer("abc"))
    assert other.generate("a", 9, seed=5) == "a" + other.generate("", 9, seed=5)


def test_unknown_characters_are_refused_before_anything_is_computed() -> None:
    model = Typist("bcd")
    lm = CharLM(model, CharTokenizer(LETTERS))
    for call in (
        lambda: lm.generate("abX"),
        lambda: lm.generate(["ab", "abX"]),
        lambda: lm.stream("abX"),
        lambda: lm.evaluate("abX"),
    ):
        with pytest.raises(UnknownCharacterError, match="X"):
            call()
    assert model.calls == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 5}, "prompt must be a str, or a list or tuple of str"),
        ({"prompt": ["a", 5]}, "prompt must be a str, or a list or tuple of str"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an int, 0 or more, got -1"),
        ({"max_new_tokens": True}, "max_new_tokens must be an int"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"stop": "end"}, "stop must be a sequence of non-empty strings"),
        ({"stop": [""]}, "stop must be a sequence of non-empty strings"),
        ({"stop": [3]}, "stop must be a sequence of non-empty strings"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_generate_and_by_stream_before_its_first_piece(
    arguments: dict[str, Any], message: str
) -> None:
    lm = CharLM(Typist("bcd"), CharTokenizer(LETTERS))
    with pytest.raises(InputError, match=message):
        lm.generate(**arguments)
    with pytest.raises(InputError, match="prompt must be a str" if "prompt" in arguments else message):
        lm.stream(**arguments)
    with pytest.raises(InputError, match=r"prompt must be a str, got list; generate\(\) takes several"):
        lm.stream(["a"])  # type: ignore[arg-type]  # the wrong type is the point


def test_without_a_seed_one_draw_is_taken_from_the_global_generator() -> None:
    torch.manual_seed(4)
    first = LM.generate(["a", "b"], 20)
    second = LM.generate(["a", "b"], 20)
    torch.manual_seed(4)
    assert LM.generate(["a", "b"], 20) == first != second
    before = global_generators()
    LM.generate("a", 20, seed=1)
    LM.generate("a", 20, temperature=0)
    assert global_generators() == before


def test_the_vocabularies_must_have_one_size() -> None:
    with pytest.raises(InputError, match="must have one vocabulary, got 13 and 2 ids"):
        CharLM(gpt(), CharTokenizer("ab"))
    assert repr(LM).startswith("CharLM(GPT(vocab_size=13")


@pytest.mark.parametrize("text", ["ab", "abc" * 30, "hello\n".replace("o", "a") * 5])
def test_evaluate_scores_every_character_but_the_first(text: str) -> None:
    result = LM.evaluate(text)
    block_size = min(16, len(text) - 1)
    loss, accuracy, count = plain_evaluation(LM.model, LM.tokenizer.encode(text), block_size)
    assert result.n_chars == result.n_bytes == count == len(text) - 1
    assert result.loss_nats == pytest.approx(loss, rel=1e-5)
    assert result.accuracy == pytest.approx(accuracy)
    assert result.bits_per_byte == pytest.approx(result.bits_per_char)


def test_bits_per_byte_compare_tokenizers() -> None:
    text = "né€" * 4
    characters = CharLM(BigramLM(3), CharTokenizer("né€"))
    result = characters.evaluate(text)
    assert (result.n_chars, result.n_bytes) == (11, 4 * 6 - 1)
    assert result.bits_per_byte == pytest.approx(result.loss_nats / math.log(2) * 11 / 23)
    with_bytes = BYTES.evaluate(text)
    assert with_bytes.n_chars == with_bytes.n_bytes == 23
    assert CharLM(BigramLM(3), CharTokenizer("né€")).evaluate("€né").n_bytes == 3


def test_a_text_too_short_to_predict_is_an_error() -> None:
    for text in ("", "a"):
        with pytest.raises(
            DataError, match=f"must have at least two characters to predict one, got {len(text)}"
        ):
            LM.evaluate(text)
    assert CharLM(BigramLM(13), CharTokenizer(LETTERS)).evaluate("abc" * 400).n_chars == 1_199


def test_a_saved_model_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    for lm in (LM, BYTES):
        lm.save(tmp_path / "model")
        again = load(str(tmp_path / "model"), device="cpu")
        assert again.tokenizer == lm.tokenizer
        assert same_tensors(again.model.state_dict(), lm.model.state_dict())
        assert not again.model.training
        assert again.generate("ab", 20, seed=3) == lm.generate("ab", 20, seed=3)


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    LM.model.save(tmp_path / "model")
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer\.json, so its ids cannot be turned into text"
    ):
        load(tmp_path / "model", device="cpu")


def test_a_model_and_a_tokenizer_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    LM.save(tmp_path / "model")
    CharTokenizer("ab").save(tmp_path / "model" / "tokenizer.json")
    with pytest.raises(InputError, match="must have one vocabulary"):
        load(tmp_path / "model", device="cpu")


def test_where_nothing_lies_there_is_an_error(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "no model in"),
        (tmp_path / "nowhere", "does not exist"),
        (Path(__file__), "is no directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(path, device="cpu")
    with pytest.raises(BackendError, match="unknown device"):
        load(tmp_path, device="abacus")


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"run {number}").mkdir()
        (tmp_path / f"run {number}" / "run.json").write_text("{}")
    first = ", ".join(repr(str(tmp_path / f"run {number}")) for number in range(3))
    with pytest.raises(CheckpointError, match=re.escape(f"is no run, but holds {first} and 2 more")):
        load(tmp_path, device="cpu")


class BestAtFour(Trainer):
    """A trainer whose validation loss is lowest after step 4."""

    @override
    def evaluate(self, data: object = None, *, max_chars: int | None = None) -> Any:
        import dataclasses

        result = super().evaluate(max_chars=max_chars)
        return dataclasses.replace(result, loss_nats=1.0 + abs(self.step - 4))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train, val = tiny_split()
    BestAtFour(
        BigramLM(TOKENIZER.vocab_size),
        train,
        quick_config(keep_last=2),
        val_data=val,
        device="cpu",
        out_dir=tmp_path / "run",
        tokenizer=TOKENIZER,
    ).fit()
    return tmp_path / "run"


def paths_of(run: Path) -> list[Path]:
    return [info.path for info in list_checkpoints(run)]


def test_a_run_is_loaded_with_its_best_weights(run: Path) -> None:
    best, *others = paths_of(run)
    assert best.name.startswith("step-000000000004-")
    lm = load(run, device="cpu")
    assert lm.tokenizer == TOKENIZER
    assert not lm.model.training
    assert same_tensors(lm.model.state_dict(), LanguageModel.load(best).state_dict())
    assert not same_tensors(lm.model.state_dict(), LanguageModel.load(others[-1]).state_dict())
    assert lm.evaluate(TEXT).n_chars == len(TEXT) - 1


def test_a_damaged_best_checkpoint_falls_back_with_a_warning(run: Path) -> None:
    """Whichever file it is: `reliability/test_damage.py`."""
    name = "model.safetensors"
    best, second, newest = paths_of(run)
    data = bytearray((best / name).read_bytes())
    data[len(data) // 2] ^= 1
    (best / name).write_bytes(data)
    with pytest.warns(RuntimeWarning, match=f"{name}.*; loading '{second.name}' instead") as caught:
        lm = load(run, device="cpu")
    assert caught[0].filename == __file__
    assert same_tensors(lm.model.state_dict(), LanguageModel.load(second).state_dict())
    with pytest.raises(CheckpointCorruptError, match=name):
        load(best, device="cpu")
    for path in (second, newest):
        (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*: .*; .*; "):
        load(run, device="cpu")


def test_a_run_without_scores_gives_its_newest_checkpoint(tmp_path: Path) -> None:
    train, _ = tiny_split()
    trainer = Trainer(
        BigramLM(TOKENIZER.vocab_size),
        train,
        quick_config(keep_last=3),
        device="cpu",
        out_dir=tmp_path / "run",
        tokenizer=TOKENIZER,
    )
    steps = trainer.steps()
    next(steps)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*: none was saved yet"):
        load(tmp_path / "run", device="cpu")
    list(steps)
    lm = load(tmp_path / "run", device="cpu")
    assert same_tensors(lm.model.state_dict(), trainer.model.state_dict())


def test_a_checkpoint_that_a_run_deletes_meanwhile_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, second, _ = paths_of(run)
    real = read_checkpoint

    def read(path: Path, run_id: str | None = None) -> Any:
        if path == best:
            shutil.rmtree(best)
        return real(path, run_id)

    monkeypatch.setattr("charlm.runs.choosing.read_checkpoint", read)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm = load(run, device="cpu")
    assert same_tensors(lm.model.state_dict(), LanguageModel.load(second).state_dict())


def test_a_checkpoint_is_a_model_also_under_another_name(run: Path, tmp_path: Path) -> None:
    best = paths_of(run)[0]
    lm = load(best, device="cpu")
    copy = shutil.copytree(best, tmp_path / "my model")
    assert same_tensors(load(copy, device="cpu").model.state_dict(), lm.model.state_dict())


def test_a_run_json_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileFormatError, match=r"must hold a string in 'format'"):
        load(tmp_path, device="cpu")


def test_a_checkpoint_without_its_manifest_is_no_saved_model(run: Path) -> None:
    best = paths_of(run)[0]
    (best / "manifest.json").unlink()
    with pytest.raises(CheckpointCorruptError, match=r"has no manifest\.json: the save did not end"):
        load(best, device="cpu")


def test_it_keeps_the_backend_that_it_was_loaded_with_and_asks_it(tmp_path: Path) -> None:
    LM.save(tmp_path / "model")
    backend = RecordingBackend()
    lm = load(tmp_path / "model", device=backend)
    backend.calls.clear()
    assert lm.evaluate("abcabc").loss_nats == LM.evaluate("abcabc").loss_nats
    assert backend.calls == ["to_device"]
    assert lm.backend is backend
    lm.surprisal("abcabc")
    assert len(backend.calls) == 2


def test_a_model_that_was_moved_since_is_used_where_it_is_now() -> None:
    backend = RecordingBackend()
    lm = CharLM(gpt(), CharTokenizer(LETTERS), backend=backend)
    assert lm.backend is backend
    lm.model.to("meta")
    assert (type(lm.backend).__name__, lm.backend.device.type) == ("DeviceBackend", "meta")


def test_extend_adds_the_characters_of_a_text_and_keeps_what_was_learnt() -> None:
    larger = LM.extend("a new text, with é\n")
    assert larger.tokenizer.vocab_size > 13
    assert isinstance(larger.tokenizer, CharTokenizer)
    assert "".join(larger.tokenizer.vocab) == LETTERS + " ,ntwxé"
    assert larger.generate("ab", 60, temperature=0) == LM.generate("ab", 60, temperature=0)
    assert larger.evaluate("a new text").n_chars == 9
    assert LM.tokenizer.vocab_size == 13
    again = LM.extend("abc", block_size=8)
    assert again.tokenizer == LM.tokenizer
    assert again.model is not LM.model
    assert again.model.block_size == 8
    assert BYTES.extend("é").tokenizer.vocab_size == 256


def test_continuations_are_ranked_by_the_sum_of_their_log_probs() -> None:
    tokenizer = CharTokenizer("abcd\n")
    torch.manual_seed(0)
    lm = CharLM(
        GPT.from_config("cpu-10s", vocab_size=5, n_layer=1, n_embd=16, block_size=8).eval(), tokenizer
    )
    texts = ["abc", "d", "ddddddddddddd", "abc"] + ["ab" * n for n in range(1, 70)]
    ranked = lm.rank(texts, prompt="abcdabcd")
    wanted = [(text, lm.log_probs(text, prompt="abcdabcd").sum()) for text in texts]
    wanted.sort(key=lambda one: -one[1])
    assert [text for text, _ in ranked] == [text for text, _ in wanted]
    np.testing.assert_allclose([nats for _, nats in ranked], [nats for _, nats in wanted], atol=1e-4)
    assert lm.rank([]) == []
    for bad in ("abc", [""], ["a", 3]):
        with pytest.raises(InputError, match="continuation"):
            lm.rank(bad)  # type: ignore[arg-type]  # the point
