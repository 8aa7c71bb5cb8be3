"""The command as a process of its own: signals, pipes, terminals, encodings."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.command import ROOT, TINY, Command, await_handlers, end_at_once, environment, start, text_file
from harness.warm import WarmPython

import charlm
from charlm import BigramLM, ByteTokenizer, CharLM
from charlm.cli.__main__ import main
from charlm.cli.output import Console, _discard
from charlm.cli.signals import Interrupted, Signals
from charlm.runs.checkpoint import list_checkpoints, verify_checkpoint
from charlm.terminal import wants_bar

pytestmark = pytest.mark.slow

ENDLESS = (*TINY, "--max-steps", "100000000", "--eval-interval", "50")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("process")
    assert main(["train", str(text_file(folder)), "-o", str(folder / "run"), *TINY, "-q"]) == 0
    return folder


def wait_for(process: subprocess.Popen[bytes], text: bytes) -> bytes:
    """Read the process's standard error up to a text."""
    assert process.stderr is not None
    read = b""
    while text not in read:
        line = process.stderr.readline()
        assert line, read
        read += line
    return read


@contextlib.contextmanager
def training(
    folder: Path, name: str, *flags: str, python: WarmPython | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a training that would take hours."""
    words = ("train", str(folder / "text.txt"), "-o", str(folder / name), *ENDLESS, *flags)
    process = start(*words, python=python)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_ctrl_c_that_comes_twice_at_once_counts_once(folder: Path, warm_python: WarmPython) -> None:
    out = folder / "at once"
    # A step takes half a second, so that both signals meet one.
    with training(
        folder, out.name, "--eval-interval", "1", "--accumulate", "1000", python=warm_python
    ) as process:
        wait_for(process, b"step ")
        time.sleep(0.15)  # for the save: the next step is under way
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
        process.send_signal(signal.SIGINT)  # as `timeout` passes it on to its group
        stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (130, b"")
    assert b"stopping after this step, and saving; Ctrl-C ends at once\n" in stderr
    said = re.search(rb"stopped after step ([\d,]+) of", stderr)
    assert said is not None
    assert list_checkpoints(out)[-1].step == int(said[1].replace(b",", b""))


def test_a_second_ctrl_c_ends_at_once_and_damages_nothing(folder: Path, warm_python: WarmPython) -> None:
    out = folder / "twice"
    # A step takes more than a second.
    with training(
        folder, out.name, "--eval-interval", "1", "--accumulate", "2500", python=warm_python
    ) as process:
        wait_for(process, b"step ")
        time.sleep(0.3)  # for the save: the next step is under way
        process.send_signal(signal.SIGINT)
        wait_for(process, b"stopping after this step")  # at once, in the middle of the step
        time.sleep(0.15)
        seconds, stderr = end_at_once(process)
        assert seconds < 1
    assert process.returncode == 130
    assert b"saved" not in stderr
    checkpoints = list_checkpoints(out)
    assert checkpoints
    assert all(verify_checkpoint(info.path) == info for info in checkpoints)
    assert charlm.load(out).tokenizer.vocab_size > 9


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_training_ends_the_command_quietly(
    folder: Path, number: signal.Signals, code: int
) -> None:
    early = f"early {number.name}"
    process = start("train", "-", "-o", str(folder / early), *TINY, stdin=subprocess.PIPE)
    await_handlers(process)
    time.sleep(random.random() / 2)  # waits for its text
    process.send_signal(number)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == code
    assert not stderr
    with training(folder, early) as process:
        await_handlers(process)
        time.sleep(random.random() / 2)  # loads torch
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == code
    assert b"Traceback" not in stderr
    assert b"error" not in stderr


def test_a_closed_pipe_ends_quietly(folder: Path) -> None:
    with start("generate", str(folder / "run"), "-n", "1000000") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=300) == 0


def test_a_reader_that_leaves_standard_error_does_not_stop_a_training(
    folder: Path, warm_python: WarmPython
) -> None:
    with start(
        "train", str(folder / "text.txt"), "-o", str(folder / "unread"), *TINY, python=warm_python
    ) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(timeout=300) == 0
    assert charlm.load(folder / "unread").tokenizer.vocab_size > 9


def test_a_full_disk_is_an_error(folder: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        process = start("info", str(folder / "run"), stdout=full.fileno())
        assert process.communicate(timeout=300)[1] == b"charlm: error: No space left on device\n"
        assert process.returncode == 1


def test_everything_can_be_written_in_an_ascii_locale(tmp_path: Path) -> None:
    text = tmp_path / "größe.txt"
    text.write_bytes("Größe 😀\n".encode() * 200)
    env = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    process = start("train", str(text), "-o", str(tmp_path / "läuft"), *TINY, env=env)
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (0, b""), stderr
    assert stderr.startswith(b"text    ")
    process = start("generate", str(tmp_path / "läuft"), "-p", "ö😀", "-n", "0", env=env)
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout, stderr) == (0, rb"\xf6\U0001f600" + b"\n", b"")


def on_a_terminal(
    python: WarmPython, *args: str, columns: int = 90, stream: str = "stderr", **variables: str
) -> tuple[int, str]:
    """Run the command with one stream on a pseudo-terminal: its exit code and what it wrote there."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    process = start(*args, env=environment(TERM="xterm", **variables), python=python, **{stream: slave})
    os.close(slave)
    written = b""
    with contextlib.suppress(OSError):  # EIO once the other end is closed
        while piece := os.read(master, 65536):
            written += piece
    os.close(master)
    process.communicate(timeout=300)
    return process.returncode, written.decode()


ODD = "\x1b[2J\x07\r\b\x9b1A\x7f\x85\u2028\u202e\u2066 \u3000\u200c\xa0\u200d\té한\n"
SAFE = "\\x1b[2J\\x07\\r\\x08\\x9b1A\\x7f\\x85\\u2028\\u202e\\u2066 \u3000\u200c\xa0\u200d\té한\n"


def test_what_would_move_the_cursor_is_escaped_for_a_terminal_and_exact_for_a_pipe(
    tmp_path: Path, warm_python: WarmPython
) -> None:
    CharLM(BigramLM(256), ByteTokenizer()).save(tmp_path / "bytes")
    (tmp_path / "prompt").write_bytes(ODD.encode())
    flags = ("generate", str(tmp_path / "bytes"), "--prompt-file", str(tmp_path / "prompt"), "-n", "0")
    for more, text in ((("--num-samples", "1"), ODD), (("--num-samples", "2"), f"{ODD}{'-' * 40}\n{ODD}")):
        process = start(*flags, *more, python=warm_python)
        assert process.communicate(timeout=300) == (text.encode(), b"")
        code, written = on_a_terminal(warm_python, *flags, *more, stream="stdout")
        assert (code, written.replace("\r\n", "\n")) == (0, text.replace(ODD, SAFE))


def test_no_name_moves_the_cursor(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, out, text = Command(capsys), tmp_path / "a\x1b[2J\rb", folder / "text.txt"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert command.train(text, "-o", out) == 0
    said = command.err
    assert command("eval", out, text, "--html", out / "page.html") == 0
    assert "a\\x1b[2J\\rb/page.html" in command.err
    said += command.err + command.out
    for words in (("info", out), ("inspect", text, f"--{out}"), ("info", out, out), ("info", "a\x1b")):
        command(*words)
        said += command.err + command.out
    assert "a\\x1b[2J\\rb" in command.out + said
    assert not {"\x1b", "\r"} & set(said)


def test_a_terminal_gets_a_bar_and_ci_gets_lines(folder: Path, warm_python: WarmPython) -> None:
    args = ("train", str(folder / "text.txt"), "-o", str(folder / "bar"), *TINY, "--overwrite")
    code, written = on_a_terminal(warm_python, *args)
    assert code == 0
    assert re.search(
        r"\r20/20 \d\d:\d\d<\d\d:\d\d, loss \d\.\d+, val \d\.\d+, \S+ chars/s \|#{9,}\|", written
    )
    plain = re.sub(r"\r[^\n]*\r", "", written.replace("\r\n", "\n"))
    assert len(re.findall(r"^step \d0  train loss", plain, re.MULTILINE)) == 2
    assert "\x1b[3" not in written  # no colours
    code, written = on_a_terminal(warm_python, *args, CI="true")
    assert code == 0
    assert "20/20" not in written
    assert len(re.findall(r"^step \d0  train loss", written, re.MULTILINE)) == 2


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (65, r"loss \d\.\d{4}, val \d\.\d{4}, \S+ chars/s"),
        (50, r"loss \d\.\d{4}, val \d\.\d{4}"),
        (40, r"loss \d\.\d{4}"),
        (25, ""),
    ],
)
def test_a_narrow_terminal_shows_fewer_numbers_and_none_of_them_cut(
    folder: Path, warm_python: WarmPython, columns: int, shown: str
) -> None:
    args = ("train", str(folder / "text.txt"), "-o", str(folder / f"bar {columns}"), *TINY)
    code, written = on_a_terminal(warm_python, *args, columns=columns)
    assert code == 0
    lines = re.findall(r"\r(20/20 [^\r]*)", written)  # a busy machine may draw the end twice
    assert 1 <= len(lines) <= 2
    for line in lines:
        bar = r"20/20 \d\d:\d\d<\d\d:\d\d" + (shown and f", {shown}") + r"( \|?#*\|?)?"
        assert re.fullmatch(bar, line), line
        assert len(line) < columns


def test_without_tqdm_a_terminal_gets_lines(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr("charlm.training.progress.wants_bar", lambda: True)
    command = Command(capsys)
    assert command.train(folder / "text.txt", "-o", folder / "plain") == 0
    assert "step 20  train loss" in command.err
    assert "20/20" not in command.err


def test_a_bar_is_shown_in_this_process_too(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("charlm.training.progress.wants_bar", lambda: True)
    command = Command(capsys)
    assert command.train(folder / "text.txt", "-o", folder / "inside") == 0
    assert "20/20 0" in command.err
    assert command("train", "--resume", "-o", folder / "inside", "--max-steps", "25") == 0
    assert "25/25 0" in command.err


def test_a_bar_moves_only_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wants_bar({})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert wants_bar({"TERM": "xterm", "CI": "false"})
    assert not wants_bar({"TERM": "dumb"})
    assert not wants_bar({"TERM": "xterm", "CI": "true"})


def test_handlers_come_back(folder: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["info", str(folder / "run")]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            signals.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_first_signal_raises_or_stops_and_the_next_ones_do_neither() -> None:
    with Signals() as signals, signals.raising():
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.exit_code == 143
        with pytest.raises(Interrupted):  # it came before the training could take it
            signals.stop_gently(lambda: None, lambda: None)
    stopped: list[str] = []
    with Signals() as signals:
        old = signal.signal(signal.SIGUSR1, lambda *_: None)  # somebody else's
        os.kill(os.getpid(), signal.SIGUSR1)
        signals.stop_gently(lambda: stopped.append("stop"), lambda: stopped.append("say"))
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        signal.signal(signal.SIGUSR1, old)
    assert sorted(stopped) == ["say", "stop"]


def test_every_ctrl_c_is_taken_where_somebody_wants_each_of_them() -> None:
    taken: list[int] = []
    with Signals() as signals, signals.raising():
        with signals.calling(lambda: taken.append(1)):
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.15)  # two of them would end the process
            assert (len(taken), signals.received) == (3, None)
            with pytest.raises(Interrupted):
                signal.raise_signal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert (len(taken), signals.exit_code) == (3, 143)


def test_a_signal_while_the_handlers_come_or_go_waits_for_the_command() -> None:
    """An exception there would leave handlers behind that take every later signal and do nothing."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)  # as between two of the command's contexts
        assert signals.received == signal.SIGTERM
        with pytest.raises(Interrupted), signals.raising():
            raise AssertionError("the command would begin")
    with Signals() as signals:
        with signals.raising():
            pass
        signal.raise_signal(signal.SIGINT)  # the command has ended
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_signals_no_longer_disturb_a_program_that_has_ended(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["charlm", "info", str(folder / "run")])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert main() == 0
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "checkpoints: " in capsys.readouterr().out


def test_an_error_that_a_signal_caused_is_no_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> str:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except Interrupted:
            raise ImportError("half a module") from None
        return ""

    monkeypatch.setattr("charlm.cli.encoded.load_corpus", interrupted)
    command = Command(capsys)
    assert command.train(folder / "text.txt", "-o", folder / "never") == 130
    assert not command.err


def test_the_library_s_warnings_are_lines(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = Command(capsys)
    assert command.train(folder / "text.txt", "-o", tmp_path / "run", "--keep-last", "2", "-q") == 0
    best = min(list_checkpoints(tmp_path / "run"), key=lambda info: info.val_loss or 9)
    (best.path / "model.safetensors").write_bytes(b"")
    assert command("generate", tmp_path / "run", "-n", "5") == 0
    assert command.err.startswith("charlm: warning: ")
    assert command.err.count("\n") == 1


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "charlm.cli", "train", "--help"],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "COVERAGE_PROCESS_CONFIG": "",
                "COVERAGE_PROCESS_START": "",
            },
            stdout=subprocess.DEVNULL,
            check=True,
        )
        after = os.times()  # of the processor: others may want it, too
        times.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert min(times) < 0.3


def test_a_stream_is_discarded_without_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    Console(quiet=True).say("nothing")
    with Path(os.devnull).open("w", encoding="utf-8") as stream:
        _discard(stream)
        stream.write("nowhere")


def test_a_signal_that_meets_a_destructor_is_not_lost_and_makes_no_noise(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Python cannot pass on what is raised there, and would only report it."""

    class Closing:
        def __init__(self, number: int) -> None:
            self.number = number

        def __del__(self) -> None:
            signal.raise_signal(self.number)

    class Failing:
        def __del__(self) -> None:
            raise ValueError("of the caller's own")

    reported: list[sys.UnraisableHookArgs] = []
    before = sys.unraisablehook
    sys.unraisablehook = reported.append
    try:
        signals = Signals()
        with signals, signals.raising():
            Closing(signal.SIGTERM)
            Failing()
            with pytest.raises(Interrupted):
                signals.check()
        assert sys.unraisablehook == reported.append
    finally:
        sys.unraisablehook = before
    assert signals.exit_code == 143
    assert [lost.exc_type for lost in reported] == [ValueError]
    assert capfd.readouterr().err == ""
