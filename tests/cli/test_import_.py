"""`charlm import`, in this process."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from harness.command import Command
from harness.tiny_models import tiny_config, tiny_gpt

import charlm
from charlm import CharLM, CharTokenizer
from charlm.interchange import to_transformers

TOKENIZER = CharTokenizer("\n .abcdé€😀XYZ")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    """Name a folder with a checkpoint of nanoGPT's form, and beside it the folder of its data."""
    gpt = tiny_gpt(tiny_config("gpt2", activation="gelu"))
    (tmp_path / "out").mkdir()
    (tmp_path / "data").mkdir()
    saved = {"model": gpt.state_dict(), "model_args": gpt.config.to_dict()}
    torch.save(saved, tmp_path / "out" / "ckpt.pt")
    meta = {"vocab_size": 13, "itos": dict(enumerate(TOKENIZER.vocab))}
    (tmp_path / "data" / "meta.pkl").write_bytes(pickle.dumps(meta))
    (tmp_path / "data" / "input.txt").write_text("".join(TOKENIZER.vocab), encoding="utf-8")
    return tmp_path / "out"


def test_a_checkpoint_is_read_with_any_form_of_its_vocabulary(
    command: Command, nanogpt: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    for i, (source, vocabulary) in enumerate(
        [(nanogpt, data), (nanogpt / "ckpt.pt", data / "meta.pkl"), (nanogpt, data / "input.txt")]
    ):
        out = tmp_path / f"model{i}"
        assert command("import", source, vocabulary, "-o", out) == 0, command.err
        assert command.out == f"{out}\n"
        lines = command.err.splitlines()
        assert lines[0].startswith("model   GPT of ")
        assert lines[0].endswith(" parameters from nanoGPT, vocabulary 13, window 16")
        assert lines[1] == f"next    charlm generate {out}"
        assert set(charlm.load(out, device="cpu").tokenizer.decode(range(13))) == set(TOKENIZER.vocab)
    (data / "meta.pkl").rename(nanogpt / "meta.pkl")
    assert command("import", nanogpt, "-o", tmp_path / "model3") == 0
    assert command("generate", tmp_path / "model3", "-n", "20") == 0


def test_a_vocabulary_that_is_missing_is_asked_for(command: Command, nanogpt: Path, tmp_path: Path) -> None:
    assert command("import", nanogpt, "-o", tmp_path / "model") == 1
    assert "does not say which characters it speaks in; give its vocabulary behind it" in command.err
    assert command("import", tmp_path / "none", "-o", tmp_path / "model") == 1
    assert command.err.endswith("none' does not exist\n")
    assert command("import", tmp_path, "-o", tmp_path / "model") == 1
    assert (
        "it has no config.json of transformers, no ckpt.pt of nanoGPT, no model.pt of minGPT" in command.err
    )
    (tmp_path / "short.txt").write_text("abc", encoding="utf-8")
    assert command("import", nanogpt, tmp_path / "short.txt", "-o", tmp_path / "model") == 1
    assert "must have the 13 characters of the model, got 3" in command.err
    assert not (tmp_path / "model").exists()


def test_heads_of_a_mingpt_are_an_option(command: Command, nanogpt: Path, tmp_path: Path) -> None:
    gpt = tiny_gpt(tiny_config("gpt2", tie_weights=False))
    torch.save(gpt.state_dict(), nanogpt / "model.pt")
    (nanogpt / "ckpt.pt").unlink()
    words = ("import", nanogpt, tmp_path / "data", "-o", tmp_path / "model")
    assert command(*words) == 1
    assert "n_head must be given" in command.err
    assert command(*words, "--n-head", "2") == 0
    assert " parameters from minGPT, " in command.err


def test_a_run_is_not_replaced_and_no_option_is_promised_for_it(command: Command, tmp_path: Path) -> None:
    to_transformers(CharLM(tiny_gpt(tiny_config("cpu-1min")), TOKENIZER), tmp_path / "there")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for overwrite in ([], ["--overwrite"]):
        assert command("import", tmp_path / "there", "-o", run, *overwrite) == 1
        assert "holds files that are no part of a saved model ('checkpoints')" in command.err
        assert "so --overwrite replaces nothing. Choose another directory." in command.err
    assert [entry.name for entry in run.iterdir()] == ["checkpoints"]


def test_a_folder_of_transformers_is_read_and_a_model_replaced_only_if_asked_to(
    command: Command, tmp_path: Path
) -> None:
    lm = CharLM(tiny_gpt(tiny_config("cpu-1min")), TOKENIZER)
    to_transformers(lm, tmp_path / "there")
    words = ("import", tmp_path / "there", "-o", tmp_path / "model")
    assert command(*words) == 0
    assert " parameters from transformers, vocabulary 13, window 16" in command.err
    assert repr(charlm.load(tmp_path / "model", device="cpu").model) == repr(lm.model)
    assert command(*words) == 1
    assert "holds a saved model. Replace it (--overwrite), or choose another directory" in command.err
    assert command(*words, "--overwrite") == 0
    assert command("import", tmp_path / "there", "-o", tmp_path / "there", "--overwrite") == 2
    assert "-o DIR must be another directory than PATH" in command.err
    assert command("import", tmp_path / "model", "-o", tmp_path / "new") == 1
    assert "'model_type', got None" in command.err
