"""`charlm prepare`, and what `train`, `eval` and `inspect` make of a text on disk, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness.command import MIXING, TEXT, Command, text_file

import charlm
from charlm import BlockDataset, CharTokenizer
from charlm.data.prepare import prepare_corpus


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return text_file(tmp_path)


@pytest.fixture
def data(tmp_path: Path, text: Path) -> Path:
    prepare_corpus(text, tmp_path / "DATA", shard_bytes=500)
    return tmp_path / "DATA"


def record_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "train.json").read_bytes())
    return values


def weights(run: Path) -> list[bytes]:
    model = charlm.load(run, device="cpu", mixture=False).model
    return [tensor.numpy().tobytes() for tensor in model.state_dict().values()]


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let every text be too large for memory, and return the cache folder."""
    monkeypatch.setenv("CHARLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("charlm.cli.encoded.available_bytes", lambda: 1_000)
    return tmp_path / "cache"


def test_prepare_says_what_it_wrote_and_names_the_folder(
    command: Command, text: Path, tmp_path: Path
) -> None:
    assert command("prepare", text, text, "-o", tmp_path / "new") == 0
    assert command.out == f"{tmp_path / 'new'}\n"
    lines = command.err.splitlines()
    N = 2 * len(TEXT)
    assert lines[0].startswith(f"text    {N:,} characters in 2 documents, vocabulary {len(set(TEXT))}; ")
    assert lines[1].startswith(f"data    {tmp_path / 'new'}: 0.0 MB in 1 file, in ")
    assert lines[2] == f"next    charlm train {tmp_path / 'new'} -o runs/one"
    assert command("prepare", text, "-o", tmp_path / "new") == 1
    assert "holds a prepared corpus already" in command.err
    assert command("prepare", text, "-o", tmp_path / "other", "--val-fraction", "1") == 2
    assert "--val-fraction must be at least 0 and below 1, got 1" in command.err


def test_a_training_on_disk_is_the_training_in_memory(
    command: Command, text: Path, data: Path, tmp_path: Path
) -> None:
    for source, run in ((text, "memory"), (data, "disk")):
        assert command("train", source, "-o", tmp_path / run, *MIXING) == 0
    told = [line for line in command.err.splitlines() if line.startswith(("text", "n-gram", "result"))]
    assert f"{data}: {len(TEXT):,} characters" in told[0]
    assert weights(tmp_path / "memory") == weights(tmp_path / "disk")
    memory, disk = record_of(tmp_path / "memory"), record_of(tmp_path / "disk")
    assert memory["result"]["loss_nats"] == disk["result"]["loss_nats"]
    assert (memory["prepared"], disk["prepared"]) == (False, True)
    assert disk["sources"] == [str(data)]
    for run in ("memory", "disk"):
        assert command("train", "-o", tmp_path / run, "--resume", "--max-steps", "25") == 0
    assert weights(tmp_path / "memory") == weights(tmp_path / "disk")
    assert command("train", "-o", tmp_path / "again", "--repeat", tmp_path / "disk") == 1  # its end was moved
    assert command("eval", tmp_path / "disk", data, "--json") == 0
    found = json.loads(command.out)
    val = TEXT[int(0.9 * len(TEXT)) :]
    assert found["n_chars"] == len(val) - 1
    assert found["bits_per_byte"] == pytest.approx(found["bits_per_char"])
    assert found["loss_nats"] == pytest.approx(charlm.load(tmp_path / "disk").evaluate(val).loss_nats)
    assert found["baseline_loss_nats"] is not None


def test_a_run_that_was_begun_in_memory_goes_on_from_disk_and_not_the_other_way(
    command: Command, text: Path, data: Path, tmp_path: Path
) -> None:
    assert command.train(text, "-o", tmp_path / "run") == 0
    assert command("train", data, "-o", tmp_path / "run", "--resume", "--max-steps", "24") == 0
    assert command("train", text, "-o", tmp_path / "run", "--resume", "--max-steps", "28") == 1
    assert "train_data is in memory, and the run was trained with a prepared corpus" in command.err
    shutil.rmtree(data)
    prepare_corpus(text, data, shard_bytes=600)  # other files
    assert command("train", data, "-o", tmp_path / "run", "--resume", "--max-steps", "28") == 1
    assert "train_data is not the text that the run was trained with" in command.err


def test_another_text_on_disk_is_refused(command: Command, text: Path, tmp_path: Path) -> None:
    assert command.train(text, "-o", tmp_path / "run") == 0
    text.write_text(TEXT.replace("5", "6"), encoding="utf-8")
    prepare_corpus(text, tmp_path / "other", tokenizer=CharTokenizer.from_text(TEXT))
    words = ("--resume", "--max-steps", "28")
    assert command("train", tmp_path / "other", "-o", tmp_path / "run", *words) == 1
    assert "train_data is not the text that the run was trained with" in command.err


def test_the_recorded_split_is_that_of_a_training_unless_another_is_asked_for(
    command: Command, text: Path, tmp_path: Path
) -> None:
    prepare_corpus(text, tmp_path / "DATA", val_fraction=0.25)
    N = len(TEXT)
    for words, val in (((), N - int(0.75 * N)), (("--val-fraction", "0.5"), N - N // 2)):
        run = tmp_path / f"run{val}"
        assert command.train(tmp_path / "DATA", "-o", run, *words) == 0
        assert f" {val:,} for validation" in command.err
        assert command("train", "-o", run, "--resume", "--max-steps", "24") == 0
    prepare_corpus(text, tmp_path / "all", val_fraction=0)
    assert command.train(tmp_path / "all", "-o", tmp_path / "run") == 0
    assert "none for validation" in command.err
    assert command("train", "-o", tmp_path / "run", "--resume", "--max-steps", "24") == 0


def test_a_text_that_is_large_for_the_memory_is_prepared_once_into_the_cache(
    command: Command, text: Path, small_memory: Path, tmp_path: Path
) -> None:
    assert command.train(text, "-o", tmp_path / "one") == 0
    assert "prepare the text is large, and is first prepared on disk, in" in command.err
    assert record_of(tmp_path / "one")["sources"] == [str(text)]
    assert len(list((small_memory / "corpora").iterdir())) == 1
    (tmp_path / "copy.txt").write_bytes(text.read_bytes())  # the content counts
    assert command.train(tmp_path / "copy.txt", "-o", tmp_path / "two") == 0
    assert "prepare" not in command.err
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert command("eval", tmp_path / "one", text) == 0
    assert f"{len(TEXT) - 1:,}" in command.out
    assert command("eval", tmp_path / "one", text, "--show") == 2
    assert command("inspect", text, "--json") == 0
    assert json.loads(command.out)["n_chars"] == len(TEXT)


def test_a_run_on_disk_goes_on_there_where_the_memory_would_do(
    command: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHARLM_CACHE_DIR", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr("charlm.cli.encoded.available_bytes", lambda: 1_000)
        assert command.train(text, "-o", tmp_path / "run") == 0
    shutil.rmtree(tmp_path / "cache")
    assert command("train", "-o", tmp_path / "run", "--resume", "--max-steps", "24") == 0
    assert "is first prepared on disk" in command.err


def test_of_a_long_validation_text_a_part_is_scored_which_is_recorded_and_said(
    command: Command, text: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("charlm.cli.fit.MOST_EVALUATED", 100)
    monkeypatch.setattr("charlm.cli.stored.MOST_EVALUATED", 100)
    val = len(TEXT) - int(0.9 * len(TEXT))
    for source, run in ((data, tmp_path / "disk"), (text, tmp_path / "memory")):
        assert command.train(source, "-o", run) == 0
        assert f"eval    each scores about 100 of the {val} characters for validation" in command.err
        assert record_of(run)["training"]["eval_chars"] == 100
    assert command("eval", tmp_path / "disk", data) == 0
    assert f"characters, of {val - 1}, spread over them" in command.out


def test_what_does_not_go_together_with_a_prepared_corpus_is_refused(
    command: Command, text: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert command.train(data, text, "-o", run) == 2
    assert "is a prepared corpus and stands alone" in command.err
    assert command.train(data, "-o", run, "--tokenizer", "byte") == 2
    assert "--tokenizer must be char, as the prepared corpus has it" in command.err
    assert command.train(data, "-o", run) == 0
    prepare_corpus(text, tmp_path / "bytes", tokenizer="byte")
    assert command("eval", run, tmp_path / "bytes") == 1
    assert "was prepared with another tokenizer than the model's" in command.err
    assert command.train(tmp_path / "bytes", "-o", tmp_path / "other") == 0
    assert command("eval", tmp_path / "other", tmp_path / "bytes", "--json") == 0
    assert json.loads(command.out)["unit"] == "byte"
    assert command("inspect", tmp_path / "bytes") == 0


def test_tokens_whose_characters_are_not_known_are_for_python(command: Command, tmp_path: Path) -> None:
    (tmp_path / "nano").mkdir()
    for part in ("train", "val"):
        (tmp_path / "nano" / f"{part}.bin").write_bytes(bytes([1, 0, 2, 1, 3, 0]) * 50)
    assert command("prepare", tmp_path / "nano", "-o", tmp_path / "DATA") == 0
    assert BlockDataset.open(tmp_path / "DATA", 8).max_id == 258
    assert command.train(tmp_path / "DATA", "-o", tmp_path / "run") == 1
    assert "train from Python: BlockDataset.open" in command.err
    assert command("inspect", tmp_path / "DATA") == 1


def test_inspect_counts_a_sample_of_a_long_text(
    command: Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("charlm.cli.inspect._SAMPLE", 1_000)
    assert command("inspect", data) == 0
    assert command.out.startswith(f"on disk     {len(TEXT):,} characters; the counts are of a sample\n")
    assert "characters  1,000 in" in command.out


def test_a_bar_shows_how_far_a_preparation_is(
    command: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr("charlm.cli.preparing.wants_bar", lambda: True)
    assert command("prepare", text, "-o", tmp_path / "new") == 0
    monkeypatch.setattr("charlm.cli.preparing.wants_bar", lambda: False)
    monkeypatch.setattr("charlm.cli.preparing._SECONDS", 0.0)
    assert command("prepare", text, "-o", tmp_path / "lines") == 0
    assert "read    0 of 0 million" in command.err
    assert "write   0 of 0 million" in command.err
