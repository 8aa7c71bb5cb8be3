"""The kernel's way to a machine: compiled once, kept, shared, checked; and every way in which that can fail.

None of them may end the process or the generation: without the kernel, the readable path writes the text.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from harness.command import environment
from harness.drawn_models import needs_kernel
from harness.states import torch_state
from harness.tiny_models import prompt, tiny_config, tiny_gpt
from harness.warm import WarmPython

from charlm.generation import TorchEngine
from charlm.models.gpt import GPT
from charlm.native import library as native
from charlm.native.gpt import NativeGPT
from charlm.native.storage import round_weights

pytestmark = pytest.mark.slow

posix = pytest.mark.skipif(sys.platform == "win32", reason="the kernel is written for POSIX threads")

CHILD = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
import torch
from harness.tiny_models import prompt, tiny_config, tiny_gpt
model = tiny_gpt(tiny_config())
ids = model.generate(prompt(2, 3), 30, temperature=0)
print(type(model.new_state().engine).__name__, ids.tolist())
"""


@pytest.fixture(scope="session")
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a compiler that compiles once, and from then on gives the same library: that takes no time."""
    folder = tmp_path_factory.mktemp("compiler")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return script(
        folder / "quick",
        f"""all="$*"
while [ "$1" != -o ]; do shift; done
if [ ! -e "{folder}/kept" ]; then
    {compiler} $all || exit 1
    cp "$2" "{folder}/new.$$" && mv "{folder}/new.$$" "{folder}/kept"
fi
cat "{folder}/kept" > "$2" """,
    )


@pytest.fixture
def cache(tmp_path: Path, quick_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let this process look for a kernel as if it had not yet, in a cache folder of its own."""
    monkeypatch.setenv("CHARLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(quick_compiler))
    monkeypatch.delenv("CHARLM_NATIVE", raising=False)
    monkeypatch.setattr(native, "_tried", [])
    return tmp_path / "cache" / "native"


def model() -> GPT:
    return tiny_gpt(tiny_config())


def ids_of_the_readable_path() -> list[list[int]]:
    state = torch_state(model(), 2)
    state.observe(prompt(2, 3))
    from charlm.generation import SamplingOptions, stream_ids

    steps = stream_ids(state, 30, SamplingOptions(temperature=0))
    new: list[list[int]] = torch.stack(list(steps), dim=1).tolist()
    return [given + more for given, more in zip(prompt(2, 3).tolist(), new, strict=True)]


def kind_of_state() -> str:
    """Generate, see that the text is right, and say which path wrote it."""
    assert model().generate(prompt(2, 3), 30, temperature=0).tolist() == ids_of_the_readable_path()
    return {NativeGPT: "fast", TorchEngine: "readable"}[type(model().new_state().engine)]


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def counting_compiler(folder: Path, then: str = 'exec "$CC_BEHIND" "$@"') -> str:
    """Return a compiler that notes each call in the file `calls`."""
    text = f'CC_BEHIND="{os.environ["CC"]}"\necho call >> "{folder}/calls"\n{then}'
    return str(script(folder / "counting", text))


def calls(folder: Path) -> int:
    path = folder / "calls"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def start(python: WarmPython, cache: Path, **changes: str) -> subprocess.Popen[str]:
    """Start a process of its own that generates."""
    env = environment(CHARLM_CACHE_DIR=str(cache.parent), OMP_NUM_THREADS="1", **changes)
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(Path(__file__).resolve().parents[1])])
    return subprocess.Popen(python("-W", "error", "-c", CHILD), env=env, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """Return which path it took, and what it logged."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    *logged, last = out.splitlines()
    kind, _, ids = last.partition(" ")
    assert ids == str(ids_of_the_readable_path())
    return kind, logged


@needs_kernel
def test_it_is_compiled_once_and_then_loaded_by_every_process(
    cache: Path, tmp_path: Path, warm_python: WarmPython
) -> None:
    compiler = counting_compiler(tmp_path)
    assert finish(start(warm_python, cache, CC=compiler)) == ("NativeGPT", [])
    assert calls(tmp_path) == 1
    (file,) = cache.iterdir()
    before = file.stat()
    assert before.st_mode & 0o077 == 0  # nobody else may have written it
    assert cache.stat().st_mode & 0o077 == 0
    assert finish(start(warm_python, cache, CC=compiler)) == ("NativeGPT", [])
    assert calls(tmp_path) == 1
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert list(cache.iterdir()) == [file]


@needs_kernel
def test_several_processes_may_compile_at_once(cache: Path, tmp_path: Path, warm_python: WarmPython) -> None:
    compiler = counting_compiler(tmp_path, then='sleep 0.5\nexec "$CC_BEHIND" "$@"')
    processes = [start(warm_python, cache, CC=compiler) for _ in range(2)]
    assert [finish(process) for process in processes] == [("NativeGPT", [])] * 2
    assert [path.suffix for path in cache.iterdir()] == [".so"]


DAMAGES = """
from pathlib import Path
import sys
from charlm.native import library as native
file = Path(sys.argv[1])
whole, mode = file.read_bytes(), file.stat().st_mode
for name, damaged in {
    "truncated": whole[: len(whole) // 2],
    "without its end": whole[:-1],
    "zeros in the middle": whole[:5_000] + bytes(len(whole) - 10_000) + whole[-5_000:],
    "empty": b"",
    "garbage": b"\x7fELF" + b"no library " * 1_000,
}.items():
    print(name, flush=True)
    file.unlink()  # the one before is loaded
    file.write_bytes(damaged)
    file.chmod(mode)
    native._tried.clear()
    assert native.library() is not None
    assert file.read_bytes() == whole
    assert list(file.parent.iterdir()) == [file]
"""


@needs_kernel
def test_a_damaged_file_is_never_loaded_and_replaced(cache: Path, warm_python: WarmPython) -> None:
    """To load the beginning of a library would end the process with SIGBUS, so it happens in another one."""
    assert native.library() is not None
    (file,) = cache.iterdir()
    env = environment(CHARLM_CACHE_DIR=str(cache.parent))
    done = subprocess.run(
        warm_python("-c", DAMAGES, file),
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "garbage"


@needs_kernel
def test_a_folder_in_the_place_of_the_file_is_gone_round(cache: Path) -> None:
    assert native.library() is not None
    (file,) = cache.iterdir()
    file.unlink()
    file.mkdir()
    native._tried.clear()
    assert kind_of_state() == "fast"


@needs_kernel
def test_another_source_compiler_or_processor_is_another_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.library() is not None
    changed = tmp_path / "sources"
    shutil.copytree(native._SOURCES, changed)
    (changed / "pool.h").write_bytes((changed / "pool.h").read_bytes() + b"\n/* changed */\n")
    changes: list[Callable[[], None]] = [
        lambda: monkeypatch.setattr(native, "_SOURCES", changed),
        lambda: monkeypatch.setattr(native, "_processor", lambda: "another"),
        lambda: monkeypatch.setenv("CC", counting_compiler(tmp_path)),
    ]
    for number, change in enumerate(changes, start=2):
        change()
        native._tried.clear()
        assert native.library() is not None
        assert len(list(cache.iterdir())) == number


def test_with_charlm_native_0_nothing_is_compiled_or_loaded(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", counting_compiler(tmp_path))
    monkeypatch.setenv("CHARLM_NATIVE", "0")
    with caplog.at_level(logging.INFO):
        assert kind_of_state() == "readable"
    assert calls(tmp_path) == 0
    assert not cache.exists()
    assert caplog.records == []


@needs_kernel
def test_charlm_native_counts_at_each_generation(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of_state() == "fast"
    monkeypatch.setenv("CHARLM_NATIVE", "0")
    assert kind_of_state() == "readable"
    monkeypatch.setenv("CHARLM_NATIVE", "1")
    assert kind_of_state() == "fast"


@posix
def test_without_a_compiler_the_readable_path_is_taken_quietly(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert kind_of_state() == "readable"
        assert kind_of_state() == "readable"
    assert [(record.levelname, record.name) for record in caplog.records] == [("INFO", "charlm.native")]
    assert "no C compiler was found (cc, gcc or clang)" in caplog.text
    assert not cache.exists()


@posix
@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("false", "false failed"),
        ("/nonexistent/compiler -O1", "/nonexistent/compiler"),
        ("gcc 'never ends", "No closing quotation"),
        ("   ", ""),
        ("sh refuses", "kernel.c:1: this is no language"),
        ("sh speaks", "\ufffdbersetzung"),
        ("true", ""),  # says that all is well, and has made nothing
        ("sh garbage", ""),
    ],
)
def test_a_compiler_that_fails_is_a_warning_and_the_readable_path_is_taken(
    compiler: str,
    message: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script(tmp_path / "refuses", 'echo "kernel.c:1: this is no language" >&2; exit 1')
    script(tmp_path / "speaks", "printf 'Die \\334bersetzung schlug fehl\\n' >&2; exit 1")  # in Latin-1
    script(tmp_path / "garbage", 'while [ "$1" != -o ]; do shift; done; echo garbage > "$2"')
    monkeypatch.setenv("CC", compiler.replace("sh ", f"sh {tmp_path}/"))
    assert kind_of_state() == "readable"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    text = record.getMessage()
    assert text.startswith("the native engine cannot be used, generating with PyTorch: ")
    assert message in text
    assert "\n" not in text
    assert kind_of_state() == "readable"  # and is not tried again
    assert len(caplog.records) == 1
    assert not list(cache.glob("tmp*"))


@posix
def test_a_compiler_that_never_ends_is_given_up(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setenv("CC", str(script(tmp_path / "sleeps", "exec sleep 60")))
    assert native.library() is None
    assert "timed out" in caplog.text
    assert list(cache.iterdir()) == []


@needs_kernel
def test_a_compiler_that_does_not_know_this_processor_is_asked_again_without(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = counting_compiler(
        tmp_path, then='case "$*" in *-march*) exit 1;; esac\nexec "$CC_BEHIND" "$@"'
    )
    monkeypatch.setenv("CC", compiler)
    assert kind_of_state() == "fast"
    assert calls(tmp_path) == 2


@needs_kernel
@pytest.mark.skipif(
    "avx512f" not in native._processor(),
    reason="the processor has no wider vectors to do without",
)
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx"])
def test_processors_with_narrower_vectors_give_the_same_within_rounding(
    flags: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", f"{shutil.which('gcc') or 'cc'} {flags}")
    for dtype in (torch.float32, torch.bfloat16):
        for config in (
            tiny_config("cpu-1min", n_embd=34, n_head=1),
            tiny_config(block_size=70, vocab_size=70),
        ):
            gpt = tiny_gpt(config, dtype=dtype)
            states = [gpt.new_state(7), torch_state(gpt.float(), 7)]
            gpt.to(dtype)
            assert isinstance(states[0].engine, NativeGPT)
            ids = [row[: 1 + 9 * i] for i, row in enumerate(prompt(7, 60))]
            predicted = []
            for state in states:
                state.observe(ids)
            gpt.float()
            predicted = [state.predict() for state in states]
            # Keys and values are kept in bfloat16 beside such weights.
            rtol, atol = (0, 1e-4) if dtype == torch.float32 else (1e-2, 3e-2)
            torch.testing.assert_close(predicted[0], predicted[1], rtol=rtol, atol=atol)


@needs_kernel
@pytest.mark.skipif("vnni" not in native._processor(), reason="the processor has no such instructions")
def test_without_instructions_for_products_of_integers_every_bit_is_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt = tiny_gpt(tiny_config(block_size=70, vocab_size=70, n_embd=64))
    round_weights(gpt, "int8")
    ids = [row[: 1 + 9 * i] for i, row in enumerate(prompt(7, 60))]
    predicted = []
    for flags in ("", " -mno-avx512vnni -mno-avxvnni"):
        monkeypatch.setattr(native, "_tried", [])
        monkeypatch.setenv("CC", f"{shutil.which('gcc') or 'cc'}{flags}")
        state = gpt.new_state(7)
        assert isinstance(state.engine, NativeGPT)
        state.observe(ids)
        predicted.append(state.predict())
    assert torch.equal(*predicted)


def unwritable(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be", encoding="utf-8")


def read_only(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o500)


@needs_kernel
@pytest.mark.parametrize("change", [unwritable, read_only])
def test_without_a_cache_folder_it_is_compiled_for_this_process_alone(
    change: Callable[[Path], None], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(cache)
    if change is read_only and os.access(cache, os.W_OK):
        pytest.skip("this user, root perhaps, can write to a folder that is read-only")
    with caplog.at_level(logging.INFO):
        assert kind_of_state() == "fast"
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage().startswith("compiling the native engine anew for this process: ")


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_not_loaded(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert native.library() is not None
    (file,) = cache.iterdir()
    os.chown(file, 12_345, 12_345)
    assert_refused(file, caplog)


@needs_kernel
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_file_that_others_could_write_is_not_loaded(
    mode: int, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert native.library() is not None
    (file,) = cache.iterdir()
    file.chmod(mode)
    assert_refused(file, caplog)


def assert_refused(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    native._tried.clear()
    before = file.stat()
    with caplog.at_level(logging.INFO):
        assert kind_of_state() == "fast"
    assert "could have been written by others" in caplog.text
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert list(file.parent.iterdir()) == [file]


@needs_kernel
@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_whatever_the_umask_what_was_compiled_is_loaded_again(
    mask: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a linker makes a new file, with the modes that the umask leaves."""
    compiler = counting_compiler(
        tmp_path,
        then='"$CC_BEHIND" "$@" || exit 1\nwhile [ "$1" != -o ]; do shift; done\nchmod a+rwx "$2"',
    )
    monkeypatch.setenv("CC", compiler)
    before = os.umask(mask)
    try:
        for _ in range(2):
            native._tried.clear()
            assert native.library() is not None
    finally:
        os.umask(before)
    assert calls(tmp_path) == 1


@needs_kernel
def test_what_a_killed_compilation_left_goes_with_the_next_one_a_day_later(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    for name, days in (("tmpabcd1234.so", 2), ("tmpabcd5678.so", 0), ("mine.so", 2)):
        (cache / name).touch()
        os.utime(cache / name, times=(0, time.time() - days * 86_400))
    assert native.library() is not None
    names = {path.name for path in cache.iterdir() if not path.name.startswith("kernel-")}
    assert names == {"tmpabcd5678.so", "mine.so"}


@needs_kernel
def test_threads_that_ask_at_once_compile_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", counting_compiler(tmp_path))
    ready = threading.Barrier(4)

    def ask(_: int) -> ctypes.CDLL | None:
        ready.wait()
        return native.library()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert found[0] is not None
    assert all(kernel is found[0] for kernel in found)
    assert calls(tmp_path) == 1


@needs_kernel
def test_a_user_without_a_home_compiles_for_each_process(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("CHARLM_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    with caplog.at_level(logging.INFO):
        assert native.library() is not None
    assert "there is no home directory for the cache" in caplog.text


def test_on_windows_there_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert native.library() is None
    assert native.why_no_library() == "it is written for POSIX threads, which Windows does not have"


@pytest.mark.parametrize(
    ("platform", "found", "has_tools", "is_taken"),
    [
        ("darwin", "/usr/bin/cc", False, False),
        ("darwin", "/usr/bin/cc", True, True),
        ("darwin", "/opt/bin/clang", False, True),
        ("linux", "/usr/bin/cc", False, True),
    ],
)
def test_the_compiler_of_macos_is_taken_only_where_apple_s_tools_are(
    platform: str, found: str, has_tools: bool, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them /usr/bin/cc opens a window that offers to install them."""

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        assert command == ["/usr/bin/xcode-select", "--print-path"]
        return subprocess.CompletedProcess(command, 0 if has_tools else 2)

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(shutil, "which", lambda name: found)
    monkeypatch.setattr(subprocess, "run", run)
    assert native._compiler() == ([found] if is_taken else "no C compiler was found (cc, gcc or clang)")


@needs_kernel
def test_where_the_processor_does_not_tell_its_name_the_machine_s_is_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_text = Path.read_text

    def without_proc(self: Path, *args: str, **kwargs: str) -> str:
        if self == Path("/proc/cpuinfo"):
            raise FileNotFoundError(self)
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", without_proc)
    assert native.library() is not None
