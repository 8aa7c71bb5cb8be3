"""`charlm train --from`: a new text for a model that is there, and what is told of both."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness.command import TEXT, Command, text_file

import charlm
from charlm import BigramLM, CharLM, CharTokenizer
from charlm.data.prepared import PreparedCorpus
from charlm.runs.checkpoint import list_checkpoints

NEW = "".join(f"{i} rote Flaschen, die größte zuerst!\n" for i in range(60))
FEWER = ("--max-steps", "10", "--eval-interval", "5")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def old(tmp_path: Path, command: Command) -> Path:
    """Train a small run on a text."""
    assert command.train(text_file(tmp_path), "-o", tmp_path / "old", "--seed", "3") == 0
    return tmp_path / "old"


@pytest.fixture
def new_text(tmp_path: Path) -> Path:
    path = tmp_path / "new.txt"
    path.write_bytes(NEW.encode())
    return path


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights(run: Path) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in charlm.load(run, device="cpu").model.state_dict().items()}


def test_a_new_text_trains_the_old_model_and_both_losses_are_told(
    command: Command, old: Path, new_text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert command("train", new_text, "-o", run, "--from", old, *FEWER, "--device", "cpu") == 0, command.err
    assert f"from    {old}, with the recipe of cpu-10s and a learning rate of 0.0015\n" in command.err
    assert "new to the model: '!' U+0021, 'F' U+0046, 'c' U+0063, 'd' U+0064 and 4 more" in command.err
    begun = charlm.load(old, device="cpu").extend(NEW)
    before = begun.evaluate(TEXT[-len(TEXT) // 10 :], block_size=16).loss_nats
    told = records(run, "old")
    assert [record["step"] for record in told] == [0, 5, 10]
    assert told[0]["loss_nats"] == pytest.approx(before, abs=0.02)  # of fewer windows
    assert (
        f"old     val loss {told[0]['loss_nats']:.4f} nats before the first step, on the text of"
        in command.err
    )
    assert f"bits/char  old {told[2]['loss_nats']:.4f}" in command.err
    assert "too few to learn much from" not in command.err  # it has learnt before
    parent = json.loads((run / "train.json").read_bytes())["parent"]
    best = min(list_checkpoints(old), key=lambda info: info.val_loss or 9)
    file = best.path / "model.safetensors"
    assert parent == {
        "path": str(old),
        "checkpoint": best.path.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    vocab = [charlm.load(path, device="cpu").tokenizer for path in (old, run)]
    assert all(isinstance(tokenizer, CharTokenizer) for tokenizer in vocab)
    assert vocab[1].decode(range(vocab[0].vocab_size)) == vocab[0].decode(range(vocab[0].vocab_size))
    assert command("info", run) == 0
    assert f"\nparent: {old}, {best.path.name}, {parent['sha256']}\n" in command.out
    assert command("info", run, "--json") == 0
    assert json.loads(command.out)["parent"] == parent
    assert command("info", old, "--json") == 0
    assert "parent" not in json.loads(command.out)


def test_a_fine_tuning_goes_on_bit_for_bit_and_is_repeated(
    command: Command, old: Path, new_text: Path, tmp_path: Path
) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    words: list[str | Path] = [
        new_text,
        "--from",
        old,
        "--keep-last",
        "9",
        "--block-size",
        "8",
        "--dropout",
        "0.1",
    ]
    assert command.train(*words, "-o", one) == 0
    assert charlm.load(one).model.block_size == 8
    shutil.copytree(one, two)
    shutil.rmtree(max((two / "checkpoints").iterdir()))
    assert command("train", "--resume", "-o", two) == 0
    assert "steps   10 of 20 are done" in command.err
    assert weights(two) == weights(one)
    assert records(two, "old")[0]["step"] == 0
    assert [r["loss_nats"] for r in records(two, "old")] == [r["loss_nats"] for r in records(one, "old")]
    assert command("train", "--repeat", one, "-o", three) == 0
    assert weights(three) == weights(one)
    assert command.train(*words, "-o", one, "--resume", "auto") == 0
    assert "all 20 are done" in command.err
    assert command.train(*words[:1], "--from", two, "-o", one, "--resume", "auto") == 2
    assert f"--from {two} (it has {old})" in command.err


def test_a_repetition_needs_the_same_parent(
    command: Command, old: Path, new_text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert command.train(new_text, "-o", run, "--from", old) == 0
    text = tmp_path / "text.txt"
    assert command.train(text, "-o", old, "--overwrite", "--seed", "4") == 0
    assert command("train", "--repeat", run, "-o", tmp_path / "again") == 1
    assert "whose weights are others now: their sha256 was" in command.err
    assert command("train", "--resume", "-o", run) == 0, "its own checkpoints are enough to go on"


def test_the_old_vocabulary_can_be_kept(command: Command, old: Path, new_text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words: list[str | Path] = ["train", new_text, "--from", old, *FEWER]
    assert command(*words, "-o", run, "--on-unknown", "skip") == 0
    assert "note    not known to the model, and left out: '!' U+0021, 'F' U+0046, 'c' U+0063," in command.err
    tokenizer = charlm.load(run).tokenizer
    assert tokenizer == charlm.load(old).tokenizer
    assert command("train", "--resume", "-o", run) == 0
    assert command(*words, "-o", tmp_path / "two", "--on-unknown", "replace") == 2
    assert "--on-unknown replace needs a model with a character that stands for unknown ones" in command.err
    lm = charlm.load(run, mixture=False)
    assert isinstance(tokenizer, CharTokenizer)
    CharLM(lm.model, CharTokenizer(tokenizer.vocab, unknown=" ")).save(tmp_path / "model")
    words = ["train", new_text, "--from", tmp_path / "model", *FEWER]
    assert command(*words, "-o", tmp_path / "two", "--on-unknown", "replace") == 0, command.err
    assert "and replaced: '!' U+0021" in command.err
    assert "cannot be measured: it was saved without its text" in command.err
    assert not records(tmp_path / "two", "old")
    assert command("eval", tmp_path / "model", new_text) == 1
    assert "--on-unknown skip; charlm train --from RUN teaches them to the model" in command.err
    for how in ("skip", "replace"):
        assert command("eval", tmp_path / "model", new_text, "--on-unknown", how, "--json") == 0
        predicted = json.loads(command.out)["n_chars"]
        known = sum(char in tokenizer.vocab for char in NEW)
        assert predicted == (known if how == "skip" else len(NEW)) - 1
    assert command("generate", run, "-p", "groß", "-n", "5") == 1
    assert command("generate", run, "-p", "groß", "-n", "5", "--on-unknown", "skip") == 0
    assert command.out.startswith("gro")


def test_what_cannot_be_is_refused_before_anything_is_computed(
    command: Command, old: Path, new_text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words: list[str | Path] = ["train", new_text, "-o", run]
    assert command(*words, "--from", old, "--n-layer", "2", "--bias") == 2
    assert (
        "--from keeps the model's shape, so --n-layer, --bias cannot be given; --attention-drop"
        in command.err
    )
    assert command(*words, "--from", old, "--tokenizer", "byte") == 2
    assert "--tokenizer must be char, as the model in" in command.err
    assert command(*words, "--on-unknown", "skip") == 2
    assert "--on-unknown needs --from" in command.err
    assert command(*words, "--from", tmp_path / "none") == 1
    assert command(*words, "--init", str(old)) == 2
    assert "To begin with those of a run or a model: --from RUN" in command.err
    assert command(*words, "--init-from", str(old)) == 2
    assert "to begin with the model of a run: --from RUN" in command.err
    assert command("train", "--resume", "-o", old, "--learning-rate", "1") == 2
    assert f"A new run can begin with its model: charlm train FILE -o NEW --from {old}" in command.err
    assert command("train", new_text, "--resume", "-o", old) == 1
    assert "To train its model on another text, begin a run with it" in command.err
    CharLM(BigramLM(3), CharTokenizer("abc")).save(tmp_path / "bigram")
    assert command(*words, "--from", tmp_path / "bigram") == 1
    assert "--from needs a GPT, which can be trained further, and" in command.err
    assert not run.exists()


def test_a_parent_whose_text_is_gone_trains_all_the_same(
    command: Command, old: Path, new_text: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT + TEXT, encoding="utf-8")
    words: list[str | Path] = ["train", new_text, "--from", old, *FEWER, "-q"]
    assert command(*words[:-1], "-o", tmp_path / "a") == 0
    assert "cannot be measured: its text has changed" in command.err
    text.unlink()
    assert command(*words[:-1], "-o", tmp_path / "b") == 0
    assert "text.txt' is not there now" in command.err
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_the_text_of_another_model_in_the_parent_s_place_is_not_scored(
    command: Command, old: Path, new_text: Path, tmp_path: Path
) -> None:
    parent, run = tmp_path / "parent", tmp_path / "run"
    shutil.copytree(old, parent)
    assert command.train(new_text, "--from", parent, "--keep-last", "9", "-o", run) == 0
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert command("train", "--resume", "-o", run) == 0
    assert "cannot be measured" not in command.err
    shutil.rmtree(parent)
    assert command.train(new_text, "-o", parent) == 0
    assert command("train", "--resume", "-o", copy) == 0
    assert "cannot be measured: the model there is another one now" in command.err
    assert weights(copy) == weights(run)


@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_a_run_is_not_replaced_by_its_child(command: Command, old: Path, new_text: Path, place: str) -> None:
    before = weights(old)
    parent = max((old / place).iterdir()) if place else old
    assert command("train", new_text, "-o", old, "--from", parent, "--overwrite", *FEWER) == 2
    assert f"--from must not lie in -o '{old}', which the new run replaces" in command.err
    assert weights(old) == before


def test_a_longer_run_says_what_becomes_of_the_learning_rate(command: Command, old: Path) -> None:
    assert command("train", "--resume", "-o", old, "--max-steps", "40") == 0
    assert "schedule now end at 40 steps: the learning rate goes from 0." in command.err
    assert "--from)" in command.err
    assert command("train", "--resume", "-o", old, "--max-steps", "40") == 0
    assert "steps   all 40 are done" in command.err
    assert "schedule now end at" not in command.err  # nothing has moved
    assert command("train", "--resume", "-o", old, "--minutes", "0.00001") == 1
    assert "minutes must be more than the 0." in command.err
    seconds = 60 * 0.04
    assert command("train", "--resume", "-o", old, "--minutes", "0.04") == 0
    assert "now end at 0.04 min: the learning rate goes from" in command.err
    lm = charlm.load(old)
    assert lm.model.num_parameters() > 0
    assert records(old, "step")[-1]["seconds"] < 2 * seconds
    assert records(old, "step")[-1]["step"] > 40
    assert command("train", "--resume", "-o", old, "--minutes", "1", "--max-steps", "9999") == 1
    assert "two ends for one run" in command.err


def test_a_text_that_is_too_large_for_memory_brings_its_characters(
    command: Command, old: Path, new_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("train", new_text, "-o", tmp_path / "one", "--from", old, *FEWER) == 0
    monkeypatch.setenv("CHARLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("charlm.cli.encoded.available_bytes", lambda: 1_000)
    assert command("train", new_text, "-o", tmp_path / "two", "--from", old, *FEWER) == 0
    assert "prepare the text is large" in command.err
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    known = charlm.load(tmp_path / "two").tokenizer  # the old text lies there, too
    folders = [PreparedCorpus(folder) for folder in (tmp_path / "cache" / "corpora").iterdir()]
    [data] = [corpus.path for corpus in folders if corpus.tokenizer == known]
    assert command("train", data, "-o", tmp_path / "three", "--from", old, *FEWER) == 0
    assert weights(tmp_path / "three") == weights(tmp_path / "one")
    assert command("prepare", new_text, "-o", tmp_path / "data") == 0
    assert command("train", tmp_path / "data", "-o", tmp_path / "four", "--from", old) == 1
    assert "was prepared with another vocabulary than the model's" in command.err
    assert command("train", data, "-o", tmp_path / "four", "--from", old, "--on-unknown", "skip") == 2
    assert "--on-unknown needs a text that fits into memory" in command.err
