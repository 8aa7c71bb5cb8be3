"""The command line: help, mistakes in it, and that neither needs torch."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from harness.command import Command, environment, text_file

import charlm
from charlm.cli import guess as guess_module
from charlm.cli import parser
from charlm.cli.fields import field_docs, fields_of, flag_of, sampling_fields
from charlm.cli.output import UsageError
from charlm.cli.parser import COMMANDS, parse
from charlm.cli.settings import FIELDS
from charlm.generation import SamplingOptions
from charlm.models.config import GPTConfig
from charlm.training.config import TrainerConfig


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["generate", "-h"], ["--version"]])
def test_help_and_version_need_no_torch(words: list[str]) -> None:
    program = (
        "import sys\nfrom charlm.cli.__main__ import main\n"
        f"code = main({words!r})\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr


@pytest.mark.slow
def test_python_m_charlm_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "charlm", "--version"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"charlm {charlm.__version__}\n")


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)])
def test_help_fits_the_terminal(
    command: Command, monkeypatch: pytest.MonkeyPatch, columns: int, words: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert command(*words, "--help") == 0
    assert max(map(len, command.out.splitlines())) <= columns


def test_every_field_has_a_flag_with_its_docstring_and_default(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert command("train", "--help") == 0
    for name, field in FIELDS.items():
        flag = flag_of(name) if field.kind is not bool else "--[no-]" + flag_of(name)[2:]
        line = re.search(rf"^  {re.escape(flag)}\b.*(\n {{10}}.*)?", command.out, re.MULTILINE)
        assert line is not None, flag
        assert field.doc
        assert field.doc in " ".join(line[0].split())
        assert "(default: " in line[0]
    names = {*GPTConfig.from_dict({"vocab_size": 1}).to_dict(), *TrainerConfig().to_dict()} - {"vocab_size"}
    assert FIELDS.keys() == names


def test_help_shows_the_values_of_the_preset_that_is_asked_for(command: Command) -> None:
    assert command("train", "--preset", "lecture", "--help") == 0
    text = " ".join(command.out.split())
    assert "those of the preset lecture" in text
    assert "(default: 384)" in text
    assert "(default: 0.9 0.999)" in text


def test_docstrings_are_not_needed() -> None:
    assert field_docs(type("NoSource", (), {"__module__": "builtins"})) == {}


def test_the_options_of_sampling_are_the_fields_of_its_class(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert command("generate", "--help") == 0
    wanted, read = fields_of(SamplingOptions, "sampling"), sampling_fields()
    args = parse(["generate", "run"])
    changed = {"temperature": 0.8, "overflow": "restart"}
    for field in dataclasses.fields(SamplingOptions):
        if field.name in {"filters", "banned_ids", "use_cache", "draft", "constraint"}:
            continue
        assert read[field.name] == wanted[field.name]
        assert wanted[field.name].doc
        assert f"{flag_of(field.name)} " in command.out
        assert wanted[field.name].doc in " ".join(command.out.split())
        assert getattr(args, field.name) == changed.get(field.name, field.default)
    words = ("--top-k", "none", "--top-p", "None", "--min-p", "0.1", "--seed", "-7", "-t", "0")
    given = parse(["generate", "run", *words])
    assert (given.top_k, given.top_p, given.min_p, given.seed, given.temperature) == (None, None, 0.1, -7, 0)


def test_the_options_of_sampling_are_there_where_the_source_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str, resource: str) -> bytes:
        raise FileNotFoundError

    wanted = sampling_fields()
    monkeypatch.setattr("pkgutil.get_data", missing)
    found = sampling_fields()
    assert {name: found[name] for name in ("temperature", "top_k", "overflow")} == {
        name: wanted[name] for name in ("temperature", "top_k", "overflow")
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "a command is needed: inspect, prepare, train, generate, serve, eval, plot, info, export, "
            "import, compress or decompress\n"
            "Try: charlm --help",
        ),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "-o", "r"], "FILE is needed"),
        (["train", "a.txt"], "required: -o/--out\nTry: charlm train --help"),
        (["train", "a.txt", "-o", "r", "--lr", "3"], "unknown option '--lr'; did you mean --learning-rate?"),
        (
            ["train", "a.txt", "-o", "r", "--max-iters=3"],
            "unknown option '--max-iters'; did you mean --max-steps?",
        ),
        (
            ["train", "a.txt", "-o", "r", "--overwrit"],
            "unknown option '--overwrit'; did you mean --overwrite?",
        ),
        (["info", "r", "--lr"], "unknown option '--lr'; `charlm info --help` lists all"),
        (["info", "r", "s"], "unexpected argument 's'"),
        (["train", "a.txt", "-o", "r", "--preset", "x"], "argument --preset: invalid choice: 'x'"),
        (["train", "a.txt", "-o", "r", "--minutes", "0"], "--minutes must be a finite number above 0 and at"),
        (["train", "a.txt", "-o", "r", "--minutes", "nan"], "--minutes must be a finite number above 0 and"),
        (["train", "a.txt", "-o", "r", "--minutes", "two"], "or None, got 'two'"),
        (
            ["train", "a.txt", "-o", "r", "--val-fraction", "1"],
            "--val-fraction must be at least 0 and below 1, got 1",
        ),
        (["train", "a.txt", "-o", "r", "--n-layer", "0"], "--n-layer must be an int at least 1"),
        (["train", "a.txt", "-o", "r", "--n-layer", "two"], "--n-layer must be an int at least 1"),
        (
            ["train", "a.txt", "-o", "r", "--norm", "x"],
            "--norm must be one of 'layernorm', 'rmsnorm', got 'x'",
        ),
        (["train", "a.txt", "-o", "r", "--learning-rate", "nan"], "--learning-rate must be a finite number"),
        (["train", "a.txt", "-o", "r", "--n-layer", "none"], "--n-layer must be an int"),
        (["train", "a.txt", "-o", "r", "--betas", "0.9", "x"], "--betas must be (a finite number"),
        (
            ["train", "a.txt", "-o", "r", "--n-embd", "9", "--n-head", "2"],
            "n_embd must be a multiple of n_head",
        ),
        (["train", "--resume", "-o", "r", "--overwrite", "--bias"], "so --overwrite, --bias cannot be given"),
        (["train", "--resume", "-o", "r", "--seed", "1"], "so --seed cannot be given with --resume"),
        (["train", "--resume", "-o", "r", "--repeat", "s"], "so --repeat cannot be given with --resume"),
        (
            ["train", "--repeat", "s", "-o", "r", "--minutes", "1", "--seed", "3"],
            "a repeated run keeps its settings, so --minutes, --seed cannot be given with --repeat",
        ),
        (["inspect"], "the following arguments are required: FILE\nTry: charlm inspect --help"),
        (["inspect", "a.txt", "--minutes", "0"], "--minutes must be a finite number above 0"),
        (["inspect", "a.txt", "--minutes", "1000001"], "at most 1000000, got 1000001.0\n"),
        (
            ["inspect", "a.txt", "--val-fraction", "1"],
            "--val-fraction must be at least 0 and below 1, got 1",
        ),
        (["inspect", "a.txt", "b.txt", "--max-steps", "3"], "unknown option '--max-steps'"),
        (["generate", "r", "-n", "x"], "argument -n/--max-new-tokens: invalid int value: 'x'"),
        (["generate", "r", "--top-k", "x"], "argument --top-k: invalid int value: 'x'"),
        (["generate", "r", "-t", "none"], "argument -t/--temperature: invalid float value: 'none'"),
        (["generate", "r", "--overflow", "x"], "argument --overflow: invalid choice: 'x' (choose from"),
    ],
)
def test_a_wrong_command_line_is_said_in_one_line_with_exit_code_2(
    command: Command, words: list[str], message: str
) -> None:
    assert command(*words) == 2
    assert command.err.startswith("charlm: error: ")
    assert command.err.count("\n") == 2
    assert message in command.err
    assert not command.out


def test_files_may_stand_before_and_behind_options(command: Command, tmp_path: Path) -> None:
    assert command("-q", "train", "nowhere.txt", "-o", tmp_path / "run", "-") == 1
    assert "'nowhere.txt' is neither a file nor a named corpus" in command.err


VALUES = sorted(
    (command, action.option_strings[-1], option)
    for command in COMMANDS
    for action in parser._parsers("lecture", [command])[1][command]._actions
    for option in action.option_strings
    if action.nargs is None and not isinstance(action, argparse.BooleanOptionalAction)
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_value_that_begins_with_a_hyphen_is_refused_with_the_way_out(command: str) -> None:
    """Each of the values with every fourth option."""
    values = itertools.cycle(["-the-cat", "--", "-p", "-" + "y" * 100])
    for long, option in [(long, option) for name, long, option in VALUES if name == command]:
        value = next(values)
        with pytest.raises(UsageError) as caught:
            parse([command, "one", option, value])
        shown = shlex.quote(value if len(value) <= 40 else value[:39] + "…")
        way_out = f"; a value that begins with a hyphen is given as {long}={shown}"
        assert str(caught.value).endswith(way_out), option
        with pytest.raises(UsageError) as caught:
            parse([command, "one", option])
        assert str(caught.value).endswith(": expected one argument"), option


@pytest.mark.parametrize("value", ["-the cat", "-x", "--other", "--", "-p", "-"])
def test_a_value_that_begins_with_a_hyphen_is_taken_where_it_is_joined_to_its_option(value: str) -> None:
    for option in ("-p", "--prompt"):
        assert parse(["generate", "one", f"{option}={value}"]).prompt == value
    assert parse(["generate", "one", f"--stop={value}", f"--stop={value}"]).stop == [value, value]
    assert parse(["generate", "one", f"--prompt-file={value}"]).prompt_file == value
    assert parse(["train", "one", f"-o={value}", f"--config={value}"]).out == value
    assert parse(["plot", "one", f"--attention={value}"]).attention == value
    assert parse(["eval", "one", "two", f"--html={value}"]).html == value


def test_a_path_that_begins_with_a_hyphen_is_named_as_it_can_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-zz").touch()
    for before in (
        ["inspect"],
        ["info"],
        ["eval", "one"],
        ["train", "-o", "one"],
        ["train", "two", "-o", "one"],
    ):
        with pytest.raises(UsageError) as caught:
            parse([*before, "-zzz"])  # there is none of this name
        assert "./" not in str(caught.value)
        with pytest.raises(UsageError) as caught:
            parse([*before, "-zz"])
        assert str(caught.value).endswith("; write the path '-zz' as ./-zz")
        args = vars(parse([*before, "--", "-zz"]))
        assert args.get("files", [args.get("run")])[-1] == "-zz"


def test_commands_that_are_proposed_can_be_pasted(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text_file(tmp_path).rename("-my text")
    assert command.train("./-my text", "--out=-run") == 0
    assert "next    charlm generate ./-run" in command.err
    monkeypatch.setattr(guess_module, "_timed", lambda *_: (0.05, 1.0))
    assert command("inspect", "--", "-my text") == 0
    assert "charlm train './-my text' -o" in command.out
