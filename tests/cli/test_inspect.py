"""`charlm inspect`: what is written about a text, and what a training on it may come to."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness.command import Command, text_file

from charlm import BlockDataset, CharTokenizer, NGramLM
from charlm.cli import guess as guess_module
from charlm.cli.guess import Guess, guess
from charlm.evaluation import evaluate
from charlm.testing import tiny_corpus
from charlm.training import recommend

CORPUS = tiny_corpus(6_000)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put a guess in place of the measurement; what is in the dictionary replaces its fields."""
    changes: dict[str, Any] = {}
    made = Guess(
        preset="cpu-1min",
        reasons=("for 1 min on a CPU",),
        device="cpu",
        step_seconds=0.05,
        evaluation_seconds=1.0,
        steps=1_088,
        seconds=59.4,
        text_is_short=False,
        is_limited=False,
        ngram_loss_nats=1.5,
        ngram_order=7,
        ngram_counted=5_400,
        ngram_scored=600,
        ahead_nats=(-0.01, 0.05),
        usual_steps=1_200,
        unlike=False,
        enough_minutes=1.0,
    )
    monkeypatch.setattr(guess_module, "guess", lambda *_, **__: dataclasses.replace(made, **changes))
    return changes


def lines(command: Command) -> dict[str, str]:
    """Return what stands behind each label, further lines joined."""
    found: dict[str, str] = {}
    label = ""
    for line in command.out.splitlines():
        label = line[:12].strip() or label
        found[label] = f"{found[label]} {line[12:]}" if label in found else line[12:]
    return found


# The text


def test_a_clean_text_is_described(command: Command, tmp_path: Path, quick: dict[str, Any]) -> None:
    file = text_file(tmp_path, CORPUS)
    assert command("inspect", file) == 0
    found = lines(command)
    assert list(found) == [
        *("text", "characters", "line ends", "vocabulary", "rare", "invisible", "entropy", "split", "shared"),
        *("n-gram", "preset", "time", "loss", "command"),
    ]
    ends = CORPUS.count("\n")
    count = ends + (not CORPUS.endswith("\n"))
    assert found["text"] == str(file)
    assert found["characters"] == f"6,000 in {count:,} lines; 6,000 bytes of UTF-8"
    assert found["line ends"] == rf"{ends:,} \n"
    assert found["vocabulary"].startswith(f"{len(set(CORPUS))} characters: ")
    assert found["invisible"] == "none"
    assert found["split"] == "5,400 characters to train on, 600 for validation"
    assert re.match(
        r"\d\.\d\d, \d\.\d\d, \d\.\d\d bits per character where the last 0, 1, 2", found["entropy"]
    )
    assert not command.err


def test_a_messy_text_has_its_faults_named(command: Command, tmp_path: Path, quick: dict[str, Any]) -> None:
    copied = "this line\x07 stands in both parts of the text, word for word, to its end\n"
    text = "\ufeffone\r\ntwo\rthree\x00\x1b[2J\u202eאב\n" + copied + CORPUS[:600] + copied + "😀"
    assert command("inspect", text_file(tmp_path, text)) == 0
    found = lines(command)
    assert "byte order mark" in found["note"]
    assert found["line ends"].endswith(r"1 \r\n, 1 \r alone; mixed")
    for shown in (r"'\x00' U+0000 (1)", r"'\x1b' U+001B (1)", r"'\u202e' U+202E (1)", r"'\ufeff' U+FEFF (1)"):
        assert shown in found["invisible"]
    assert re.search(r"more$", found["rare"])
    assert "'😀' U+1F600 (1)" in found["split"]
    at = 1 + text.rindex(copied, 0, len(text))
    wanted = f"the longest: {len(copied)} characters at line 3 and at line {text[:at].count(chr(10)) + 1},"
    assert wanted in found["shared"]
    assert repr(copied[:50])[1:-1] in found["shared"]
    share = 100 * len(copied) / (len(text) - int(0.9 * len(text)))
    assert found["shared"].startswith(f"{share:.1f} % of the validation text lies in runs of 50 or more")
    assert not any(ord(c) < 32 and c != "\n" for c in command.out)
    assert "\u202e" not in command.out


@pytest.mark.parametrize("text", ["", "a", "\n", "ab", "漢字", "a" * 10])
def test_a_text_too_short_for_a_split_is_described_all_the_same(
    command: Command, tmp_path: Path, text: str
) -> None:
    assert command("inspect", text_file(tmp_path, text)) == 0
    found = lines(command)
    assert found["characters"].startswith(
        f"{len(text)} in {1 if text else 0} lines; {len(text.encode())} bytes"
    )
    assert found["training"].startswith(f"too short a text: {int(0.9 * len(text))} characters to train on")
    assert "command" not in found
    assert command("inspect", text_file(tmp_path, text), "--json") == 0
    values = json.loads(command.out)
    assert (values["ngram"], values["training"], values["command"]) == (None, None, None)


@pytest.mark.parametrize(
    "text", ["a" * 3_000, "😀漢字אב" * 600, "\x00" * 600 + "\r" * 600], ids=["one", "many", "nul"]
)
def test_strange_texts_are_measured_and_guessed_at(command: Command, tmp_path: Path, text: str) -> None:
    assert command("inspect", text_file(tmp_path, text), "--json") == 0
    values = json.loads(command.out)
    assert values["n_chars"] == len(text)
    assert values["vocab_size"] == len(set(text))
    assert values["shared_chars"] in (0, values["val_chars"])
    assert values["ngram"]["loss_nats"] >= 0
    assert all(bound >= 0 for bound in values["training"]["loss_nats"] or [])


def test_texts_come_from_standard_input_gzip_and_several_files(
    command: Command, tmp_path: Path, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, packed = text_file(tmp_path, CORPUS), tmp_path / "more.txt.gz"
    packed.write_bytes(gzip.compress(b"more of it\n" * 9))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("né".encode()), encoding="utf-8"))
    assert command("inspect", packed, file, "-", file) == 0
    found = lines(command)
    assert found["text"] == f"{packed}, {file}, standard input and 1 more"
    assert found["characters"].startswith(f"{2 * 6_000 + 99 + 2:,} in ")
    assert found["command"] == f"charlm train {packed} {file} - {file} -o runs/more --minutes 1"


def test_bytes_that_are_no_text_are_an_error_with_their_place(command: Command, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good\nb\xffd")
    assert command("inspect", tmp_path / "bad.txt") == 1
    assert "must be valid utf-8, got byte 0xff at offset 6 (line 2)" in command.err
    assert command("inspect", tmp_path / "none.txt") == 1
    assert "is neither a file nor a named corpus" in command.err
    assert not command.out


def test_json_has_every_figure_and_bounded_lists(
    command: Command, tmp_path: Path, quick: dict[str, Any]
) -> None:
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    text = ("x" * 1_000 + "\n") * 10 + rare + "\x00"
    assert command("inspect", text_file(tmp_path, text), "--json") == 0
    values = json.loads(command.out)
    assert (values["n_chars"], values["n_lines"], values["vocab_size"]) == (len(text), 11, 303)
    assert values["line_ends"] == {"lf": 10, "crlf": 0, "cr": 0}
    assert (values["n_rare"], len(values["rare"])) == (301, 100)
    assert (values["n_invisible"], values["invisible"]) == (1, {"\x00": 1})
    assert (values["n_only_in_val"], len(values["only_in_val"])) == (301, 100)
    assert len(values["entropy_bits"]) == 3
    assert values["longest_shared_chars"] == len(values["longest_shared"]) == 731
    assert values["longest_shared_lines"] == {"val": 10, "train": 1}
    assert values["training"]["loss_nats"] == pytest.approx([1.45, 1.51])
    assert values["ngram"] == {"order": 7, "loss_nats": 1.5, "counted_chars": 5_400, "scored_chars": 600}
    assert len(command.out) < 5_000


def test_json_cuts_a_long_shared_run(command: Command, tmp_path: Path, quick: dict[str, Any]) -> None:
    assert command("inspect", text_file(tmp_path, CORPUS * 2), "--val-fraction", "0.5", "--json") == 0
    values = json.loads(command.out)
    assert values["longest_shared_chars"] == 6_000
    assert values["longest_shared"] == CORPUS[:1_000]


# The training


def test_the_ngram_loss_is_the_one_that_training_shows(tmp_path: Path) -> None:
    made = guess(CORPUS, val_fraction=0.2, minutes=1, began=0.0)
    tokenizer = CharTokenizer.from_text(CORPUS)
    advice = recommend(4_800, 1_200, minutes=1)
    block_size = 64  # of cpu-10s
    train, val = BlockDataset.from_text(CORPUS, tokenizer, block_size).split(0.8)
    wanted = evaluate(NGramLM(tokenizer.vocab_size).fit(train), val).loss_nats
    assert made.ngram_loss_nats == wanted
    assert (made.ngram_order, made.ngram_counted, made.ngram_scored) == (7, 4_800, 1_200)
    assert (made.preset, made.reasons) == (advice.preset, advice.reasons)


@pytest.mark.slow
def test_a_short_text_gets_the_steps_that_training_would_make(command: Command, tmp_path: Path) -> None:
    file = text_file(tmp_path, CORPUS)
    assert command("inspect", file, "--minutes", "60") == 0
    found = lines(command)
    assert "enough for so short a text" in found["time"]
    steps = recommend(5_400, 600, minutes=60).most_chars // (16 * 64)
    assert re.search(rf"about {steps} steps", found["time"])
    (tmp_path / "here").mkdir()
    command_line, _, remark = found["command"].partition(" (")
    assert remark == "its result will be the n-gram model, or a mixture of which that is the larger part)"
    words = shlex.split(command_line.replace("runs/text", str(tmp_path / "here")))
    assert words[:3] == ["charlm", "train", str(file)]
    assert command(*words[1:], "--device", "cpu") == 0
    assert re.search(
        rf"^done    {steps} steps in .*, as many as so short a text is good for$", command.err, re.M
    )
    assert f"recipe  {found['preset'].partition(',')[0]}," in command.err


def test_a_time_too_short_for_a_step_still_means_one(tmp_path: Path) -> None:
    made = guess(CORPUS, val_fraction=0.1, minutes=1e-6, began=time.perf_counter())
    assert (made.steps, made.text_is_short) == (1, False)
    assert made.seconds > 60e-6
    assert made.evaluation_seconds > 0
    assert made.enough_minutes is not None
    assert made.enough_minutes > 1e-6


def test_without_validation_nothing_is_guessed(command: Command, tmp_path: Path) -> None:
    assert command("inspect", text_file(tmp_path, CORPUS), "--val-fraction", "0") == 0
    found = lines(command)
    assert found["split"] == "6,000 characters to train on, 0 for validation"
    assert found["loss"] == "no guess: nothing is kept for validation"
    assert not found.keys() & {"shared", "n-gram"}
    assert found["command"].endswith("--minutes 1 --val-fraction 0")


def test_the_guess_is_none_where_nothing_alike_was_measured() -> None:
    made = guess("ab" * 50, val_fraction=0.1, minutes=1, began=0.0)
    assert (made.ahead_nats, made.loss_nats, made.usual_steps) == (None, None, None)


def test_the_guess_is_the_range_of_the_measured_runs_of_about_this_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = [
        guess_module._Measured("cpu-10s", 1_600, 300, -0.3),
        guess_module._Measured("cpu-10s", 18_000, 200, 0.1),
        guess_module._Measured("cpu-10s", 19_000, 100, 9.0),
        guess_module._Measured("cpu-10s", 1_500, 100, 9.0),
        guess_module._Measured("cpu-1min", 5_400, 100, 9.0),
    ]
    monkeypatch.setattr(guess_module, "_MEASURED", measured)
    made = guess(CORPUS, val_fraction=0.1, minutes=1, began=0.0)
    assert made.ahead_nats == pytest.approx((-0.32, 0.12))
    assert made.usual_steps == 200
    assert made.ngram_loss_nats is not None
    assert made.loss_nats == pytest.approx((made.ngram_loss_nats - 0.12, made.ngram_loss_nats + 0.32))


@pytest.mark.parametrize(
    ("changes", "label", "said"),
    [
        ({}, "time", "1 min, which is about 1,100 steps (timed just now, on cpu)"),
        ({"steps": 1}, "time", "1 min is too short for more than a step (timed"),
        ({"steps": 1, "text_is_short": True}, "time", "(timed just now, on cpu): about 1 step, enough"),
        (
            {"text_is_short": True, "seconds": 7.4},
            "time",
            "a few seconds (timed just now, on cpu): about 1,100",
        ),
        ({"text_is_short": True, "seconds": 21.0}, "time", "about 20 s (timed"),
        ({"text_is_short": True, "seconds": 59.0}, "time", "about 0.98 min (timed"),
        ({"text_is_short": True, "seconds": 750.0}, "time", "about 12 min (timed"),
        ({"evaluation_seconds": 2.0}, "time", "2 min, "),
        ({}, "loss", "1.45 to 1.51 nats, a guess: cpu-1min ended 0.01 above to 0.05 below its n-gram model"),
        ({}, "loss", "so it may or may not beat the n-gram model"),
        (
            {"ahead_nats": (0.03, 0.05)},
            "loss",
            "1.45 to 1.47 nats, a guess: cpu-1min ended 0.03 to 0.05 below",
        ),
        ({"ahead_nats": (0.03, 0.05)}, "loss", "so it should beat the n-gram model, if by little"),
        (
            {"ahead_nats": (-0.3, -0.1)},
            "loss",
            "1.60 to 1.80 nats, a guess: cpu-1min ended 0.10 to 0.30 above",
        ),
        (
            {"ahead_nats": (-0.3, -0.1)},
            "loss",
            "the n-gram model should stay better: give the training more minutes",
        ),
        (
            {"ahead_nats": (-0.3, -0.1), "text_is_short": True},
            "loss",
            "the text is too short for a GPT to beat it",
        ),
        ({"steps": 800}, "loss", "there it made 1,200 steps or more: expect a worse loss than that"),
        (
            {"ahead_nats": None, "usual_steps": None},
            "loss",
            "no guess: cpu-1min was not measured on texts of about",
        ),
        ({}, "loss", "and so short a validation text says little"),
        (
            {},
            "n-gram",
            "1.500 nats = 2.164 bits per character on the validation text: measured, with order 7",
        ),
        ({"ngram_counted": 4_000}, "n-gram", "7 (counted in the last 4,000 characters of training)"),
        ({"ngram_scored": 500}, "n-gram", "7 (scored on 500 characters, spread over the validation text)"),
        ({"unlike": True}, "n-gram", "7 that is hardly better than to know how often each character occurs"),
        ({}, "command", "--minutes 1"),
        ({"unlike": True}, "command", "none for this text as it is: shuffle its lines first (shuf FILE"),
        ({"enough_minutes": 5.0}, "command", "--minutes 5 --preset cpu-1min (1 min would be too few steps)"),
        ({"enough_minutes": None}, "command", "none: an hour is too short for this model here"),
        (
            {"ahead_nats": (-0.3, -0.1), "text_is_short": True},
            "command",
            "(its result will be the n-gram model, or a mixture of which that is the larger part)",
        ),
    ],
)
def test_what_is_said_of_a_training(
    command: Command, tmp_path: Path, quick: dict[str, Any], changes: dict[str, Any], label: str, said: str
) -> None:
    quick.update(changes)
    minutes = "2" if said.startswith("2 min") else "1"
    assert command("inspect", text_file(tmp_path, CORPUS), "--minutes", minutes) == 0
    assert said in lines(command)[label]


def test_shares_are_not_rounded_to_nothing(
    command: Command, tmp_path: Path, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = "".join(map(chr, range(0x20000, 0x3D480)))  # characters of which none comes twice
    text = "=" * 50 + once[:19_960] + "=" * 50 + once[19_960:]
    last = f"{len(text[20_000:]) / len(text):.6f}"
    assert command("inspect", text_file(tmp_path, text), "--val-fraction", last) == 0
    assert lines(command)["shared"].startswith("under 0.05 % of the validation text")
    monkeypatch.setattr("charlm.text.inspection._MOST_COMPARED", 5_000)
    monkeypatch.setattr("charlm.text.inspection._MOST_IN_ENTROPY", 5_000)
    assert command("inspect", text_file(tmp_path, text), "--val-fraction", last) == 0
    found = lines(command)
    assert found["shared"].startswith("1.0 % of the first 5,000 characters of validation lies in")
    assert "(by the counts of its first 5,000 characters, so optimistic" in found["entropy"]


def test_the_name_of_the_run_is_that_of_the_first_file(
    command: Command, tmp_path: Path, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, name in (("my text.txt", "'runs/my text'"), (".hidden", "runs/mine"), ("a.b.gz.txt", "runs/a")):
        (tmp_path / file).write_text(CORPUS, encoding="utf-8")
        assert command("inspect", file) == 0
        assert f" -o {name} --minutes 1" in lines(command)["command"]


def test_no_training_is_recommended_for_a_text_that_is_unlike_its_beginning(
    command: Command, tmp_path: Path, quick: dict[str, Any]
) -> None:
    quick["unlike"] = True
    assert command("inspect", text_file(tmp_path, CORPUS), "--json") == 0
    assert json.loads(command.out)["command"] is None


def test_a_given_number_of_steps_is_named_as_what_limits_them(
    command: Command, quick: dict[str, Any], tmp_path: Path
) -> None:
    quick.update(steps=20, seconds=2.0, is_limited=True)
    assert command("inspect", text_file(tmp_path, CORPUS)) == 0
    assert "time        a few seconds (timed just now, on cpu): 20 steps, as max_steps is set" in command.out


def test_it_and_train_take_a_setting_that_fits_the_preset_that_is_chosen(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_file(tmp_path, CORPUS)
    monkeypatch.setenv("CHARLM_N_HEAD", "3")  # divides the width of cpu-10s, and not that of cpu-1min
    assert command("inspect", text, "--minutes", "0.2") == 0
    assert "preset      cpu-10s" in command.out
    assert command("train", text, "-o", tmp_path / "run", "--max-steps", "1") == 0
    assert "3 heads" in command.out + command.err
