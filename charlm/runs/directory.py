"""A run's directory: run.json, the lock, and the places of the log and the checkpoints.

RUN/run.json         run id, format, creation time; written once
RUN/.lock            held while a process trains here; correctness never depends on it
RUN/metrics.jsonl    see log.py
RUN/checkpoints/     see checkpoint.py
RUN/train.json       the arguments of `charlm train`; cli/rundir.py writes it
RUN/ngram/           a saved model: the n-gram baseline of the command line
RUN/tensorboard/, RUN/wandb/   files of these loggers; not part of the run's state
RUN/mixture/         a saved model: the mixture, if it is the result of the command line; see choosing.py
RUN/abandoned-*.jsonl   the log of an earlier run that ended before its first checkpoint
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
except ImportError:  # Windows has none: there, two trainers in one directory are not noticed
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunDirectory", "has_checkpoints", "is_leftover", "runs_in"]

FORMAT, VERSION = "charlm.run", 1
RECORD_FILE, RECORD_FORMAT, RECORD_VERSION = "train.json", "charlm.train", 1
_MODELS = ("ngram", "mixture")
SERVICE_FOLDERS = ("tensorboard", "wandb")
_OWN = {"run.json", ".lock", "metrics.jsonl", "checkpoints", RECORD_FILE, *_MODELS, *SERVICE_FOLDERS}
_MOST_NAMED = 3  # runs in a message
_ABANDONED_LOG = re.compile(r"abandoned-[0-9a-f]{16}\.jsonl")


class RunDirectory:
    """One training run on disk.

    Attributes:
        path: the directory.
        run_id: part of every file of every checkpoint, so that files of two runs cannot be mixed.
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

        The remains of a run without a checkpoint do not count.
        """
        if not path.is_dir():
            return not os.path.lexists(path)
        names = {entry.name for entry in path.iterdir() if not is_leftover(entry.name)}
        has_begun = not names <= {".lock", "checkpoints"}
        return not has_checkpoints(path) and (not has_begun or RunDirectory.abandoned(path) is not None)

    @classmethod
    def abandoned(cls, path: Path) -> RunDirectory | None:
        """Return the run at `path` if it has no checkpoint and no foreign files; it cannot be resumed."""
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
        """Raise RunLockedError if a process or trainer holds the lock of the run at `path`."""
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
        """Begin a new run, as `begin` does, and release the lock."""
        run = cls.new(path)
        try:
            run.begin()
        finally:
            run.unlock()
        return run

    def begin(self) -> None:
        """Begin a new run in a directory that is missing or empty, or whose run has no checkpoint.

        This takes the lock, and the caller releases it, also after an error. If it were released and taken
        again here, another process might hold it just then to check the directory, and neither would train.

        Raises:
            RunExistsError: the directory holds something, perhaps since a moment ago.
            RunLockedError: another process or trainer is beginning a run there.
            CheckpointWriteError: it could not be written.
        """
        self.refuse_if_taken(self.path)
        created = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        values = {"format": FORMAT, "version": VERSION, "run_id": self.run_id, "created": created}
        try:
            make_directory(self.path)
            self.lock()
            self.refuse_if_taken(self.path)  # once more, now that no other process can begin
            abandoned = self.abandoned(self.path)
            if abandoned is not None:
                if self._lock is None:  # without locks, a process may be training that has not saved yet
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
        """Delete the files of a run without a checkpoint; its log gets another name."""
        if self.metrics.is_file():
            rename_file(self.metrics, f"abandoned-{self.run_id}.jsonl")
        if (self.path / RECORD_FILE).is_file():
            remove_file(self.path / RECORD_FILE)
        for folder in (self.path / name for name in _MODELS):
            if folder.is_dir():
                remove_directory(folder, folder)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run.

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
        """Take the lock; the operating system releases it when the process dies, even if children live on.

        Raises:
            RunLockedError: another process or trainer has it.
        """
        if fcntl is None or self._lock is not None:
            return
        descriptor = self._open_lock()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.unlock()
            raise RunLockedError(
                f"another process or trainer is training in {quoted(str(self.path))}"
            ) from error
        except OSError:  # some network file systems have no locks
            self.unlock()

    def unlock(self) -> None:
        """Release the lock."""
        if fcntl is not None and self._lock is not None:  # LOCK_UN also works if a child is being forked
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._close_lock()

    def _open_lock(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        with _forking:
            self._lock = os.open(self.path / ".lock", flags, 0o666)
            _locked.add(self)
            return self._lock

    def _close_lock(self) -> None:
        with _forking:
            _locked.discard(self)
            descriptor, self._lock = self._lock, None
            if descriptor is not None:
                with contextlib.suppress(OSError):  # it is closed all the same
                    os.close(descriptor)


def is_leftover(name: str) -> bool:
    """Return whether this is the name of a remainder of a killed process or an abandoned run."""
    return is_left_behind(name) or _ABANDONED_LOG.fullmatch(name) is not None


def has_checkpoints(path: Path) -> bool:
    """Return whether a run's directory holds checkpoints, whole or damaged."""
    folder = path / "checkpoints"
    return folder.is_dir() and not all(is_left_behind(entry.name) for entry in folder.iterdir())


def runs_in(directory: Path) -> str:
    """Return which runs stand in a directory, to be named instead of it; an empty string: none."""
    if not directory.is_dir():
        return ""
    runs = sorted(entry.name for entry in directory.iterdir() if (entry / "run.json").is_file())
    more = f" and {len(runs) - _MOST_NAMED:,} more" * (len(runs) > _MOST_NAMED)
    names = ", ".join(quoted(str(directory / name)) for name in runs[:_MOST_NAMED])
    return f"holds {names}{more}" if runs else ""


_locked: set[RunDirectory] = set()
_forking = threading.RLock()  # held during a fork, and while a lock is opened or closed


def _leave_locks_to_the_parent() -> None:
    """Close the lock files in a forked process, which would keep the locks when the parent is dead."""
    for run in list(_locked):
        run._close_lock()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_forking.acquire,
        after_in_parent=_forking.release,
        after_in_child=_leave_locks_to_the_parent,
    )
