"""What `charlm train` refuses for want of memory or of a compiler, and where compiled code is kept."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.command import Command, environment, text_file

HUGE = ("--batch-size", "1000000", "--block-size", "64", "--n-embd", "512", "--n-layer", "8")  # 15 TB


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return text_file(tmp_path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return charlm's cache folder, with torch's own choice put aside."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that its absence comes back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("CHARLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_batch_that_cannot_fit_ends_in_one_line_that_says_what_would(
    command: Command, text: Path, tmp_path: Path
) -> None:
    began = time.process_time()
    assert command.train(text, "-o", tmp_path / "run", *HUGE) == 1
    assert time.process_time() - began < 5
    (line,) = command.err.splitlines()
    assert line.startswith("charlm: error: training must fit into the memory that is available on cpu, ")
    assert " TB with batch_size=1000000 and block_size=64. batch_size=" in line
    assert line.endswith("(as flags: --batch-size, --accumulate, --block-size, --n-embd, --n-layer)")
    assert not (tmp_path / "run").exists()


def test_a_refused_batch_leaves_the_run_that_it_was_to_overwrite(
    command: Command, text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert command.train(text, "-o", run, "-q") == 0
    before = sorted(run.rglob("*"))
    assert command.train(text, "-o", run, "--overwrite", *HUGE) == 1
    assert sorted(run.rglob("*")) == before


def test_compiled_code_is_kept_in_the_cache_folder_and_a_missing_compiler_is_named(
    command: Command, text: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert command.train(text, "-o", tmp_path / "run", "--compile") == 1
    assert command.err.splitlines()[-1].startswith(
        "charlm: error: compile=True needs the C++ compiler '/nowhere/g++'"
    )
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache / "compiled")
    assert not cache.exists()  # torch makes it when it needs it


def test_a_place_for_compiled_code_that_was_chosen_already_stays(
    command: Command, text: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert command.train(text, "-o", tmp_path / "run", "--compile") == 1
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_without_compiling_no_variable_is_set(
    command: Command, text: Path, tmp_path: Path, cache: Path
) -> None:
    assert command.train(text, "-o", tmp_path / "run", "-q") == 0
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_resumed_run_that_compiles_finds_its_code_again(
    command: Command, text: Path, tmp_path: Path, cache: Path
) -> None:
    run = tmp_path / "run"
    assert command.train(text, "-o", run, "-q") == 0
    record = json.loads((run / "train.json").read_bytes())
    record["training"]["compile"] = True
    (run / "train.json").write_text(json.dumps(record), encoding="utf-8")
    assert command("train", "-o", run, "--resume", "-q") == 0
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache / "compiled")


def test_without_a_home_directory_torch_keeps_its_own_place(
    command: Command, text: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError

    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.delenv("CHARLM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert command.train(text, "-o", tmp_path / "run", "--compile") == 1
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit on addresses is none")
@pytest.mark.parametrize("megabytes", [300, 600, 700, 900, 1200, 1600])
def test_a_limit_on_memory_ends_in_one_line(text: Path, tmp_path: Path, megabytes: int) -> None:
    """Below a gigabyte, where torch would abort, before it is loaded."""
    words = shlex.join(
        [sys.executable, "-m", "charlm", "train", str(text), "-o", str(tmp_path / "run"), "-q"]
    )
    big = "--preset cpu-10s --max-steps 3 --device cpu --block-size 64 --batch-size 3000"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -v {megabytes * 1000}; exec {words} {big}"],
        check=False,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "charlm: error: "
        + ("PyTorch takes about 1 GB" if megabytes < 1000 else "the memory does not suffice")
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_memory_that_is_short_is_called_so(
    command: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("charlm.cli.train.encode_corpus", failing)
    assert command.train(text, "-o", tmp_path / "run") == 1
    assert command.err.startswith("charlm: error: the memory does not suffice.")
    assert len(command.err.splitlines()) == 1
