"""A run's directory: run.json, the lock, and where the log and the checkpoints lie.

RUN/run.json         run id, format, creation time; written once
RUN/.lock            held while a process trains here; a courtesy, correctness never depends on it
RUN/metrics.jsonl    see log.py
RUN/checkpoints/     see checkpoint.py
RUN/train.json       what `charlm train` was asked for; cli/rundir.py writes it
RUN/ngram/           a saved model: the baseline that the command line counts
RUN/tensorboard/, RUN/wandb/   what these loggers write; no part of the run's state
RUN/mixture/         a saved model: the result of the command line, if not a checkpoint's; see choosing.py
RUN/abandoned-*.jsonl   the log of a run that ended before its first checkpoint, and was begun anew
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import secrets
import threading
from pathlib import Path

from charlm.errors import (
    CheckpointError,
    CheckpointWriteError,
    FileFormatError,
    RunExistsError,
    RunLockedError,
    quoted,
)
from charlm.files import strict_json
from charlm.files.atomic import (
    is_left_behind,
    make_directory,
    remove_directory,
    remove_file,
    rename_file,
    write_file,
)
from charlm.files.reading import read_file, refusal

try:
    import fcntl
except ImportError:  # Windows has none; there, two trainers in one directory go unnoticed
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunDirectory", "has_checkpoints", "is_leftover"]

FORMAT, VERSION = "charlm.run", 1
RECORD_FILE, RECORD_FORMAT, RECORD_VERSION = "train.json", "charlm.train", 1
_MODELS = ("ngram", "mixture")
SERVICE_FOLDERS = ("tensorboard", "wandb")
_OWN = {"run.json", ".lock", "metrics.jsonl", "checkpoints", RECORD_FILE, *_MODELS, *SERVICE_FOLDERS}
_ABANDONED_LOG = re.compile(r"abandoned-[0-9a-f]{16}\.jsonl")


class RunDirectory:
    """One training run on disk.

    Attributes:
        path: the directory.
        run_id: written into every part of every checkpoint, so that parts of two runs cannot be mixed.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self.path = path
        self.run_id = run_id
        self.metrics: Path = path / "metrics.jsonl"
        self.checkpoints: Path = path / "checkpoints"
        self._lock: int | None = None

    @staticmethod
    def is_free(path: Path) -> bool:
        """Return whether a new run may begin at `path`: it is missing or empty.

        What a run leaves that ended before its first checkpoint, or while it was deleted, does not count.
        """
        if not path.is_dir():
            return not os.path.lexists(path)
        names = {entry.name for entry in path.iterdir() if not is_leftover(entry.name)}
        has_begun = not names <= {".lock", "checkpoints"}
        return not has_checkpoints(path) and (not has_begun or RunDirectory.abandoned(path) is not None)

    @classmethod
    def abandoned(cls, path: Path) -> RunDirectory | None:
        """Return the run that lies at `path`, if it has no checkpoint and nobody has put other files there.

        There is nothing to go on with, so it is begun anew.
        """
        try:
            run = cls.open(path)
        except (CheckpointError, FileFormatError):
            return None
        names = {entry.name for entry in path.iterdir() if not is_leftover(entry.name)}
        return run if names <= _OWN and not has_checkpoints(path) else None

    @classmethod
    def refuse_if_taken(cls, path: Path) -> None:
        """Raise RunExistsError unless a new run may begin at `path`."""
        if os.path.lexists(path) and not path.is_dir():
            raise RunExistsError(f"{quoted(str(path))} is no directory. Choose another name for the run.")
        if not cls.is_free(path):
            way = "Choose another directory."
            if (path / "run.json").is_file() and has_checkpoints(path):
                way = "Resume the run there (Trainer.resume, or --resume), or choose another directory."
            raise RunExistsError(f"{quoted(str(path))} is not empty. {way}")

    @classmethod
    def refuse_if_training(cls, path: Path) -> None:
        """Raise RunLockedError if a process or trainer trains at `path` now, as far as locks tell."""
        if (path / ".lock").is_file():
            run = cls(path, "")
            try:
                run.lock()
            finally:
                run.unlock()

    @classmethod
    def new(cls, path: Path) -> RunDirectory:
        """Return a run that is not on disk yet, for `begin`."""
        return cls(path, secrets.token_hex(8))

    @classmethod
    def create(cls, path: Path) -> RunDirectory:
        """Begin a new run, as `begin` does, and give the lock back."""
        run = cls.new(path)
        try:
            run.begin()
        finally:
            run.unlock()
        return run

    def begin(self) -> None:
        """Begin a new run in a directory that is missing or empty, or whose run ended before its first save.

        The lock is taken then, and whatever is raised, it is for the caller to give it back. Taken again
        later, it might be with another process just then, one that is about to find that the run has begun;
        and neither of the two would train.

        Raises:
            RunExistsError: it holds something, perhaps since a moment ago.
            RunLockedError: another process or trainer is beginning a run there.
            CheckpointWriteError: it could not be written.
        """
        self.refuse_if_taken(self.path)
        created = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        values = {"format": FORMAT, "version": VERSION, "run_id": self.run_id, "created": created}
        try:
            make_directory(self.path)
            self.lock()
            self.refuse_if_taken(self.path)  # once more, now that nobody else can begin
            abandoned = self.abandoned(self.path)
            if abandoned is not None:
                if self._lock is None:  # then it may as well be one that is training, and has not saved yet
                    raise RunExistsError(
                        f"{quoted(str(self.path))} holds a run without a checkpoint, and no lock tells here "
                        "whether a process still trains in it. Delete it, or choose another directory."
                    )
                abandoned._make_room()
            make_directory(self.checkpoints)
            write_file(self.path / "run.json", strict_json.dumps(values))
        except (RunExistsError, RunLockedError):
            raise
        except OSError as error:
            raise CheckpointWriteError(
                f"cannot make a run in {quoted(str(self.path))}: {error}", errno=error.errno
            ) from error

    def _make_room(self) -> None:
        """Take away what a run without a checkpoint has written; its log is kept under another name."""
        if self.metrics.is_file():
            rename_file(self.metrics, f"abandoned-{self.run_id}.jsonl")
        if (self.path / RECORD_FILE).is_file():
            remove_file(self.path / RECORD_FILE)
        for folder in (self.path / name for name in _MODELS):
            if folder.is_dir():
                remove_directory(folder, folder)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open a run that exists.

        Raises:
            CheckpointError: there is no run.
            FileFormatError: run.json is refused, or a directory of the run is a link that leads out of it.
        """
        file = path / "run.json"
        try:
            data = read_file(file, max_bytes=256 * 1024)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"no run in {quoted(str(path))}: it has no run.json") from error
        values = strict_json.loads(data, path=str(file))
        strict_json.check_version(values, FORMAT, VERSION, path=str(file))
        for folder in (path / name for name in ("checkpoints", *_MODELS)):
            if folder.is_symlink():
                raise refusal(
                    folder, "must be a directory, got a symbolic link. Link to the whole run instead."
                )
        return cls(path, strict_json.take(values, "run_id", str, path=str(file)))

    def lock(self) -> None:
        """Take the lock; the operating system gives it back if the process dies, whatever children it has.

        Raises:
            RunLockedError: another process or trainer has it.
        """
        if fcntl is None or self._lock is not None:
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        with _forking:
            self._lock = os.open(self.path / ".lock", flags, 0o666)
            _locked.add(self)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.unlock()
            raise RunLockedError(
                f"another process or trainer is training in {quoted(str(self.path))}"
            ) from error
        except OSError:  # some network file systems have no locks; the lock is a courtesy
            self.unlock()

    def unlock(self) -> None:
        """Give the lock back."""
        if fcntl is not None and self._lock is not None:  # also for a child that is being forked
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._close_lock()

    def _close_lock(self) -> None:
        with _forking:
            _locked.discard(self)
            descriptor, self._lock = self._lock, None
            if descriptor is not None:
                with contextlib.suppress(OSError):  # it is closed all the same
                    os.close(descriptor)


def is_leftover(name: str) -> bool:
    """Return whether a file of this name is what a killed process, or a run that was begun anew, has left."""
    return is_left_behind(name) or _ABANDONED_LOG.fullmatch(name) is not None


def has_checkpoints(path: Path) -> bool:
    """Return whether a run's directory holds checkpoints, whole or damaged."""
    folder = path / "checkpoints"
    return folder.is_dir() and not all(is_left_behind(entry.name) for entry in folder.iterdir())


_locked: set[RunDirectory] = set()
_forking = threading.RLock()  # held while a process is forked, and while a lock is opened or closed


def _leave_locks_to_the_parent() -> None:
    """Close in a forked process what would keep the locks of its parent when that is dead."""
    for run in list(_locked):
        run._close_lock()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_forking.acquire,
        after_in_parent=_forking.release,
        after_in_child=_leave_locks_to_the_parent,
    )
