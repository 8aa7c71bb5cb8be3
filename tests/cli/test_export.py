"""`charlm export`, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.command import MIXING, Command, text_file

import charlm
from charlm import BigramLM, CharLM, CharTokenizer, MixtureLM, NGramLM
from charlm.interchange import from_transformers


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def mixed(command: Command, tmp_path: Path) -> Path:
    """Name a run whose result is more than its GPT."""
    assert command("train", text_file(tmp_path), "-o", tmp_path / "run", *MIXING, "--conv-width", "1") == 0
    return tmp_path / "run"


def test_a_run_is_exported_as_its_gpt_which_is_said(command: Command, mixed: Path, tmp_path: Path) -> None:
    gpt = charlm.load(mixed, mixture=False, device="cpu")
    mixture = MixtureLM([NGramLM.load(mixed / "ngram"), gpt.model])
    CharLM(mixture, gpt.tokenizer).save(tmp_path / "mixture")
    for given, out in ((mixed, tmp_path / "one"), (tmp_path / "mixture", tmp_path / "two")):
        assert command("export", given, "--to", "transformers", "-o", out) == 0
        assert command.out == f"{out}\n"
        lines = command.err.splitlines()
        count = gpt.model.num_parameters()
        assert lines[0].startswith(f"model   ApertusForCausalLM of {count:,} parameters, ")
        assert lines[1] == "        without the n-gram model: its losses are those of eval --no-mixture"
        assert lines[2] == f"next    transformers.AutoModelForCausalLM.from_pretrained('{out}')"
        back = from_transformers(out)
        assert repr(back.model) == repr(gpt.model)
        assert back.generate("3 g", 30, seed=1) == gpt.generate("3 g", 30, seed=1)


def test_what_cannot_be_exported_is_refused(command: Command, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("export", mixed, "-o", out) == 2
    assert "--to" in command.err
    CharLM(BigramLM(3), CharTokenizer("abc")).save(tmp_path / "bigram")
    assert command("export", tmp_path / "bigram", "--to", "transformers", "-o", out) == 1
    assert command.err == "charlm: error: only a GPT can be exported, got a BigramLM\n"
    mixture = MixtureLM([BigramLM(3), NGramLM(3)])
    CharLM(mixture, CharTokenizer("abc")).save(tmp_path / "counted")
    assert command("export", tmp_path / "counted", "--to", "onnx", "-o", out) == 1
    assert "only a GPT can be exported, and there is none in this mixture" in command.err
    assert not out.exists()


def test_an_export_is_replaced_only_if_asked_to(command: Command, mixed: Path, tmp_path: Path) -> None:
    words = ("export", mixed, "--to", "transformers", "-o", tmp_path / "out")
    assert command(*words) == 0
    assert command(*words) == 1
    assert (
        "is not empty. Replace it (--overwrite, overwrite=True), or choose another directory." in command.err
    )
    assert command(*words, "--overwrite") == 0
    assert command("export", mixed, "--to", "transformers", "-o", mixed, "--overwrite") == 1
    assert "holds something else than such an export" in command.err
    assert command("generate", tmp_path / "out") == 1
    assert (
        f"a model of transformers ('apertus'). Convert it: charlm import '{tmp_path}/out' -o NEW"
        in command.err
    )
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["model_type"] == "apertus"
