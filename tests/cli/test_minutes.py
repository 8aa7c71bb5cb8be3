"""`charlm train --minutes`: what it says before, meanwhile and afterwards, and `--repeat`."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.command import TEXT, Command, text_file

import charlm
from charlm import BlockDataset, NGramLM
from charlm.cli import baseline, fit
from charlm.cli import verdict as verdict_module
from charlm.cli.baseline import count_within, entropy_nats
from charlm.training import TrainerConfig, read_timetable

pytestmark = pytest.mark.slow

SMALL = (
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "2"),
    *("--device", "cpu", "--precision", "fp32", "--preset", "cpu-10s"),
)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def weights(run: Path) -> dict[str, bytes]:
    """Return the weights of each checkpoint by its step."""
    return {
        path.name.split("-")[1]: b"".join(
            tensor.numpy().tobytes() for tensor in charlm.load(path, device="cpu").model.state_dict().values()
        )
        for path in (run / "checkpoints").iterdir()
    }


def record_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "train.json").read_bytes())
    return values


def test_a_run_within_minutes_is_repeated_bit_for_bit(command: Command, tmp_path: Path) -> None:
    text, one, two = text_file(tmp_path), tmp_path / "one", tmp_path / "two"
    assert command("train", text, "-o", one, *SMALL, "--minutes", "0.06", "--seed", "5") == 0
    assert re.search(
        r"^steps   as many as fit into 0.06 min; each 2 blocks of 16 characters$", command.err, re.M
    )
    assert command("train", "-o", two, "--repeat", one) == 0
    assert "steps   those of the run that is repeated; each 2 blocks" in command.err
    assert read_timetable(two) == read_timetable(one)
    assert weights(two) == weights(one)
    assert record_of(two)["training"] == record_of(one)["training"]
    assert record_of(two)["training"]["minutes"] == 0.06
    assert command("info", one) == 0
    assert re.search(r"^training: [\d,]+ steps within 0\.06 min, ", command.out, re.M)


def test_a_run_of_steps_is_repeated_too(command: Command, tmp_path: Path) -> None:
    text, one, two = text_file(tmp_path), tmp_path / "one", tmp_path / "two"
    assert command.train(text, "-o", one) == 0
    assert command("train", "-o", two, "--repeat", one, "--no-baseline") == 0
    assert weights(two) == weights(one)
    assert not (two / "ngram").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--minutes", "2"), "a repeated run keeps its settings, so --minutes cannot be given with --repeat"),
        (("--seed", "2", "--tokenizer", "byte"), "so --tokenizer, --seed cannot be given with --repeat"),
        (
            ("--resume",),
            "--repeat cannot be given with --resume; only --max-steps, --minutes, --device and --log-to can",
        ),
    ],
)
def test_what_would_change_a_repetition_is_refused(
    command: Command, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    assert command("train", "-o", tmp_path / "new", "--repeat", tmp_path / "old", *words) == 2
    assert message in command.err


def test_a_run_that_is_not_there_or_not_ended_is_not_repeated(command: Command, tmp_path: Path) -> None:
    assert command("train", "-o", tmp_path / "new", "--repeat", tmp_path / "old") == 1
    assert "old" in command.err
    assert not (tmp_path / "new").exists()


def test_another_text_is_not_the_same_training(command: Command, tmp_path: Path) -> None:
    text, one, two = text_file(tmp_path), tmp_path / "one", tmp_path / "two"
    assert command("train", text, "-o", one, *SMALL, "--minutes", "0.06") == 0
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("bottles", "letters"), encoding="utf-8")
    assert command("train", other, "-o", two, "--repeat", one) == 0
    assert weights(two) != weights(one)  # allowed: it is a comparison of texts with all else equal
    assert "train_data is not the text of the run in" in command.err


def test_a_run_whose_end_was_moved_is_not_repeated(command: Command, tmp_path: Path) -> None:
    text, one = text_file(tmp_path), tmp_path / "one"
    assert command.train(text, "-o", one) == 0
    assert command("train", "-o", one, "--resume", "--max-steps", "25") == 0
    assert command("train", "-o", tmp_path / "two", "--repeat", one) == 1
    assert "the end of this run was moved by --resume" in command.err
    record = record_of(one)
    assert record.pop("moved_end") is True
    record["commands"] = ["charlm train my.txt -o one", "charlm train -o one --resume --max-steps=25"]
    (one / "train.json").write_text(json.dumps(record))  # as older versions wrote it
    assert command("train", "-o", tmp_path / "three", "--repeat", one) == 1
    assert "the end of this run was moved by --resume" in command.err


def test_a_repetition_takes_the_recorded_device_and_mentions_what_it_ignores(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, one, two = text_file(tmp_path), tmp_path / "one", tmp_path / "two"
    assert command.train(text, "-o", one) == 0
    monkeypatch.setenv("CHARLM_LEARNING_RATE", "0.5")
    assert command("train", "-o", two, "--repeat", one) == 0
    assert "a repeated run keeps its settings; ignored: CHARLM_LEARNING_RATE" in command.err
    assert record_of(two)["device"] == record_of(one)["device"] == "cpu"


def test_settings_that_a_record_lacks_are_those_of_the_time_when_it_was_written(
    command: Command, tmp_path: Path
) -> None:
    text, one, two = text_file(tmp_path), tmp_path / "one", tmp_path / "two"
    words = ["--optimizer", "adamw", "--replacement", "--betas", "0.9", "0.99", "--grad-clip", "1"]
    assert command.train(text, "-o", one, *words, "--momentum", "0.95") == 0
    record = record_of(one)
    absent = {"optimizer", "replacement", "betas", "momentum", "grad_clip"}
    record["training"] = {k: v for k, v in record["training"].items() if k not in absent}
    (one / "train.json").write_text(json.dumps(record), encoding="utf-8")
    assert command("train", "-o", two, "--repeat", one) == 0
    assert weights(two) == weights(one)


def test_a_preset_that_is_none_is_refused(command: Command, tmp_path: Path) -> None:
    text, one = text_file(tmp_path), tmp_path / "one"
    assert command.train(text, "-o", one) == 0
    record = one / "train.json"
    record.write_text(json.dumps({**record_of(one), "preset": "\x1b[31mEVIL"}), encoding="utf-8")
    assert command("train", "-o", tmp_path / "two", "--repeat", one) == 1
    assert "must name a preset" in command.err
    assert "\x1b" not in command.err


def test_minutes_and_max_steps_may_stand_together(command: Command, tmp_path: Path) -> None:
    text, run = text_file(tmp_path), tmp_path / "run"
    assert command("train", text, "-o", run, *SMALL, "--minutes", "5", "--max-steps", "12") == 0
    assert "as many as fit into 5 min, at most 12; each" in command.err
    assert re.search(r"^done    12 steps", command.err, re.M)


def test_minutes_may_come_from_the_file_and_the_environment(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, settings = text_file(tmp_path), tmp_path / "settings.toml"
    settings.write_text("[training]\nminutes = 3\n", encoding="utf-8")
    few = ("--max-steps", "5")
    assert command("train", text, "-o", tmp_path / "one", *SMALL, *few, "--config", settings) == 0
    assert "as many as fit into 3 min" in command.err
    monkeypatch.setenv("CHARLM_MINUTES", "2.5")
    assert command("train", text, "-o", tmp_path / "two", *SMALL, *few) == 0
    assert record_of(tmp_path / "two")["training"]["minutes"] == 2.5


def test_a_cosine_says_that_its_end_is_an_estimate(command: Command, tmp_path: Path) -> None:
    text, run = text_file(tmp_path), tmp_path / "run"
    assert command("train", text, "-o", run, *SMALL, "--minutes", "0.06", "--schedule", "cosine") == 0
    found = re.search(
        r"^note    cosine needs its end beforehand: it falls over ([\d,]+) steps, an", command.err, re.M
    )
    assert found is not None
    assert record_of(run)["training"]["max_steps"] == int(found[1].replace(",", ""))


def test_without_validation_text_the_last_step_has_its_line(command: Command, tmp_path: Path) -> None:
    text, run = text_file(tmp_path), tmp_path / "run"
    assert command("train", text, "-o", run, *SMALL, "--minutes", "0.06", "--val-fraction", "0") == 0
    lines = [line for line in command.err.splitlines() if line.startswith("step ")]
    steps = read_timetable(run).end
    assert lines[-1].startswith(f"step {steps:,}  train loss ")
    assert 1 <= len(lines) <= 6


def test_of_a_long_validation_text_both_models_score_the_same_part(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "chars_within", lambda *_, **__: (64, 0.1))
    text, run = text_file(tmp_path), tmp_path / "run"
    assert command("train", text, "-o", run, *SMALL, "--minutes", "0.06") == 0
    val = len(TEXT) - int(0.9 * len(TEXT))
    part = f" on 64 of {val - 1} characters"
    assert re.search(rf"^n-gram  baseline of order 7, .* bits/char\){part}$", command.err, re.M)
    assert re.search(
        rf"^eval    each scores about 64 of the {val} characters for validation, spread", command.err, re.M
    )
    assert re.search(rf"^step .* bits/char.*{part}", command.err, re.M)
    assert re.search(rf"^loss    best .*{part}$", command.err, re.M)
    assert record_of(run)["training"]["eval_chars"] == 64
    assert record_of(run)["baseline"]["scored"] == 64
    assert command("info", run) == 0
    assert re.search(rf"^checkpoints: \d, losses{part}$", command.out, re.M)
    assert re.search(rf"^baseline: .*, val loss \d\.\d+{part}$", command.out, re.M)
    assert command("eval", run, text, "--json") == 0
    assert json.loads(command.out)["n_chars"] == len(TEXT) - 1  # exact, whatever the training looked at


def test_a_sorted_text_is_said_to_mislead(command: Command, tmp_path: Path) -> None:
    draw = random.Random(1)
    words = sorted("".join(draw.choices("abcdefghij", k=5)) + "\n" for _ in range(1_500))
    shuffled = draw.sample(words, len(words))
    for name, lines in (("sorted", words), ("shuffled", shuffled)):
        text = text_file(tmp_path, "".join(lines))
        assert command("train", text, "-o", tmp_path / name, *SMALL, "--max-steps", "2") == 0
        assert ("shuffle the lines first" in command.err) == (name == "sorted")


def test_few_steps_are_said_before_and_after(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict_module, "FEW_STEPS", 10**9)
    monkeypatch.setattr("charlm.cli.progress.FEW_STEPS", 10**9)
    monkeypatch.setattr("charlm.training.progress._PACE_SECONDS", 0.0)
    text, run = text_file(tmp_path), tmp_path / "run"
    assert command("train", text, "-o", run, *SMALL, "--minutes", "0.06", "--no-baseline") == 0
    assert re.search(r"^pace    about [\d,]+ steps in all$", command.err, re.M)
    assert re.search(
        r"^charlm: warning: only about [\d,]+ steps fit into 0\.06 min, too few", command.err, re.M
    )
    assert re.search(r"^note    [\d,]+ steps are too few to learn much from", command.err, re.M)


def test_a_short_text_ends_early_and_says_so(command: Command, tmp_path: Path) -> None:
    text, run = text_file(tmp_path), tmp_path / "run"
    assert command("train", text, "-o", run, "--device", "cpu", "--minutes", "9") == 0
    assert re.search(r"^done    9 steps in .*, as many as so short a text is good for$", command.err, re.M)


def test_counting_takes_as_much_text_as_fits_into_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    fitted: list[int] = []

    class Slow(NGramLM):
        def fit(self, data: BlockDataset) -> Any:
            nonlocal now
            now += len(data.ids) / 1_000
            fitted.append(len(data.ids))
            return self

    monkeypatch.setattr(baseline, "NGramLM", Slow)
    monkeypatch.setattr(baseline, "_TRIAL", 1_000)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    data = BlockDataset(torch.arange(50_000) % 7, 1)
    assert (
        count_within(data, 7, 31.0).chars == fitted[-1] == 20_000
    )  # 1 s for the trial, 1.5 for each thousand
    assert count_within(data, 7, 1_000.0).chars == 50_000
    assert count_within(data, 7, None).chars == 50_000
    fitted.clear()
    assert count_within(data, 7, 1.5).chars == 1_000
    assert fitted == [1_000]
    short = BlockDataset(torch.arange(900) % 7, 1)
    assert count_within(short, 7, 0.1).chars == 900


def test_the_entropy_of_single_characters() -> None:
    assert entropy_nats(BlockDataset(torch.tensor([0, 1] * 50), 1)) == pytest.approx(0.6931472)
    assert entropy_nats(BlockDataset(torch.tensor([3] * 50), 1)) == pytest.approx(0.0)


def test_the_time_before_the_first_step_is_part_of_the_minutes(command: Command, tmp_path: Path) -> None:
    assert TrainerConfig(minutes=1).minutes == 1.0
    text = text_file(tmp_path)
    assert command("train", text, "-o", tmp_path / "run", *SMALL, "--minutes", "0.0001") == 1
    assert "--minutes 0.0001 is over before the training can begin" in command.err
