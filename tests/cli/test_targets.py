"""Where a command writes to is looked at before the work; a result is told, whatever becomes of its file."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.command import Command, text_file

BAD_FILES = ("none/x", "file/x", "/proc/x", "x" * 300, "folder")
BAD_FOLDERS = ("file/x", "file/x/y", "/proc/x", "x" * 300, "file")
COMMANDS = {
    "eval": (["eval", "no-model", "no-text", "--html"], ".html", BAD_FILES),
    "plot": (["plot", "no-run", "-o"], ".png", BAD_FILES),
    "train": (["train", "no-text", "-o"], "", BAD_FOLDERS),
}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return the command, in a folder with a file, a folder of each kind of name, and a text."""
    monkeypatch.chdir(tmp_path)
    text_file(tmp_path)
    for suffix in ("", ".html", ".png"):
        Path(f"file{suffix}").touch()
        Path(f"folder{suffix}").mkdir()
    return Command(capsys)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("words", "target"),
    [(words, name + suffix) for words, suffix, names in COMMANDS.values() for name in names],
)
def test_a_target_that_cannot_be_written_is_named_before_anything_is_read(
    command: Command, words: list[str], target: str
) -> None:
    """Neither model nor text is there, which nobody has noticed yet."""
    before = sorted(os.walk("."))
    assert command(*words, target) == 1
    (line,) = command.err.splitlines()
    assert target[:50] in line
    assert "no-" not in line
    assert sorted(os.walk(".")) == before


@pytest.mark.parametrize("target", ["run", "new/folders/run"])
def test_a_target_that_can_be_written_is_left_as_it_was(command: Command, target: str) -> None:
    before = sorted(os.walk("."))
    assert command("train", "no-text", "-o", target) == 1
    assert "no-text" in command.err
    assert command("eval", "no-model", "text.txt", "--html", "page.html") == 1
    assert "no-model" in command.err
    assert sorted(os.walk(".")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into every directory")
def test_a_directory_without_the_right_to_write_is_refused(command: Command) -> None:
    Path("folder").chmod(0o555)
    assert command("train", "no-text", "-o", "folder/run") == 1
    assert "cannot write 'folder/run': Permission denied" in command.err


def test_a_run_that_cannot_be_written_is_not_resumed(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.train("text.txt", "-o", "run") == 0

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")  # which root never sees

    monkeypatch.setattr("charlm.files.atomic._write_new", refused)
    assert command("train", "no-text", "-o", "run", "--resume") == 1
    assert command.err == "charlm: error: cannot write 'run': Permission denied\n"


def test_the_figures_come_though_the_page_cannot_be_written(command: Command) -> None:
    assert command.train("text.txt", "-o", "run") == 0
    assert command("eval", "run", "text.txt") == 0
    figures = command.out
    with files_of_at_most(10_000):
        assert command("eval", "run", "text.txt", "--html", "page.html") == 1
    assert command.out == figures
    assert command.err == "charlm: error: cannot write 'page.html': File too large\n"
    with files_of_at_most(10_000):
        assert command("eval", "run", "text.txt", "--html", "page.html", "--show", "--json") == 2
        assert command("eval", "run", "text.txt", "--html", "page.html", "--show") == 1
    assert command.out.endswith(f"\n{figures}")


def test_a_training_tells_what_it_came_to_though_it_cannot_be_saved(command: Command) -> None:
    with files_of_at_most(4_000):
        assert command.train("text.txt", "-o", "run", "--no-baseline") == 1
    *_, done, loss, _, error = command.err.splitlines()
    assert done.startswith("done    20 steps in 0:")
    assert loss.startswith("loss    best ")
    assert error.startswith("charlm: error: cannot save the checkpoint of step 20")
    assert "next " not in command.err
