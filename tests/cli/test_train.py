"""`charlm train`, in this process: what it writes, says, refuses and goes on with."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.command import TEXT, Command, text_file

import charlm
from charlm.backends.world import World
from charlm.cli import train
from charlm.cli.progress import Progress
from charlm.cli.rundir import read_record, write_record
from charlm.errors import CharLMError
from charlm.runs.checkpoint import list_checkpoints
from charlm.runs.directory import RunDirectory
from charlm.text.tokenizer import ByteTokenizer
from charlm.training import StepRecord, StepsEstimate, read_history, read_timetable
from charlm.training.progress import clock, speed

NOTED = ("byte order mark", "line ends", "different characters", "stands in the training text")


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


def weights(run: Path) -> list[bytes]:
    return [t.numpy().tobytes() for t in charlm.load(run, device="cpu").model.state_dict().values()]


def test_training_says_what_it_does_on_standard_error_only(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run) == 0
    assert not command.out
    lines = command.err.splitlines()
    assert lines[0].startswith(f"text    {text}: {len(TEXT):,} characters, vocabulary ")
    assert lines[1].startswith("recipe  cpu-10s, as the text is short (2,")
    assert "parameters" in lines[2]
    assert lines[3].startswith("device  cpu with ")
    assert lines[3].endswith(", fp32")
    assert lines[4].startswith("n-gram  baseline of order 7, counted in 0.")
    assert lines[5] == "steps   20; each 2 blocks of 16 characters"
    assert [line.split("  ")[0] for line in lines[6:8]] == ["step 10", "step 20"]
    assert all("train loss" in line and "bits/char" in line and "chars/s" in line for line in lines[6:8])
    assert lines[8].startswith("done    20 steps in 0:0")
    assert lines[9].startswith("loss    best ")
    assert lines[10].startswith("n-gram  baseline ")
    assert lines[11].startswith("note    20 steps are too few to learn much from: the GPT is worth little")
    assert lines[12:] == [f"run     {run}", f"next    charlm generate {run}"]
    assert charlm.load(run).evaluate(TEXT).loss_nats < 4


def test_the_same_command_gives_the_same_weights(command: Command, text: Path, tmp_path: Path) -> None:
    assert command.train(text, "-o", tmp_path / "a") == 0
    assert command.train(text, "-o", tmp_path / "b", "-q") == 0
    assert not command.err
    losses = [charlm.load(tmp_path / name).evaluate(TEXT) for name in "ab"]
    assert losses[0] == losses[1]
    assert command.train(text, "-o", tmp_path / "c", "--seed", "7") == 0
    assert charlm.load(tmp_path / "c").evaluate(TEXT) != losses[0]


def test_verbose_shows_logged_steps_and_samples_are_shown(command: Command, text: Path, run: Path) -> None:
    sampling = ("--sample-interval", "20", "--sample-chars", "30")
    assert command.train(text, "-o", run, "-v", *sampling) == 0
    assert [f"step {i}  train loss" in command.err for i in (5, 10, 15, 20, 7)] == [True] * 4 + [False]
    assert "gradient norm" in command.err
    assert "sample at step 20:\n  | " in command.err
    assert not command.out


def test_without_validation_the_training_loss_is_shown(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run, "--val-fraction", "0") == 0
    assert "none for validation" in command.err
    assert "step 10  train loss" in command.err
    assert "val loss" not in command.err
    assert "loss    best" not in command.err


def test_every_evaluation_has_a_training_loss_beside_it(command: Command, text: Path, run: Path) -> None:
    """Also one at a step whose record is not logged."""
    assert command.train(text, "-o", run, "--eval-interval", "3", "--log-interval", "20") == 0
    lines = [line for line in command.err.splitlines() if line.startswith("step ")]
    assert len(lines) == 7
    assert all("train loss" in line for line in lines)


def test_standard_input_and_bytes(command: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO("größer\n".encode() * 99), encoding="utf-8")
    )
    assert command.train("-", "-o", run, "--tokenizer", "byte") == 0
    assert "text    standard input: 693 characters, vocabulary 256; " in command.err
    assert isinstance(charlm.load(run).tokenizer, ByteTokenizer)
    assert record_of(run)["sources"] == ["-"]
    assert command("train", "--resume", "-o", run) == 2
    assert "came from standard input; give it again: charlm train FILE --resume -o" in command.err


def test_a_text_that_has_moved_is_asked_for_with_the_command_that_goes_on(
    command: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    lost = text.rename("lost.txt").absolute()
    kept = text_file(tmp_path)
    assert command.train("lost.txt", kept, "-o", "run", "--max-steps", "2") == 0
    moved = Path("..", "new place").absolute().resolve()
    monkeypatch.chdir(tmp_path)
    Path("old").rename(moved)
    for option, value in (("--resume", None), ("--repeat", "new place/run")):
        words = [option] if value is None else [option, value]
        out = "new place/run" if value is None else "again"
        assert command("train", *words, "-o", out) == 2
        (message, _) = command.err.splitlines()
        told, _, advice = message.partition("; give it again: charlm ")
        assert told == f"charlm: error: the run's text came from '{lost}', which is not there now"
        known = [str(moved / "lost.txt") if word == "FILE" else word for word in shlex.split(advice)]
        assert command(*known) == 0


def test_what_is_advised_for_a_lost_text_has_all_that_was_given(
    command: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.train(text, "-o", "./-r3") == 0
    again = text.rename("-moved.txt")
    given = ("--device", "cpu", "--encoding", "ascii")
    for out, words in (
        ("-again", ["--repeat", "./-r3", "--overwrite", "--no-baseline", *given]),
        ("-r3", ["--resume", "--max-steps", "22", *given]),
    ):
        assert command("train", "-o", f"./{out}", *words) == 2
        advice = shlex.split(command.err.splitlines()[0].partition("give it again: charlm ")[2])
        assert set(words) <= {part for word in advice for part in (word, *word.split("="))}
        assert command(*[f"./{again}" if word == "FILE" else word for word in advice]) == 0
        record = record_of(Path(out))
        assert record["encoding"] == "ascii"
        assert (record["baseline"] is None) == ("--no-baseline" in words)
        assert record["training"]["max_steps"] == (22 if out == "-r3" else 20)


def test_a_run_of_thousands_of_files_is_read_again(command: Command, tmp_path: Path, run: Path) -> None:
    folder = tmp_path / ("a long name" * 20)
    folder.mkdir()
    files = [folder / f"{number}.txt" for number in range(2_200)]
    for number, file in enumerate(files):
        file.write_text(f"{number} green bottles\n", encoding="utf-8")
    assert command.train(*files, "-o", run) == 0
    for steps in range(21, 44):
        commands = record_of(run)["commands"]
        assert len(commands) == min(steps - 20, 20)
        if steps < 23:
            assert command("train", *files, "--resume", "-o", run, "--max-steps", str(steps)) == 0
        else:  # a longer list, without the trainings
            write_record(run, {**read_record(run).values, "commands": [*commands, "x" * 3_000]})
    assert all(len(line) == 2_001 for line in record_of(run)["commands"])
    assert command("train", "--repeat", run, "-o", tmp_path / "again") == 1  # its end was moved
    assert command("info", run) == 0
    assert len(read_history(run).steps)


@pytest.mark.parametrize("names", [["a/" * 2_000] * 3_000, ["x"] * 50_000])
def test_more_files_than_a_record_holds_are_refused_beforehand(
    command: Command, run: Path, names: list[str]
) -> None:
    assert command.train(*names, "-o", run) == 2
    assert "a run cannot keep so many names; join the files" in command.err
    assert not run.exists()


def test_a_text_without_validation_is_not_advised_to_have_none(command: Command, tmp_path: Path) -> None:
    text, run = text_file(tmp_path, "a text of twenty-six signs"), tmp_path / "run"
    for share, advised in (("0.1", True), ("0", False)):
        assert command.train(text, "-o", run, "--val-fraction", share, "--block-size", "30") == 1
        assert ("--val-fraction 0 to train on all" in command.err) == advised
        assert "--block-size N" in command.err
    for short, number in (("a", "1 character"), ("a few words", "11 characters")):
        assert command.train(text_file(tmp_path, short), "-o", run, "--block-size", "30") == 1
        assert f"the text has only {number}, too few to learn from" in command.err
        assert "--block-size" not in command.err


def test_a_text_of_another_encoding_is_read_by_every_command_and_again(
    command: Command, tmp_path: Path, run: Path
) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes(TEXT.replace("wall", "Mäuerchen").encode("latin-1"))
    assert command.train(text, "-o", run) == 1
    assert "such as latin-1: encoding=... in Python, --encoding of the command" in command.err
    given = ("--encoding", "latin-1")
    assert command.train(text, "-o", run, *given) == 0
    assert record_of(run)["encoding"] == "latin-1"
    assert "ä" in charlm.load(run).tokenizer.vocab  # type: ignore[attr-defined]  # a CharTokenizer
    assert command("train", "--repeat", run, "-o", tmp_path / "again") == 0
    assert command("train", "--resume", "-o", tmp_path / "again", "--max-steps", "22") == 0
    reading: list[list[str | Path]] = [
        ["eval", run, text],
        ["generate", run, "-n", "1", "--prompt-file", text],
    ]
    for words in reading:
        assert command(*words) == 1
        assert command(*words, *given) == 0
    assert command("inspect", text, *given, "--json") == 0
    assert json.loads(command.out)["command"].endswith("--encoding latin-1")
    text.write_bytes(text.read_bytes().decode("latin-1").encode())  # since then it was converted
    assert command("train", "--resume", "-o", run, "--max-steps", "22", "--encoding", "utf-8") == 0
    assert record_of(run)["encoding"] == "utf-8"
    assert command("eval", run, text, "--encoding", "klingon") == 1
    assert "encoding must be a text encoding of Python, got 'klingon'" in command.err
    values = record_of(run)
    del values["encoding"]  # as an earlier charlm wrote it
    (run / "train.json").write_text(json.dumps(values))
    assert command("train", "--resume", "-o", run, "--max-steps", "24") == 0


def test_bytes_are_called_bytes(command: Command, tmp_path: Path, run: Path) -> None:
    """By all that is said of a training on them, also before it and after it."""
    text = text_file(tmp_path, TEXT.replace("wall", "Mäuerchen") + TEXT)
    words = ("--tokenizer", "byte", "--eval-chars", "50", "-v")
    said = []
    assert command.train(text, "-o", run, *words) == 0
    said += command.err.splitlines()
    assert command("train", "--resume", "-o", run, "--max-steps", "30") == 0
    said += command.err.splitlines()
    assert command("info", run) == 0
    said += [line for line in command.out.splitlines() if "_" not in line]  # a setting's name is what it is
    assert command("eval", run, text) == 0
    said += command.out.splitlines()
    assert command.train(text, "-o", tmp_path / "new", *words, "--block-size", "5000") == 1
    said += command.err.splitlines()
    (text := tmp_path / "one").write_text("x")
    assert command("eval", run, text) == 1
    said += command.err.splitlines()
    counted = [line for line in said if "char" in line.replace(str(tmp_path), "").replace("charlm", "")]
    assert [line.partition(";")[0].split(": ")[1] for line in counted] == [
        f"{2 * len(TEXT) + 60 * 5:,} characters, vocabulary 256"  # of the text itself
    ] * 2
    assert sum("bytes/s" in line for line in said) >= 3
    for told in (
        "bits/byte",
        "bytes to train on",
        "16 bytes",
        "FLOPs per byte",
        "two bytes",
        "the byte after",
    ):
        assert any(told in line for line in said), told


def test_what_is_odd_in_a_text_is_told_by_train_as_by_inspect(
    command: Command, tmp_path: Path, run: Path
) -> None:
    many = "".join(chr(0x4E00 + i) for i in range(500))
    lines = [f"{i} {many[i % 400 : i % 400 + 60]}\n" for i in range(100)]
    text = tmp_path / "odd.txt"
    text.write_bytes(("\ufeff" + "".join(lines[:50]) + many + "\r\n" + "".join(lines[:20])).encode())
    assert command("inspect", text) == 0
    notes = [line.split(None, 1)[1] for line in command.out.splitlines() if line.startswith("note")]
    assert [next(word for word in NOTED if word in note) for note in notes] == list(NOTED)
    assert command("inspect", text, "--json") == 0
    assert json.loads(command.out)["notes"] == notes
    assert command.train(text, "-o", run) == 0
    assert [line[8:] for line in command.err.splitlines() if line.startswith("note")][:-1] == notes
    bytes_run = run.with_name("bytes")
    assert command.train(text, "-o", bytes_run, "--tokenizer", "byte") == 0
    assert [line[8:] for line in command.err.splitlines() if line.startswith("note")][:-1] == [
        note for note in notes if "different characters" not in note
    ]


def test_a_text_too_short_for_the_block_says_what_to_do(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run, "--block-size", "1000") == 1
    assert "smaller block_size" in command.err
    assert not run.exists()


@pytest.mark.slow
def test_a_budget_in_minutes_becomes_steps(command: Command, text: Path, run: Path) -> None:
    flags = ("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16")
    budget = ("--preset", "cpu-10s", "--batch-size", "2", "--device", "cpu", "--minutes", "0.04")
    assert command("train", text, "-o", run, *flags, *budget) == 0
    assert "steps   as many as fit into 0.04 min; each 2 blocks of 16 characters\n" in command.err
    record, timetable = record_of(run), read_timetable(run)
    assert (record["training"]["minutes"], record["training"]["eval_interval"]) == (0.04, None)
    assert f"done    {timetable.end:,} steps in 0:0" in command.err
    assert list_checkpoints(run)[-1].step == timetable.end == timetable.evaluations[-1]
    assert command.err.count("val loss") == len(timetable.evaluations) <= 5


def test_a_budget_counts_the_evaluations_that_were_asked_for(command: Command, text: Path, run: Path) -> None:
    flags = ("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--device", "cpu")
    assert command("train", text, "-o", run, *flags, "--minutes", "0.06", "--eval-interval", "50") == 0
    assert record_of(run)["training"]["eval_interval"] == 50
    *scheduled, last = read_timetable(run).evaluations
    assert all(step % 50 == 0 for step in scheduled)  # some may be left out
    assert f"done    {last:,} step" in command.err


@pytest.mark.slow
def test_of_a_budget_and_a_number_of_steps_the_first_to_come_ends_the_run(
    command: Command, text: Path, run: Path
) -> None:
    assert command.train(text, "-o", run, "--minutes", "5") == 0
    assert "steps   as many as fit into 5 min, at most 20; each 2 blocks of 16 characters\n" in command.err
    assert "done    20 steps in 0:" in command.err
    record = record_of(run)
    assert (record["training"]["minutes"], record["training"]["max_steps"]) == (5.0, 20)
    assert command.train(text, "-o", run, "--overwrite", "--minutes", "0.1", "--max-steps", "10000000") == 0
    assert "steps   as many as fit into 0.1 min, at most 10,000,000; each 2 blocks" in command.err
    end = read_timetable(run).end
    assert end is not None
    assert end < 10_000_000
    assert f"done    {end:,} steps in 0:0" in command.err


def test_a_schedule_that_needs_its_end_beforehand_gets_an_estimate_of_it(
    command: Command, text: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from charlm.cli import fit

    monkeypatch.setattr(fit, "steps_within", lambda *_, **__: StepsEstimate(30, 25, 4_000, 0.1))
    flags = ("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--device", "cpu")
    budget = ("--preset", "cpu-10s", "--schedule", "cosine", "--minutes", "5")
    assert command("train", text, "-o", run, *flags, *budget) == 0
    assert (
        "note    cosine needs its end beforehand: it falls over 30 steps, an estimate (25 to 4,000), and"
        in (command.err)
    )
    assert record_of(run)["training"]["max_steps"] == 30
    assert "done    30 steps in 0:" in command.err


@pytest.mark.slow
def test_without_a_preset_time_and_text_decide_and_a_short_text_ends_early(
    command: Command, text: Path, run: Path
) -> None:
    assert command("train", text, "-o", run, "--device", "cpu", "--val-fraction", "0.02") == 0
    assert "steps   21, which is enough for so short a text; each 16 blocks of 32" in command.err
    record = record_of(run)
    assert (record["preset"], record["model"]["block_size"], record["training"]["max_steps"]) == (
        "cpu-10s",
        32,  # 46 characters are for validation
        5 * 2224 // (16 * 32),
    )
    assert command("train", text, "-o", run, "--overwrite", "--device", "cpu", "--max-steps", "60") == 0
    assert record_of(run)["training"]["max_steps"] == 60
    assert command("train", text, "-o", run, "--overwrite", "--device", "cpu", "--minutes", "9") == 0
    assert "steps   as many as fit into 9 min; each 16 blocks of 64" in command.err
    enough = 5 * 2043 // (16 * 64)
    assert f"done    {enough} steps in 0:" in command.err
    assert ", as many as so short a text is good for\n" in command.err
    assert record_of(run)["training"]["max_steps"] == enough
    preset = ("--preset", "cpu-1min", "--max-steps", "1", "--device", "cpu")
    assert command("train", text, "-o", run, "--overwrite", *preset) == 0
    assert "recipe  cpu-1min, as given" in command.err


def test_a_budget_that_is_over_at_once_is_refused(command: Command, text: Path, run: Path) -> None:
    assert command("train", text, "-o", run, "--minutes", "0.0001") == 1
    assert "--minutes 0.0001 is over before the training can begin" in command.err


def test_a_directory_in_use_is_refused_and_overwritten_only_on_request(
    command: Command, text: Path, run: Path
) -> None:
    assert command.train(text, "-o", run) == 0
    run_id = RunDirectory.open(run).run_id
    assert command.train(text, "-o", run) == 1
    assert "is not empty. Go on with the run there (--resume), delete it first (--overwrite)" in command.err
    assert RunDirectory.open(run).run_id == run_id
    (run / ".tmp-12-0123abcd").write_bytes(b"")
    assert command.train(text, "-o", run, "--overwrite", "--block-size", "8") == 0
    assert RunDirectory.open(run).run_id != run_id
    assert record_of(run)["model"]["block_size"] == 8
    assert len(list_checkpoints(run)) == 1
    assert {entry.name for entry in run.iterdir()} == {
        ".lock",
        "checkpoints",
        "metrics.jsonl",
        "ngram",
        "run.json",
        "train.json",
    }


def test_overwrite_deletes_nothing_that_is_not_a_run(command: Command, text: Path, run: Path) -> None:
    run.mkdir()
    (run / "thesis.txt").write_text("precious")
    assert command.train(text, "-o", run, "--overwrite") == 1
    assert "holds no run, so --overwrite deletes nothing" in command.err
    (run / "thesis.txt").rename(run.parent / "thesis.txt")
    assert command.train(text, "-o", run, "--overwrite") == 0
    (run.parent / "thesis.txt").rename(run / "thesis.txt")
    assert command.train(text, "-o", run, "--overwrite") == 1
    assert "that are no part of a run ('thesis.txt'), so --overwrite deletes nothing" in command.err
    assert (run / "thesis.txt").read_text() == "precious"
    assert charlm.load(run).tokenizer.vocab_size > 9


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_run_that_was_killed_before_it_began_needs_no_cleaning_up(
    command: Command, text: Path, run: Path, flags: tuple[str, ...]
) -> None:
    (run / "checkpoints").mkdir(parents=True)
    (run / ".lock").touch()
    (run / ".tmp-4711-0123abcd").write_bytes(b"half of run.json")
    assert command.train(text, "-o", run, *flags) == 0
    assert not list(run.glob(".tmp-*"))


def test_the_lock_of_a_deleted_run_is_still_the_lock(command: Command, text: Path, run: Path) -> None:
    """A process that opened the file before and locks it now would otherwise hold another file."""
    assert command.train(text, "-o", run) == 0
    before = (run / ".lock").stat().st_ino
    assert command.train(text, "-o", run, "--overwrite") == 0
    assert (run / ".lock").stat().st_ino == before


def test_a_mistake_beside_overwrite_costs_nothing(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run) == 0
    assert command.train(text, "-o", run, "--overwrite", "--block-size", "5000") == 1
    assert charlm.load(run).tokenizer.vocab_size > 9


def test_overwrite_leaves_a_run_that_another_process_trains(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run) == 0
    other = RunDirectory.open(run)
    other.lock()
    assert command.train(text, "-o", run, "--overwrite") == 1
    assert "another process or trainer is training in" in command.err
    other.unlock()
    assert charlm.load(run).tokenizer.vocab_size > 9


def test_what_cannot_be_deleted_is_said(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run) == 0
    (run / "train.json").unlink()
    (run / "train.json").mkdir()  # is deleted like any directory of that name
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(text)  # the link goes, not what it points to
    assert command.train(text, "-o", run, "--overwrite") == 0
    assert text.read_text(encoding="utf-8") == TEXT


def test_resume_goes_on_to_a_new_end(
    command: Command, text: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.train(text, "-o", run) == 0
    assert command("train", "--resume", "-o", run) == 0
    assert "steps   all 20 are done; --max-steps N with a larger N goes on" in command.err
    monkeypatch.setenv("CHARLM_SEED", "3")
    assert command("train", "--resume", "-o", run, "--max-steps", "30") == 0
    assert "warning: a resumed run keeps its settings; ignored: CHARLM_SEED" in command.err
    assert "steps   20 of 30 are done" in command.err
    assert "step 30  train loss" in command.err
    record = record_of(run)
    assert record["training"]["max_steps"] == 30
    assert len(record["commands"]) == 2
    moved = text.rename(text.with_name("moved.txt"))
    assert command("train", "--resume", "-o", run, "--max-steps", "40") == 2
    assert "text.txt', which is not there now" in command.err
    assert command("train", moved, "--resume", "-o", run, "--max-steps", "40") == 0
    assert record_of(run)["sources"] == [str(moved)]
    assert command("train", "python-docs", "--resume", "-o", run, "--max-steps", "50") == 1
    assert "is not the text that the run was trained with" in command.err


def test_resume_auto_begins_goes_on_and_has_nothing_to_do_at_the_end(
    command: Command, text: Path, tmp_path: Path
) -> None:
    run, given = tmp_path / "run", ["--resume", "auto", "--no-baseline", "--seed", "5", "--keep-last", "2"]
    assert command.train(text, "-o", run, *given) == 0
    assert "done    20 steps" in command.err
    shutil.rmtree(newest := max((run / "checkpoints").iterdir()))
    assert command.train(text, "-o", run, *given) == 0
    assert "10 of 20 are done" in command.err
    assert max((run / "checkpoints").iterdir()).name[:17] == newest.name[:17]
    assert command.train(text, "-o", run, *given) == 0
    assert "all 20 are done" in command.err
    assert command.train(text, "-o", run, *given, "--seed", "6", "--tokenizer", "byte") == 2
    assert "cannot be given: --seed 6 (it has 5), --tokenizer byte (it has char)" in command.err
    assert command.train("--resume", text, "-o", run, "--max-steps", "30") == 2  # a path behind it is FILE
    assert "cannot be given with --resume" in command.err
    assert command("train", "--resume=sometimes", "-o", run) == 2
    assert "argument --resume: must be auto or nothing, got 'sometimes'" in command.err


def test_resume_needs_a_run_of_this_command(command: Command, text: Path, run: Path) -> None:
    assert command("train", "--resume", "-o", run) == 1
    assert "to go on with: begin a training, without --resume" in command.err
    RunDirectory.create(run)
    assert command("train", "--resume", "-o", run) == 1
    assert "to go on with: begin a training, without --resume" in command.err
    (run / "checkpoints" / "step-000000000001-0123abcd").mkdir()
    assert command("train", "--resume", "-o", run) == 1
    assert "has no train.json: `charlm train` did not begin it" in command.err


@pytest.mark.parametrize("flags", [("--resume",), (), ("--overwrite",)])
def test_a_run_that_trains_now_is_refused_before_anything_is_prepared(
    command: Command, text: Path, run: Path, flags: tuple[str, ...]
) -> None:
    ended_early(command, text, run)
    other = RunDirectory.open(run)
    other.lock()
    before = sorted(run.iterdir())
    assert command("train", text, *flags, "-o", run) == 1
    assert command.err == f"charlm: error: another process or trainer is training in '{run}'\n"
    assert sorted(run.iterdir()) == before
    other.unlock()


def ended_early(command: Command, text: Path, run: Path) -> dict[str, Any]:
    """Let a training end with an error in its third step, before its first checkpoint; return its record."""

    def fail(self: Progress, trainer: charlm.Trainer, record: StepRecord) -> None:
        if record.step == 3:
            raise CharLMError("on purpose")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "on_step_end", fail)
        assert command.train(text, "-o", run) == 1
    assert "on purpose" in command.err
    return record_of(run)


@pytest.mark.parametrize("way", ["begun", "resumed", "resumed with another end", "begun elsewhere"])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(
    way: str,
    command: Command,
    text: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command.train(text, "-o", tmp_path / "whole") == 0
    ended_early(command, text, run)
    log = (run / "metrics.jsonl").read_bytes()
    record = ended_early(command, text, run) if way == "resumed" else None
    if way == "begun":
        assert command.train(text, "-o", run) == 0
    elif way == "begun elsewhere":  # a trainer of the library takes the place of the command's
        data = charlm.BlockDataset.from_text(TEXT, charlm.ByteTokenizer(), 8)
        charlm.Trainer(charlm.BigramLM(256), data, charlm.TrainerConfig(max_steps=2), out_dir=run).fit()
        assert not (run / "train.json").exists()
        assert not (run / "ngram").exists()
    else:
        end = ("--max-steps", "4") if way.endswith("end") else ()
        monkeypatch.setattr(sys, "argv", ["charlm", "train", "--resume", "-o", str(run), *end])  # is recorded
        assert command("train", "--resume", "-o", run, *end) == 0
        assert "ended before its first checkpoint, and is started again" in command.err
        assert list_checkpoints(run)[-1].step == (4 if end else 20)
        assert command("train", "--repeat", run, "-o", tmp_path / "repeated") == 0  # it is one run, whole
    if record is not None:
        same = ("preset", "model", "training", "val_fraction", "tokenizer", "sources", "device", "baseline")
        assert {name: record_of(run)[name] for name in same} == {name: record[name] for name in same}
    if way in {"begun", "resumed"}:
        assert charlm.load(run).evaluate(TEXT) == charlm.load(tmp_path / "whole").evaluate(TEXT)
    logs = {path.read_bytes() for path in run.glob("abandoned-*.jsonl")}
    assert log in logs or not log
    assert command.train(text, "-o", run, "--overwrite") == 0
    assert not list(run.glob("abandoned-*"))


def test_what_is_advised_for_a_directory_that_is_taken_is_not_refused(
    command: Command, text: Path, run: Path
) -> None:
    ended_early(command, text, run)
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    assert command.train(text, "-o", run) == 1
    assert command.err.endswith("is not empty. Choose another directory.\n")
    assert command("train", "--resume", "-o", run) == 1
    assert "none was saved. Start again, in another directory" in command.err
    (run / "notes.txt").unlink()
    assert command.train(text, "-o", run) == 0
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    assert command.train(text, "-o", run) == 1
    assert command.err.endswith("Go on with the run there (--resume), or choose another directory.\n")
    assert command("train", "--resume", "-o", run) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 2}, "has version 2 of charlm.train; this charlm reads up to 1. Update charlm."),
        ({"sources": [1]}, "must hold strings in 'sources'"),
        ({"val_fraction": "0.1"}, "must hold a number in 'val_fraction'"),
        ({"by_file": True, "separator": 5}, "must hold a string in 'separator'"),
        ({"by_file": True, "weights": "11"}, "must hold a list in 'weights'"),
    ],
)
def test_a_strange_record_is_refused(
    command: Command, text: Path, run: Path, content: dict[str, object], message: str
) -> None:
    assert command.train(text, "-o", run) == 0
    (run / "train.json").write_text(json.dumps({**record_of(run), **content}))
    assert command("train", "--resume", "-o", run) == 1
    assert message in command.err


def test_a_decimal_is_cut_as_a_decimal_by_every_command(command: Command, tmp_path: Path) -> None:
    text, run = text_file(tmp_path, (TEXT * 3)[:1000]), tmp_path / "run"
    assert command.train(text, "-o", run, "--val-fraction", "0.07") == 0
    assert "930 characters to train on, 70 for validation" in command.err
    assert record_of(run)["train_ids"] == 930
    assert command("inspect", text, "--val-fraction", "0.07") == 0
    assert "930 characters to train on, 70 for validation" in command.out
    assert command("train", "--resume", "-o", run, "--max-steps", "25") == 0
    assert "930 characters to train on, 70 for validation" in command.err


def test_a_run_that_began_with_another_cut_keeps_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, run, two, three = text_file(tmp_path, (TEXT * 3)[:1000]), *(tmp_path / name for name in "123")
    with monkeypatch.context() as older:  # as charlm cut before
        older.setattr("charlm.cli.plan.share_of", lambda count, share: int(share * count))
        older.setattr("charlm.data.blocks.share_of", lambda count, share: int(share * count))
        assert command.train(text, "-o", run, "--val-fraction", "0.07") == 0
    assert "929 characters to train on, 71 for validation" in command.err
    record = record_of(run)
    del record["train_ids"]
    (run / "train.json").write_text(json.dumps(record))
    assert command("train", "-o", two, "--repeat", run) == 0
    assert "929 characters to train on, 71 for validation" in command.err
    assert command("train", "-o", three, "--repeat", two) == 0  # its record says where it cut
    (tmp_path / "other").mkdir()
    longer = text_file(tmp_path / "other", (TEXT * 5)[:10_000])
    assert command("train", longer, "-o", tmp_path / "4", "--repeat", three) == 0
    assert "9,300 characters to train on, 700 for validation" in command.err  # of another text
    for one in (run, two, three):
        assert record_of(one).get("train_ids", 929) == 929
        assert weights(one) == weights(run)
    for one in (run, two, three):
        assert command("train", "--resume", "-o", one, "--max-steps", "25") == 0
        assert "929 characters to train on, 71 for validation" in command.err


def test_a_run_of_the_command_can_go_on_in_a_program(command: Command, text: Path, run: Path) -> None:
    assert command.train(text, "-o", run) == 0
    data = charlm.BlockDataset.from_text(TEXT, charlm.CharTokenizer.from_text(TEXT), 16)
    train, val = data.split()
    trainer = charlm.Trainer.resume(run, train, val_data=val, device="cpu", max_steps=25)
    assert trainer.fit().steps == 25


def test_early_ends_are_explained(command: Command, text: Path, run: Path, tmp_path: Path) -> None:
    assert command.train(text, "-o", run, "--max-seconds", "0.000001") == 0
    assert "done    1 steps in 0:00, as max_seconds is over" in command.err
    flags = ("--learning-rate", "0", "--patience", "1", "--eval-interval", "2")
    assert command.train(text, "-o", tmp_path / "two", *flags) == 0
    assert "(not the best)" in command.err
    assert ", as the validation loss no longer falls" in command.err


def test_the_command_works_outside_of_the_main_thread(command: Command, text: Path, run: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(command.train(text, "-o", run)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_an_unexpected_error_is_one_line_and_a_traceback_on_request(
    command: Command, text: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of\nideas")

    monkeypatch.setattr("charlm.models.gpt.GPT.forward", fail)
    assert command.train(text, "-o", run) == 1
    assert command.err.splitlines()[-1] == "charlm: error: RuntimeError: out of ideas (--debug shows where)"
    assert "Traceback" not in command.err
    assert command.train(text, "-o", run, "--overwrite", "--debug") == 1
    assert "Traceback" in command.err


def test_an_error_of_the_system_is_one_line(command: Command, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert command.train(text, "-o", tmp_path / "file" / "run") == 1
    assert command.err.splitlines()[-1].startswith("charlm: error: ")
    assert "ot a directory" in command.err


def test_figures_are_short() -> None:
    assert [clock(s) for s in (0.4, 62, 3723)] == ["0:00", "1:02", "1:02:03"]
    assert [speed(r, "character") for r in (12.34, 999.7, 81_300, 2.5e6, 3e9)] == [
        "12.3 chars/s",
        "1k chars/s",
        "81.3k chars/s",
        "2.5M chars/s",
        "3G chars/s",
    ]
    assert speed(81_300, "byte") == "81.3k bytes/s"


class SecondOfTwo(World):
    """A world whose first process has said that the text is prepared."""

    rank, size = 1, 2

    def tell(self, make: Callable[[], Any]) -> Any:
        return True


def test_of_several_processes_the_first_says_whether_a_text_is_prepared() -> None:
    class Ids:
        is_prepared = True

    asked: list[bool | None] = []

    def encode(prepared: bool | None) -> Any:
        asked.append(prepared)
        return Ids()

    for world in (None, World(), SecondOfTwo()):
        assert train._encoded(world, encode, prepared=None).is_prepared
    assert asked == [None, None, True]


GERMAN = "".join(f"Noch {i} grüne Flaschen\n" for i in range(80))


@pytest.fixture
def both(tmp_path: Path) -> list[str]:
    """Write two texts of different characters."""
    (tmp_path / "en.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "de.txt").write_text(GERMAN, encoding="utf-8")
    return [str(tmp_path / "en.txt"), str(tmp_path / "de.txt")]


def test_files_are_documents_with_weights_and_a_resume_keeps_them_so(
    command: Command, both: list[str], tmp_path: Path
) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    words = [*both, "--by-file", "--weight", f"{both[1]}=2.5", "--keep-last", "9"]
    assert command.train(*words, "-o", one) == 0
    assert f"{len(TEXT) + len(GERMAN):,} characters in 2 documents, vocabulary" in command.err
    held_out = len(TEXT) - int(0.9 * len(TEXT)) + len(GERMAN) - int(0.9 * len(GERMAN))
    assert "none for validation" not in command.err
    assert f", {held_out:,} for validation" in command.err
    record = record_of(one)
    assert (record["by_file"], record["separator"], record["weights"]) == (True, None, [1.0, 2.5])
    shutil.copytree(one, two)
    shutil.rmtree(max((two / "checkpoints").iterdir()))
    assert command("train", "--resume", "-o", two) == 0
    assert "10 of 20 are done" in command.err
    assert weights(two) == weights(one)
    assert command("train", "--repeat", one, "-o", three) == 0
    assert weights(three) == weights(one)
    assert command.train(*both, "-o", tmp_path / "joined") == 0
    assert "en.txt' is there" not in command.err
    assert "note    the files are joined; --by-file keeps them apart: validation is the end of" in command.err
    assert weights(tmp_path / "joined") != weights(one)
    assert command.train(*both, "-o", one, "--resume", "auto", "--weight", f"{both[1]}=3") == 2
    assert "--weight [1.0, 3.0] (it has [1.0, 2.5])" in command.err
    assert command("train", *both, "--resume", "-o", one, "--by-file") == 2
    assert "so --by-file cannot be given with --resume" in command.err
    assert command("train", both[0], "--resume", "-o", one) == 2
    assert "the run has a weight for each of 2 files; give these, got 1" in command.err


def test_a_separator_ends_documents(command: Command, tmp_path: Path) -> None:
    text, run = tmp_path / "tales.txt", tmp_path / "run"
    tales = [f"Once {i} bottles stood upon the wall of one green house.\n\n" for i in range(50)]
    text.write_text("".join(tales), encoding="utf-8")
    assert command.train(text, "-o", run, "--separator", r"\n\n") == 0
    assert " in 50 documents, vocabulary" in command.err
    assert ": validation" not in command.err
    assert command("train", "--resume", "-o", run, "--max-steps", "30") == 0
    assert command.train(text, "-o", tmp_path / "long", "--separator", r"\n\n", "--block-size", "64") == 1
    assert "each document is too short for a block of 64 and the character after it" in command.err
    assert command.train(text, "-o", run, "--separator", "") == 2
    assert "argument --separator: must not be empty" in command.err


def test_a_file_that_is_there_twice_is_one_document_seen_twice(
    command: Command, both: list[str], tmp_path: Path
) -> None:
    twice, weighted = tmp_path / "twice", tmp_path / "weighted"
    assert command.train(both[0], both[1], both[0], "--by-file", "-o", twice) == 0
    assert "en.txt' is there 2 times: as one, seen so often" in command.err
    assert command.train(*both, "--weight", f"{both[0]}=2", "-o", weighted) == 0
    assert weights(twice) == weights(weighted)
    assert command.train(*both, both[0], "-o", tmp_path / "joined") == 0
    assert (
        "en.txt' is there 2 times, so validation may repeat the training text; validation is" in command.err
    )
    (tmp_path / "bare.txt").write_text("no end of line", encoding="utf-8")
    assert command.train(tmp_path / "bare.txt", *both, "-o", tmp_path / "bare") == 0
    assert "bare.txt' ends in a line that runs on into" in command.err


def test_a_wrong_weight_is_refused(command: Command, both: list[str], run: Path) -> None:
    assert command.train(*both, "-o", run, "--weight", "other.txt=2") == 2
    assert "--weight must name a FILE of the command, as it stands there, got 'other.txt=2'" in command.err
    for number in ("0", "x", "-1", "inf", "nan", "1e19"):
        assert command.train(*both, "-o", run, "--weight", f"{both[0]}={number}") == 2
        assert "--weight must be FILE=W with a number from 1e-6 to 1e6" in command.err


def test_a_prepared_corpus_is_trained_on_by_file(command: Command, both: list[str], tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert command("prepare", *both, "-o", data) == 0
    assert command.train(data, "-o", tmp_path / "one", "--by-file") == 0
    assert " in 2 documents, vocabulary" in command.err
    assert command.train(*both, "-o", tmp_path / "two", "--by-file") == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    shutil.rmtree(max((tmp_path / "one" / "checkpoints").iterdir()))
    assert command("train", "--resume", "-o", tmp_path / "one") == 0
    assert command.train(data, "-o", tmp_path / "three", "--weight", f"{data}=2") == 2
    assert "--weight needs the files themselves" in command.err
    assert command.train(data, "-o", tmp_path / "three", "--separator", "x") == 2
    assert "--separator needs texts that fit into memory" in command.err


def test_epochs_are_of_one_text(command: Command, both: list[str], run: Path) -> None:
    assert command("train", *both, "-o", run, "--epochs", "2", "--by-file") == 2
    assert "--epochs counts passes through one text; with documents give --max-steps" in command.err
