"""`charlm info`: every key of its JSON and every line of its text, for each kind of directory."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness.command import Command, text_file

import charlm
from charlm.cli.__main__ import main
from charlm.training import list_checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of two checkpoints, and a saved model."""
    folder = tmp_path_factory.mktemp("info")
    small = (
        "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 2 --eval-interval 10 --keep-last 2"
    )
    steps = "--max-steps 20 --device cpu --precision fp32 --eval-chars 64 -q"
    text = str(text_file(folder))
    assert main(["train", text, "-o", str(folder / "run"), *small.split(), *steps.split()]) == 0
    charlm.CharLM(charlm.BigramLM(3), charlm.CharTokenizer("\nab")).save(folder / "model")
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(folder)
    return Command(capsys)


def json_of(path: Path) -> Any:
    return json.loads(path.read_bytes())


def shape_of(text: str) -> list[str]:
    """Return the lines without the settings; # stands for a number with a point, X for a clock or an id."""
    lines = [line for line in text.splitlines() if not re.match(r"  [a-z_]+  ", line)]
    text = re.sub(r"\d+:\d\d|(?<=\d{12}-)[0-9a-f]{8}", "X", "\n".join(lines))
    return re.sub(r"\d+\.\d+", "#", text).splitlines()


def files_of(path: Path) -> dict[str, Any]:
    """Return what the JSON holds of a model's files."""
    config = json_of(path / "config.json")
    model = charlm.load(path, device="cpu").model
    made = {"kind": config["kind"], "parameters": model.num_parameters(), "settings": config["config"]}
    if isinstance(model, charlm.GPT):
        made["flops_per_char"] = model.config.flops_per_char()
    vocab = "".join(json_of(path / "tokenizer.json")["vocab"])
    return {
        "model": made,
        "tokenizer": {"kind": "character", "vocab_size": len(vocab), "vocab": vocab},
    }


def training_of(path: Path) -> dict[str, Any]:
    state = json_of(path / "state.json")
    return {
        **{name: state[name] for name in ("step", "chars_seen", "seconds", "best")},
        "settings": state["config"],
    }


def entry_of(path: Path, **marks: Any) -> dict[str, Any]:
    manifest = json_of(path / "manifest.json")
    return {
        "name": path.name,
        "step": manifest["step"],
        "val_loss": manifest["val_loss"],
        "bytes": sum(file["size"] for file in manifest["files"].values()),
        "best": False,
        "newest": False,
        "damaged": False,
        "problem": None,
        **marks,
    }


def test_a_run(command: Command) -> None:
    first, last = (info.path for info in list_checkpoints("run"))
    assert command("info", "run", "--json", "--verify") == 0
    record = json_of(Path("run/train.json"))
    baseline, result = record["baseline"], record["result"]
    wanted = {
        "path": "run",
        "kind": "run",
        "run_id": json_of(Path("run/run.json"))["run_id"],
        **files_of(last),
        "training": training_of(last),
        "checkpoints": [entry_of(first), entry_of(last, best=True, newest=True)],
        "baseline": {
            "damaged": False,
            "settings": json_of(Path("run/ngram/config.json"))["config"],
            "loss_nats": baseline["loss_nats"],
            "part": [64, 226],
        },
        "result": {"kind": result["kind"], "loss_nats": result["loss_nats"][result["kind"]]},
    }
    assert json.loads(command.out) == wanted
    assert list(json.loads(command.out)) == list(wanted)
    assert command("info", "run") == 0
    assert shape_of(command.out) == [
        "run: run",
        "",
        "model: gpt, 3,968 parameters, 7,488 FLOPs per character",
        "",
        r"tokenizer: character, vocabulary 26: '\n ,0123456789abeghilnorstw'",
        "",
        "training: 20 of 20 steps, 640 characters, X",
        "",
        "result: ngram, val loss #",
        "",
        "baseline: n-gram model of order 7, 1,392 n-grams, val loss # on 64 of 226 characters",
        "",
        "checkpoints: 2, losses on 64 of 226 characters",
        "  step 10  val loss #  # MB  step-000000000010-X",
        "  step 20  val loss #  # MB  step-000000000020-X  best, newest",
    ]
    assert not command.err


def test_a_damaged_run(command: Command, tmp_path: Path) -> None:
    copy = Path(shutil.copytree("run", tmp_path / "copy"))
    first, last = (info.path for info in list_checkpoints(copy))
    (first / "model.safetensors").write_bytes(b"garbage")
    (last / "manifest.json").write_bytes(b"{}")
    (copy / "ngram" / "config.json").write_bytes(b"{}")
    size = json_of(first / "manifest.json")["files"]["model.safetensors"]["size"]
    short = f"'{first}/model.safetensors' must have {size} bytes, got 7."
    changed = f"'{last}/manifest.json' has changed since it was saved"
    lost = {"val_loss": None, "bytes": None, "step": 20}
    for flags in ([], ["--verify"]):
        assert command("info", copy, "--json", *flags) == len(flags)
        found = json.loads(command.out)
        problem = {"problem": short, "damaged": True} if flags else {}
        assert found["checkpoints"] == [
            entry_of(first, best=True, newest=True, **problem),
            {**entry_of(first), **lost, "name": last.name, "problem": changed, "damaged": True},
        ]
        assert found["training"]["step"] == 10
        assert found["baseline"] == {"damaged": True, "settings": None, "loss_nats": None, "part": None}
    assert [line[:60] for line in command.err.splitlines()] == [
        f"charlm: error: {short}"[:60],
        f"charlm: error: {changed}"[:60],
        f"charlm: error: '{copy}/ngram/config.json'"[:60],
    ]
    assert command("info", copy) == 0
    assert shape_of(command.out)[-4:] == [
        "",
        "checkpoints: 2, losses on 64 of 226 characters",
        "  step 10  val loss #   # MB  step-000000000010-X  best, newest",
        "  step 20  val loss unknown          step-000000000020-X  damaged",
    ]
    assert "\nbaseline: an n-gram model, damaged\n" in command.out


@pytest.mark.parametrize(("file", "part"), [("config.json", "model"), ("state.json", "training")])
def test_a_run_with_a_file_that_cannot_be_read_is_shown_all_the_same(
    command: Command, tmp_path: Path, file: str, part: str
) -> None:
    copy = Path(shutil.copytree("run", tmp_path / "copy"))
    for info in list_checkpoints(copy):
        (info.path / file).write_bytes(b"{")
    for verify in ([], ["--verify"]):
        assert command("info", copy, "--json", *verify) == 1
        found = json.loads(command.out)
        assert part not in found
        assert [entry["damaged"] for entry in found["checkpoints"]] == [bool(verify)] * 2
        assert file in command.err
    checkpoint = list_checkpoints(copy)[0].path
    assert command("info", checkpoint) == 1
    assert command.out.startswith(f"checkpoint: {checkpoint}\n")
    assert file in command.err


@pytest.mark.parametrize("record", [None, b"{"])
def test_an_n_gram_model_is_whole_without_the_record_of_the_run(
    command: Command, tmp_path: Path, record: bytes | None
) -> None:
    copy = Path(shutil.copytree("run", tmp_path / "copy"))
    (copy / "train.json").unlink()
    if record is not None:
        (copy / "train.json").write_bytes(record)
    for verify in ([], ["--verify"]):
        wrong = bool(verify) and record is not None
        assert command("info", copy, "--json", *verify) == wrong
        settings = json_of(copy / "ngram" / "config.json")["config"]
        known = {"damaged": False, "settings": settings, "loss_nats": None, "part": None}
        assert json.loads(command.out)["baseline"] == known
        assert ("train.json" in command.err) == wrong


def test_a_run_without_a_checkpoint(command: Command, tmp_path: Path) -> None:
    copy = Path(shutil.copytree("run", tmp_path / "copy"))
    shutil.rmtree(copy / "checkpoints")
    shutil.rmtree(copy / "ngram")
    (copy / "checkpoints").mkdir()
    assert command("info", copy, "--json") == 0
    run_id = json_of(copy / "run.json")["run_id"]
    assert json.loads(command.out) == {"path": str(copy), "kind": "run", "run_id": run_id, "checkpoints": []}
    assert command("info", copy) == 0
    assert command.out == f"run: {copy}\n\ncheckpoints: 0\n"


def test_a_checkpoint(command: Command) -> None:
    path = list_checkpoints("run")[0].path
    assert command("info", path, "--json", "--verify") == 0
    wanted = {"path": str(path), "kind": "checkpoint", **files_of(path), "training": training_of(path)}
    assert json.loads(command.out) == wanted
    assert list(json.loads(command.out)) == list(wanted)
    assert command("info", path) == 0
    assert shape_of(command.out)[1:] == [
        "",
        "model: gpt, 3,968 parameters, 7,488 FLOPs per character",
        "",
        r"tokenizer: character, vocabulary 26: '\n ,0123456789abeghilnorstw'",
        "",
        "training: 10 of 20 steps, 320 characters, X",
    ]


def test_a_saved_model(command: Command, tmp_path: Path) -> None:
    assert command("info", "model", "--json", "--verify") == 0
    wanted = {"path": "model", "kind": "model", **files_of(Path("model"))}
    assert json.loads(command.out) == wanted
    assert list(json.loads(command.out)) == list(wanted)
    assert command("info", "model") == 0
    assert command.out == (
        "model: model\n\nmodel: bigram, 9 parameters\n  vocab_size  3\n\n"
        "tokenizer: character, vocabulary 3: '\\nab'\n"
    )
    copy = Path(shutil.copytree("model", tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"x")
    assert command("info", copy, "--verify") == 1
    assert command.out.startswith(f"model: {copy}\n")
    assert command.err.startswith("charlm: error: ")
    assert command("info", copy) == 0


def test_bytes_have_no_vocabulary_to_show(command: Command, tmp_path: Path) -> None:
    charlm.CharLM(charlm.BigramLM(256), charlm.ByteTokenizer()).save(tmp_path / "model")
    assert command("info", tmp_path / "model", "--json") == 0
    assert json.loads(command.out)["tokenizer"] == {"kind": "byte", "vocab_size": 256}
    assert command("info", tmp_path / "model") == 0
    assert command.out.endswith("\ntokenizer: byte, vocabulary 256\n")
