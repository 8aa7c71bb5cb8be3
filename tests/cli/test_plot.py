"""`charlm plot`: which picture, into which file, and what is said of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness.command import TEXT, TINY, Command, environment, text_file
from harness.warm import WarmPython

from charlm import BigramLM, ByteTokenizer, CharLM, CharTokenizer, Trainer
from charlm.cli.__main__ import main
from charlm.cli.rundir import check_free
from charlm.data.blocks import BlockDataset
from charlm.training.config import TrainerConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plot")
    assert main(["train", str(text_file(folder)), "-o", str(folder / "bottles"), *TINY, "-q"]) == 0
    return folder / "bottles"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(capsys)


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(
    ("flags", "name", "what"),
    [
        ((), "bottles.png", "the training of 'bottles' up to step 20, drawn into 'bottles.png'"),
        (("--bigram",), "bottles-bigram.png", "probabilities of the model after each character, drawn into"),
        (("--attention", "9 green"), "bottles-attention.png", "where each layer and head looks, drawn into"),
    ],
)
def test_each_picture_has_a_name_of_its_own_in_the_current_directory(
    command: Command, run: Path, tmp_path: Path, flags: tuple[str, ...], name: str, what: str
) -> None:
    before = sorted(run.rglob("*"))
    assert command("plot", run, *flags) == 0
    assert command.out == f"{name}\n"
    assert command.err.startswith(what)
    assert files(tmp_path) == [name]
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(run.rglob("*")) == before
    assert command("plot", run, *flags, "-q") == 0
    assert (command.out, command.err) == (f"{name}\n", "")


@pytest.mark.parametrize("flags", [(), ("--bigram",), ("--attention", "9 green")])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_command_writes_the_same_bytes(
    command: Command, run: Path, tmp_path: Path, flags: tuple[str, ...], ending: str
) -> None:
    for name in ("one", "other"):
        assert command("plot", run, *flags, "-o", f"{name}.{ending}") == 0
        assert command.out == f"{name}.{ending}\n"
    assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"other.{ending}").read_bytes()


def test_a_picture_that_is_there_is_replaced(command: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "there.svg").write_bytes(b"old")
    assert command("plot", run, "-o", tmp_path / "there.svg") == 0
    assert (tmp_path / "there.svg").read_bytes().startswith(b"<?xml")


def test_a_run_of_the_trainer_without_validation_is_drawn(command: Command, tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text(TEXT)
    data = BlockDataset.from_text(TEXT, tokenizer, 8)
    config = TrainerConfig(max_steps=1, precision="fp32")
    model = BigramLM(tokenizer.vocab_size)
    Trainer(model, data, config, tokenizer=tokenizer, out_dir=tmp_path / "own", device="cpu").fit()
    assert command("plot", tmp_path / "own") == 0
    assert "up to step 1, drawn into 'own.png'" in command.err
    assert command("plot", tmp_path / "own", "--bigram") == 0
    assert command("plot", tmp_path / "own", "--attention", "9") == 1
    assert command.err == (
        "charlm: error: --attention needs a GPT, got a model of the kind 'bigram'. Try --bigram.\n"
    )


def test_checkpoints_and_saved_models_have_no_training_but_a_model(
    command: Command, run: Path, tmp_path: Path
) -> None:
    checkpoint = next((run / "checkpoints").iterdir())
    for path in (checkpoint, run / "ngram"):
        assert command("plot", path, "--bigram") == 0
        assert command("plot", path) == 1
        assert "no run in " in command.err
    CharLM(BigramLM(256), ByteTokenizer()).save(tmp_path / "bytes")
    assert command("plot", tmp_path / "bytes", "--bigram", "-o", "bytes.svg") == 0


def test_text_that_the_model_cannot_read_is_an_error(command: Command, run: Path, tmp_path: Path) -> None:
    assert command("plot", run, "--attention", "Ω") == 1
    assert "'Ω'" in command.err
    assert command("plot", run, "--attention", "9" * 17) == 1
    assert "at most block_size = 16 ids" in command.err
    assert command("plot", run, "--attention", "") == 2
    assert "--attention must be at least one character, got none" in command.err
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "a.pdf"], "a picture's name must end in .png or .svg, got 'a.pdf'"),
        (["--bigram", "--attention", "a"], "argument --attention: not allowed with argument --bigram"),
        (["--bigrams"], "unknown option '--bigrams'; did you mean --bigram?"),
    ],
)
def test_a_wrong_command_line_is_said_before_anything_is_read(
    command: Command, words: list[str], message: str
) -> None:
    assert command("plot", "nowhere", *words) == 2
    assert message in command.err


def test_the_default_never_lies_among_the_files_of_the_run(
    command: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (run, run / "checkpoints"):
        monkeypatch.chdir(folder)
        assert command("plot", run) == 2
        assert (
            "the picture would lie among the files of the run; say where it is to go with -o" in command.err
        )
    monkeypatch.chdir(run)
    assert command("plot", ".", "-o", "../elsewhere.png") == 0
    assert "the training of 'bottles' up to" in command.err
    check_free(run, overwrite=True)
    assert (run.parent / "elsewhere.png").is_file()


def test_a_place_that_cannot_be_written_is_named(command: Command, run: Path, tmp_path: Path) -> None:
    assert command("plot", run, "-o", "missing/a.png") == 1
    assert command.err == "charlm: error: cannot write 'missing/a.png': No such file or directory\n"
    (tmp_path / "folder.png").mkdir()
    assert command("plot", run, "-o", "folder.png") == 1
    assert command.err == "charlm: error: cannot write 'folder.png': Is a directory\n"
    assert files(tmp_path) == ["folder.png"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--bigram",), ("--attention", "9")])
def test_without_matplotlib_one_line_says_how_to_get_it(
    run: Path, tmp_path: Path, warm_python: WarmPython, flags: tuple[str, ...]
) -> None:
    program = (
        "import sys\nsys.modules['matplotlib'] = None\n"
        "from charlm.cli.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        warm_python("-c", program, "plot", run, *flags),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stderr == "charlm: error: charlm plot needs matplotlib: pip install 'charlm[plot]'\n"
    assert (done.returncode, done.stdout) == (1, "")
    assert not files(tmp_path)
