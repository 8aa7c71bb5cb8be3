"""The n-gram baseline of `charlm train`: counted before, shown beside the model, no part of the training."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.command import TEXT, Command, text_file

import charlm
from charlm import BlockDataset, CharTokenizer, NGramLM, Trainer
from charlm.cli import baseline
from charlm.evaluation import evaluate
from charlm.training import StepsEstimate, TrainResult


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return text_file(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def record_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "train.json").read_bytes())
    return values


def entropy_of(data: BlockDataset) -> Any:
    """Return what single characters of a text are worth, to be compared."""
    counts = Counter(data.ids.tolist()).values()
    return pytest.approx(-sum(n / len(data.ids) * math.log(n / len(data.ids)) for n in counts))


def weights(run: Path) -> list[str]:
    """Return the digest of the weights and training state of each checkpoint."""
    checkpoints = sorted((run / "checkpoints").iterdir())
    return [
        hashlib.sha256(
            b"".join(t.numpy().tobytes() for t in charlm.load(path, device="cpu").model.state_dict().values())
        ).hexdigest()
        for path in checkpoints
    ]


def test_the_line_before_training_has_the_loss_of_the_model_that_is_saved(
    command: Command, text: Path, run: Path
) -> None:
    assert command.train(text, "-o", run) == 0
    tokenizer = CharTokenizer.from_text(TEXT)
    train, val = BlockDataset.from_text(TEXT, tokenizer, 16).split(0.9)
    wanted = evaluate(NGramLM(tokenizer.vocab_size).fit(train), val)
    shown = f"{wanted.loss_nats:.4f} nats ({wanted.bits_per_char:.4f} bits/char)\n"
    assert re.search(
        rf"^n-gram  baseline of order 7, counted in 0\.\d s: {re.escape(shown)}", command.err, re.M
    )
    assert record_of(run)["baseline"] == {
        "order": 7,
        "loss_nats": wanted.loss_nats,
        "counted": len(train.ids),
        "scored": len(val.ids),
        "n_left_out": 0,
        "entropy_nats": entropy_of(val),
    }
    saved = charlm.load(run / "ngram", device="cpu")
    assert isinstance(saved.model, NGramLM)
    assert evaluate(saved.model, val) == wanted
    assert isinstance(charlm.load(run, device="cpu").model, charlm.GPT)


def test_the_end_says_who_is_better(command: Command, text: Path, run: Path, tmp_path: Path) -> None:
    assert command.train(text, "-o", run) == 0
    loss = record_of(run)["baseline"]["loss_nats"]
    assert re.search(
        rf"^n-gram  baseline {loss:.4f} nats, not beaten, \d\.\d{{4}} better than the GPT$",
        command.err,
        re.M,
    )
    noise = "".join(map(chr, torch.randint(97, 123, (6_000,), generator=torch.Generator().manual_seed(0))))
    file = text_file(tmp_path, noise)
    assert command.train(file, "-o", run, "--overwrite", "--max-steps", "60", "--learning-rate", "0.001") == 0
    assert re.search(r"^n-gram  baseline \d\.\d{4} nats, beaten by 0\.\d{4}$", command.err, re.M)


def test_training_is_the_same_bit_for_bit_without_it(command: Command, text: Path, tmp_path: Path) -> None:
    dropout = ("--dropout", "0.1")
    assert command.train(text, "-o", tmp_path / "with", *dropout) == 0
    assert command.train(text, "-o", tmp_path / "without", "--no-baseline", *dropout) == 0
    assert "n-gram" not in command.err
    assert not (tmp_path / "without" / "ngram").exists()
    assert record_of(tmp_path / "without")["baseline"] is None
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    logs = [(tmp_path / name / "metrics.jsonl").read_text("utf-8") for name in ("with", "without")]
    losses = [re.findall(r'"(?:train_)?loss[^,]*', log) for log in logs]
    assert losses[0] == losses[1]
    assert losses[0]


def test_a_resumed_run_keeps_its_baseline(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run) == 0
    before = {path.name: path.read_bytes() for path in (run / "ngram").iterdir()}
    values = record_of(run)["baseline"]
    assert command("train", "--resume", "-o", run, "--max-steps", "30") == 0
    assert "counted" not in command.err
    assert f"n-gram  baseline {values['loss_nats']:.4f} nats" in command.err
    assert record_of(run)["baseline"] == values
    assert {path.name: path.read_bytes() for path in (run / "ngram").iterdir()} == before
    assert command("train", "--resume", "-o", run, "--no-baseline") == 2
    assert "--no-baseline cannot be given with --resume" in command.err


def test_overwrite_deletes_it_too(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run) == 0
    assert command.train(text, "-o", run, "--overwrite", "--no-baseline") == 0
    assert sorted(entry.name for entry in run.iterdir()) == [
        ".lock",
        "checkpoints",
        "metrics.jsonl",
        "run.json",
        "train.json",
    ]


def test_eval_shows_it_on_the_same_text_in_the_same_windows(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run) == 0
    other = text.with_name("other.txt")
    other.write_text(TEXT[500:1500], encoding="utf-8")
    wanted = charlm.load(run / "ngram", device="cpu").evaluate(TEXT[500:1500], block_size=16)
    assert command("eval", run, other, "--device", "cpu") == 0
    own = charlm.load(run, device="cpu").evaluate(TEXT[500:1500]).loss_nats
    assert " ".join(command.out.splitlines()[-1].split()) == (
        f"n-gram {wanted.loss_nats:.4f} nats per character, the baseline: "
        f"{own - wanted.loss_nats:.4f} better than the model"
    )
    assert command("eval", run, other, "--device", "cpu", "--json") == 0
    assert json.loads(command.out)["baseline_loss_nats"] == wanted.loss_nats
    checkpoint = next((run / "checkpoints").iterdir())
    assert command("eval", checkpoint, other, "--device", "cpu", "--json") == 0
    assert json.loads(command.out)["baseline_loss_nats"] is None


def test_eval_without_one_says_nothing_and_with_a_damaged_one_warns(
    command: Command, text: Path, run: Path
) -> None:
    assert command.train(text, "-o", run) == 0
    (run / "ngram" / "model.safetensors").write_bytes(b"garbage")
    assert command("eval", run, text, "--device", "cpu") == 0
    assert command.err.startswith("charlm: warning: no baseline: ")
    assert "n-gram" not in command.out
    shutil.rmtree(run / "ngram")
    assert command("eval", run, text, "--device", "cpu") == 0
    assert not command.err
    assert "n-gram" not in command.out


def test_info_has_one_line_for_it(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run) == 0
    model = charlm.load(run / "ngram", device="cpu").model
    loss = record_of(run)["baseline"]["loss_nats"]
    number = model.config.to_dict()["n_ngrams"]
    line = f"\nbaseline: n-gram model of order 7, {number:,} n-grams, val loss {loss:.4f}\n"
    assert command("info", run, "--verify") == 0
    assert line in command.out
    assert command("info", run, "--json") == 0
    assert json.loads(command.out)["baseline"] == {
        "damaged": False,
        "loss_nats": loss,
        "part": None,
        "settings": model.config.to_dict(),
    }
    assert command("info", run / "ngram", "--verify") == 0
    assert "model: ngram, " in command.out


def test_info_shows_a_damaged_one_as_damaged(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run) == 0
    (run / "ngram" / "model.safetensors").write_bytes(b"garbage")
    assert command("info", run) == 0
    assert command("info", run, "--verify") == 1
    assert "baseline: an n-gram model, damaged\n" in command.out
    assert "model.safetensors" in command.err
    (run / "ngram" / "config.json").write_bytes(b"{}")
    assert command("info", run) == 0
    assert "baseline: an n-gram model, damaged\n" in command.out
    assert command("train", "--resume", "-o", run, "--max-steps", "25") == 0


def test_info_of_a_run_without_one_has_no_such_line(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run, "--no-baseline") == 0
    assert command("info", run) == 0
    assert "baseline" not in command.out


def test_it_writes_text(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run) == 0
    assert command("generate", run / "ngram", "-p", "5 green", "-n", "40", "-t", "0", "--device", "cpu") == 0
    assert command.out.startswith("5 green bottles, hanging on the wall\n")


def test_it_drafts_and_the_text_stays_the_same(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run) == 0
    for flags in ([], ["--num-samples", "2"], ["-t", "0", "--json"]):
        assert command("generate", run, "-n", "80", "--seed", "3", *flags) == 0
        alone = command.out.replace('"draft": false', '"draft": true')
        assert command("generate", run, "-n", "80", "--seed", "3", "--draft", *flags) == 0
        assert command.out == alone
    shutil.rmtree(run / "ngram")
    assert command("generate", run, "--draft") == 1
    assert "--draft needs the n-gram baseline that charlm train leaves in a run" in command.err
    assert not command.out


def test_without_validation_it_is_counted_and_not_scored(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run, "--val-fraction", "0") == 0
    assert re.search(r"^n-gram  baseline of order 7, counted in 0\.\d s$", command.err, re.M)
    assert record_of(run)["baseline"]["loss_nats"] is None
    assert (run / "ngram" / "config.json").exists()


def test_of_a_long_text_only_a_part_is_counted_and_scored(
    command: Command, text: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "_MOST_COUNTED", 1_000)
    monkeypatch.setattr(baseline, "_MOST_SCORED", 100)
    monkeypatch.setattr(baseline, "_LEAST_SCORED", 100)
    assert command.train(text, "-o", run) == 0
    assert "counted from the last 1,000 characters in 0." in command.err
    assert " bits/char) on 96 of 226 characters\n" in command.err
    tokenizer = CharTokenizer.from_text(TEXT)
    train, val = BlockDataset.from_text(TEXT, tokenizer, 16).split(0.9)
    model = NGramLM(tokenizer.vocab_size).fit(BlockDataset(train.ids[-1_000:], 1))
    spread = [0, 2, 4, 7, 9, 11]  # of 14 windows
    losses = [evaluate(model, BlockDataset(val.ids[16 * i : 16 * i + 17], 16)).loss_nats for i in spread]
    values = record_of(run)["baseline"]
    assert values == {
        "order": 7,
        "loss_nats": pytest.approx(sum(losses) / 6),
        "counted": 1_000,
        "scored": 96,
        "n_left_out": 130,
        "entropy_nats": entropy_of(val),
    }
    assert f"n-gram  baseline {values['loss_nats']:.4f} nats on 96 characters, not beaten, " in command.err


@pytest.mark.parametrize(("strange", "unlike"), [(5, False), (4, True), (6, True), (0, True)])
def test_a_text_is_compared_with_the_sixth_of_each_ten_of_its_pieces(strange: int, unlike: bool) -> None:
    """One piece of ten is noise, as the validation text is: where it is scored, that is nothing unlike."""
    draw = random.Random(0)
    noise = ["".join(draw.choices("abcdefghij", k=100)) for _ in range(80)]
    pieces = [noise.pop() if i % 10 == strange else "abcdefghij" * 10 for i in range(200)]
    tokenizer = CharTokenizer("abcdefghij")
    train, val = (BlockDataset.from_text("".join(text), tokenizer, 16) for text in (pieces, noise))
    counted = baseline.count_within(train, tokenizer.vocab_size)
    assert baseline.score_baseline(counted, train, val, tokenizer).unlike == unlike


@pytest.mark.parametrize(("seconds", "counted"), [(0.1, 500), (0.6, 500), (2.0, 1_000), (1e6, 2_043)])
def test_within_a_time_as_much_is_counted_as_fits_into_it(
    monkeypatch: pytest.MonkeyPatch, seconds: float, counted: int
) -> None:
    real, now = NGramLM.fit, [0.0]

    def slow(model: NGramLM, data: BlockDataset) -> NGramLM:
        now[0] += len(data.ids) / 1_000
        return real(model, data)

    monkeypatch.setattr(NGramLM, "fit", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(baseline, "_TRIAL", 500)
    tokenizer = CharTokenizer.from_text(TEXT)
    train, val = BlockDataset.from_text(TEXT, tokenizer, 16).split(0.9)
    got = baseline.count_within(train, tokenizer.vocab_size, seconds)
    assert (got.chars, got.seconds) == (counted, now[0])
    assert got.seconds <= seconds or counted == 500  # the trial itself
    fresh = real(NGramLM(tokenizer.vocab_size), BlockDataset(train.ids[-counted:], 1))
    assert evaluate(got.model, val) == evaluate(fresh, val)  # the trial has left nothing


def test_it_counts_towards_the_minutes(
    command: Command, text: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments: list[str] = []
    times: list[float] = []
    real, real_training = NGramLM.fit, Trainer.fit

    def noticed(model: NGramLM, data: BlockDataset) -> NGramLM:
        moments.append("baseline")
        times.append(time.perf_counter())
        time.sleep(0.2)
        return real(model, data)

    from charlm.cli import fit

    def budget(seconds: float, *args: Any, **options: Any) -> StepsEstimate:
        moments.append("budget")
        assert seconds < 60 - (time.perf_counter() - times[0])
        return StepsEstimate(10, 8, 12, 0.1)

    def training(trainer: Trainer) -> TrainResult:
        moments.append("training")
        assert 60 > trainer.seconds >= time.perf_counter() - times[0] - 0.1 >= 0.1
        return real_training(trainer)

    monkeypatch.setattr(NGramLM, "fit", noticed)
    monkeypatch.setattr(fit, "steps_within", budget)
    monkeypatch.setattr(Trainer, "fit", training)
    small = ("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--device", "cpu")
    flags = (*small, "--minutes", "1", "--max-steps", "20", "--no-mixture")
    assert command("train", *flags, text, "-o", run) == 0
    assert moments == ["baseline", "training"]  # the clock decides, and nothing is estimated
    moments.clear()
    times.clear()
    assert command("train", *flags, text, "-o", run, "--overwrite", "--schedule", "cosine") == 0
    assert moments == ["baseline", "budget", "training"]
    assert record_of(run)["training"]["max_steps"] == 10


def test_a_run_goes_on_where_it_cannot_be_written(
    command: Command, text: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.mkdir

    def mkdir(path: Any, *args: Any) -> None:
        if Path(path).parent == run.absolute() and Path(path).name.startswith(".tmp-"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *args)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert command.train(text, "-o", run) == 0
    assert "No space left on device; the run goes on without its n-gram model" in command.err
    assert not (run / "ngram").exists()
    monkeypatch.undo()
    assert command("eval", run, text, "--device", "cpu") == 0
