"""A run's directory: run.json, the lock, and where the log and the checkpoints lie.

RUN/run.json         run id, format, creation time; written once
RUN/.lock            held while a process trains here; a courtesy, correctness never depends on it
RUN/metrics.jsonl    see log.py
RUN/checkpoints/     see checkpoint.py
RUN/train.json       what `charlm train` was asked for; cli/rundir.py writes it
RUN/ngram/           a saved model: the baseline that the command line counts
"""

from __future__ import annotations

import datetime as dt
import os
import secrets
from pathlib import Path

from charlm.errors import CheckpointError, CheckpointWriteError, RunExistsError, RunLockedError, quoted
from charlm.files import strict_json
from charlm.files.atomic import is_left_behind, make_directory, write_file
from charlm.files.reading import read_file, refusal

try:
    import fcntl
except ImportError:  # Windows has none; there, two trainers in one directory go unnoticed
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunDirectory"]

FORMAT, VERSION = "charlm.run", 1
RECORD_FILE, RECORD_FORMAT, RECORD_VERSION = "train.json", "charlm.train", 1


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

        What a run leaves that was killed before it began, or while it was deleted, does not count.
        """
        if not path.is_dir():
            return not os.path.lexists(path)
        return all(
            entry.name == ".lock"
            or is_left_behind(entry.name)
            or (entry.name == "checkpoints" and entry.is_dir() and not any(entry.iterdir()))
            for entry in path.iterdir()
        )

    @classmethod
    def refuse_if_taken(cls, path: Path) -> None:
        """Raise RunExistsError unless a new run may begin at `path`."""
        if os.path.lexists(path) and not path.is_dir():
            raise RunExistsError(f"{quoted(str(path))} is no directory. Choose another name for the run.")
        if not cls.is_free(path):
            raise RunExistsError(
                f"{quoted(str(path))} is not empty. Resume the run there (Trainer.resume, or --resume), "
                "or choose another directory."
            )

    @classmethod
    def create(cls, path: Path, *, keep_lock: bool = False) -> RunDirectory:
        """Begin a new run in a directory that is missing or empty.

        Args:
            path: the directory.
            keep_lock: return with the lock taken. Taken again later, it might be with another process just
                then, one that is about to find that the run has begun; and neither of the two would train.

        Raises:
            RunExistsError: it holds something, perhaps since a moment ago.
            RunLockedError: another process is beginning a run there.
            CheckpointWriteError: it could not be written.
        """
        cls.refuse_if_taken(path)
        run, begun = cls(path, secrets.token_hex(8)), False
        created = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        values = {"format": FORMAT, "version": VERSION, "run_id": run.run_id, "created": created}
        try:
            make_directory(path)
            run.lock()
            cls.refuse_if_taken(path)  # once more, now that nobody else can begin
            make_directory(run.checkpoints)
            write_file(path / "run.json", strict_json.dumps(values))
            begun = True
        except (RunExistsError, RunLockedError):
            raise
        except OSError as error:
            raise CheckpointWriteError(
                f"cannot make a run in {quoted(str(path))}: {error}", errno=error.errno
            ) from error
        finally:
            if not (begun and keep_lock):
                run.unlock()
        return run

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
        for folder in (path / "checkpoints", path / "ngram"):
            if folder.is_symlink():
                raise refusal(
                    folder, "must be a directory, got a symbolic link. Link to the whole run instead."
                )
        return cls(path, strict_json.take(values, "run_id", str, path=str(file)))

    def lock(self) -> None:
        """Take the lock; the operating system gives it back if the process dies.

        Raises:
            RunLockedError: another process has it.
        """
        if fcntl is None or self._lock is not None:
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        self._lock = os.open(self.path / ".lock", flags, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.unlock()
            raise RunLockedError(f"another process is training in {quoted(str(self.path))}") from error
        except OSError:  # some network file systems have no locks; the lock is a courtesy
            self.unlock()

    def unlock(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
