"""Something else in the place of a file is refused at once; nothing is executed or opened elsewhere.

Pickles that run a command, links, pipes, sockets, devices, directories and sparse files stand in the place of
each file of a run and of a saved model, and every public door is opened on them, in a process of its own
whose audit hook (PEP 578) sees all that is opened, imported, executed or started. What the hook sees must
lie inside the directory. `python tests/reliability/test_strange_files.py FOLDER TRIALS SEED` is that process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import typing
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from harness.campaign import Campaign
from harness.command import ROOT, TINY, environment, text_file
from harness.hostile_files import fast_folder, reseal

pytestmark = pytest.mark.slow

SECONDS = 1.0
MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")
CHECKPOINT_FILES = (*MODEL_FILES, "train.safetensors", "state.json", "manifest.json")
RUN_FILES = ("run.json", "metrics.jsonl")
REGULAR = ("a pickle", "a zip of a pickle", "a torch.save", "a sparse terabyte", "nothing readable")
OTHER = (
    *("a pipe", "/dev/zero", "/dev/full", "a directory", "a link to nowhere", "a link to itself"),
    *("a link to /etc/passwd", "a link to the file itself, outside", "a link to a pipe", "a socket"),
)
# Which files each door must refuse to take from a stranger; it may refuse more.
READ_BY = {
    "load(model)": MODEL_FILES,
    "GPT.load(model)": ("config.json", "model.safetensors"),
    "CharTokenizer.load": ("tokenizer.json",),
    "load(checkpoint)": CHECKPOINT_FILES,
    "load(run)": (*CHECKPOINT_FILES, "run.json"),
    "Trainer.resume": (*CHECKPOINT_FILES, "run.json"),
    "charlm info MODEL": ("config.json", "tokenizer.json"),
    "charlm info": ("run.json", "config.json", "tokenizer.json", "state.json"),
    "charlm info --verify": (*CHECKPOINT_FILES, "run.json"),
    "charlm train --resume": (*CHECKPOINT_FILES, "run.json"),
    "charlm generate": (*CHECKPOINT_FILES, "run.json"),
}
LINK = "the checkpoint"
# What leads nowhere is a missing file to those that look; they show what there is, and what is damaged.
MISSING = ("a link to nowhere", "a link to itself", "a link to a directory")
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.spawn", "pty.spawn", "exec"),
    *("subprocess.Popen", "pickle.find_class", "marshal.loads", "marshal.load", "socket.connect", "import"),
    *("shutil.unpack_archive", "ctypes.dlopen", "code.__new__", "os.link", "os.symlink", "os.chmod"),
)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.target}",)


def put(kind: str, path: Path, outside: Path) -> bool:
    """Put it in the place of the file; False where only the superuser can, or where he sees no difference."""
    bomb = Bomb(outside / "exploded")
    content = path.read_bytes()
    path.unlink()
    if kind == "a pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif kind == "a zip of a pickle":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(bomb))
    elif kind == "a torch.save":
        import torch

        torch.save({"model": bomb}, path)
    elif kind == "a sparse terabyte":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "nothing readable":
        path.write_bytes(content)
        path.chmod(0)
        return os.geteuid() != 0
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind.startswith("/dev/"):
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, Path(kind).stat().st_rdev)
        except PermissionError:
            return False
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a socket":
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
        os.chdir(here)
    else:
        (outside / "content").write_bytes(content)
        targets = {"nowhere": "nowhere", "itself": path.name, "/etc/passwd": "/etc/passwd", "a pipe": "pipe"}
        target = targets.get(kind.removeprefix("a link to "), "content")
        path.symlink_to(outside / target if target in {"pipe", "content"} else target)
    return True


def doors(folder: Path, text: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield every public door by its name."""
    import charlm
    from charlm import GPT, BlockDataset, CharTokenizer, Trainer
    from charlm.cli.__main__ import main

    run, model = folder / "run", folder / "model"
    checkpoint = next((run / "checkpoints").iterdir())

    def command(*words: str | Path) -> None:
        written = io.StringIO()
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            code = main([str(word) for word in words])
        if code:
            said = written.getvalue().strip().split("\n")[-1]
            raise charlm.CharLMError(said) if "(--debug shows where)" not in said else AssertionError(said)

    def resume() -> None:
        tokenizer = CharTokenizer.from_text(text.read_text(encoding="utf-8"))
        data = BlockDataset.from_text(text.read_text(encoding="utf-8"), tokenizer, 16)
        train, val = data.split(0.9)
        Trainer.resume(run, train, val_data=val, device="cpu")

    yield "load(model)", lambda: charlm.load(model, device="cpu")
    yield "GPT.load(model)", lambda: GPT.load(model)
    yield "CharTokenizer.load", lambda: CharTokenizer.load(model / "tokenizer.json")
    yield "load(checkpoint)", lambda: charlm.load(checkpoint, device="cpu")
    yield "load(run)", lambda: charlm.load(run, device="cpu")
    yield "Trainer.resume", resume
    yield "charlm info MODEL", lambda: command("info", model)
    yield "charlm info", lambda: command("info", run)
    yield "charlm info --verify", lambda: command("info", "--verify", run)
    yield "charlm generate", lambda: command("generate", run, "-n", "3", "--seed", "1", "--device", "cpu")
    yield "charlm train --resume", lambda: command("train", "-q", "--resume", "-o", run, "--max-steps", "21")


class Watch:
    """Keeps what the audit hook sees while it is switched on."""

    def __init__(self, allowed: Path, text: Path) -> None:
        self.on = False
        self.seen: list[str] = []
        self.opened = 0
        system = ("/dev/null", "/proc/", "/sys/fs/cgroup/")  # how much memory there is, and may be used
        self._allowed = (str(allowed) + "/", str(text), *system, *map(str, _libraries()))
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and not isinstance(args[0], int):
            self.opened += 1
            path = os.fsdecode(args[0])
            if path in MODEL_FILES and args[2] & os.O_NOFOLLOW:
                return  # in a directory that is open, and was seen here when it was opened
            # Where a path ends is looked at here; that a last link is refused, the flags must say.
            parent = os.path.realpath(os.path.dirname(path))  # noqa: PTH120 - quick
            if not f"{parent}/{os.path.basename(path)}".startswith(self._allowed):  # noqa: PTH119
                self.seen.append(f"open of {path}")
            elif not args[2] & os.O_NOFOLLOW and os.path.islink(path):  # noqa: PTH114
                self.seen.append(f"open of the link {path}")
        elif event == "exec" and sys._getframe(1).f_code.co_filename == typing.__file__:
            pass  # the package's own annotations, which are texts until someone asks for them
        elif event in FORBIDDEN:
            self.seen.append(f"{event} {str(args)[:80]}")


def _libraries() -> set[Path]:
    import torch

    return {Path(os.__file__).parent, Path(torch.__file__).parents[1], ROOT / "charlm", Path(sys.prefix)}


class TooLong(BaseException):
    """A door was waited at for too long."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise TooLong


def attempt(call: Callable[[], object]) -> tuple[str, float]:
    """Return how a call ended, and after how long."""
    from charlm.errors import CharLMError

    began = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        call()
        ended = "accepted"
    except (CharLMError, OSError, TypeError) as error:
        ended = "refused" if str(error).isprintable() else f"a message with control characters: {error}"
    except (Exception, TooLong) as error:  # noqa: BLE001 - what must not be is reported
        ended = f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ended, time.perf_counter() - began


def prepare(folder: Path) -> Path:
    """Train a run with the command, leave one checkpoint of it, save its model, and return the text."""
    import charlm
    from charlm.cli.__main__ import main

    text = text_file(folder)
    flags = ("-q", "--no-baseline", "-o", str(folder / "run"))
    if main(["train", *TINY, *flags, str(text)]):
        raise AssertionError("the run cannot be made")
    charlm.load(folder / "run", device="cpu").save(folder / "model")
    *others, _ = sorted((folder / "run" / "checkpoints").iterdir())
    for other in others:
        shutil.rmtree(other)
    return text


def child(folder: Path, trials: int, seed: int) -> None:
    """Take the strange files through the doors; a line of JSON for each call."""
    import warnings

    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _interrupt)
    good, work, outside = folder / "good", folder / "work", folder / "outside"
    good.mkdir()
    outside.mkdir()
    os.mkfifo(outside / "pipe")
    text = prepare(good)
    watch = Watch(work, text)
    everything = [(n, k) for n in (*CHECKPOINT_FILES, *RUN_FILES) for k in (*REGULAR, *OTHER)]
    random.Random(seed).shuffle(everything)
    chosen = [("nothing", "warm-up"), (LINK, "a link to a directory"), *everything[:trials]]
    for name, kind in [*chosen, ("nothing", "check")]:
        for door in range(len(READ_BY)):
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(good, work)
            *_, checkpoint = (work / "run" / "checkpoints").iterdir()
            if name == LINK:
                shutil.copytree(checkpoint, outside / checkpoint.name, dirs_exist_ok=True)
                shutil.rmtree(checkpoint)
                checkpoint.symlink_to(outside / checkpoint.name)
            else:
                places = [base / name for base in (checkpoint, work / "model", work / "run")]
                places = [path for path in places if path.exists()]
                can = [put(kind, path, outside) for path in places]
                if not all(can):
                    break
                if kind in {"a pickle", "a zip of a pickle", "a torch.save"} and name in CHECKPOINT_FILES[:5]:
                    reseal(checkpoint)  # so that the bytes reach the parsers
            where, call = list(doors(work, text))[door]
            for _ in range(3):
                watch.on, watch.seen, watch.opened = kind != "warm-up", [], 0
                ended, seconds = attempt(call)
                watch.on = False
                if seconds <= SECONDS or ended != "refused":  # the machine may be busy
                    break
            exploded = (outside / "exploded").exists()
            seen = watch.seen[:5] + ["the bomb"] * exploded
            print(json.dumps([name, kind, where, ended, seconds, seen, watch.opened]), flush=True)


def test_strange_files_are_refused_at_once_and_nothing_outside_is_touched(campaign: Campaign) -> None:
    folder = fast_folder()
    process = subprocess.run(
        [sys.executable, __file__, str(folder), str(campaign.trials(short=15)), str(campaign.seed)],
        # With GOMP_SPINCOUNT set, a command on a busy machine asks no library to start a team of threads.
        env=environment(
            PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}", CHARLM_NATIVE="0", GOMP_SPINCOUNT="0"
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(folder)
    assert process.returncode == 0, process.stderr[-3000:]
    problems = []
    for line in process.stdout.splitlines():
        name, kind, door, ended, seconds, seen, opened = json.loads(line)
        what = f"{kind} in the place of {name}, {door}"
        campaign.counted("calls")
        campaign.counted("refusals", ended == "refused")
        campaign.counted("files opened", opened)
        problems += [f"{what}: {event}" for event in seen]
        if ended not in {"accepted", "refused"}:
            problems.append(f"{what}: {ended}")
        elif name == "nothing" and ended != "accepted":
            problems.append(f"{what}: refused")
        elif ended == "accepted" and (
            name in READ_BY[door] or (name == LINK and "run.json" in READ_BY[door])
        ):
            missing = door in {"charlm info", "charlm info MODEL"} and kind in MISSING  # which is not damaged
            if not missing:
                problems.append(f"{what}: accepted")
        if ended == "refused" and seconds > SECONDS:
            problems.append(f"{what}: refused after {seconds:.1f} s")
    assert not problems, f"seed {campaign.seed}:\n" + "\n".join(problems)


if __name__ == "__main__":
    child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
