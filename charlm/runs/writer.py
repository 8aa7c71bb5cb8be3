"""`RunWriter`: writes a run to disk, and handles errors of the disk.

The trainer gathers the content. Training does not end because of a log line, an old checkpoint that cannot be
deleted, or a single save that fails; it ends when saving fails three times in a row.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from charlm.errors import CharLMError, CheckpointError, CheckpointWriteError, RunLockedError, quoted, warn
from charlm.files.atomic import Content
from charlm.runs.checkpoint import CheckpointInfo, SaveIdentity, checkpoint_names, write_checkpoint
from charlm.runs.directory import RunDirectory
from charlm.runs.log import MetricsLog
from charlm.runs.retention import prune_checkpoints, remove_leftovers

__all__ = ["RunWriter"]

_MOST_FAILED_SAVES = 3


class RunWriter:
    """Writes the log and the checkpoints of one run.

    A save is a block of `saving` with a call of `write`, and then of `prune`.

    Args:
        directory: of the run; made when it is first needed.
        run: the existing run, in a resume.
        resumed_from: the checkpoint of the resume.
        known: names of the checkpoints that were there before it was read.

    Attributes:
        saved_step: the step of the last checkpoint, or None.
    """

    saved_step: int | None

    def __init__(
        self,
        directory: Path,
        run: RunDirectory | None = None,
        resumed_from: CheckpointInfo | None = None,
        known: Collection[str] = (),
    ) -> None:
        self._directory = directory
        self._run = run
        self.saved_step = None if resumed_from is None else resumed_from.step
        self._known = {*known} if resumed_from is None else {*known, resumed_from.path.name}
        self._log: MetricsLog | None = None
        self._failed_saves = 0

    def begin(self, step: int) -> None:
        """Take the lock, clean up after killed saves, and open the log, cut back to `step`.

        Raises:
            RunLockedError: another process or trainer trains there, or has continued the run since.
            CheckpointWriteError: the run is no longer there, or the log could not be cut back or opened.
        """
        with self._unlocked_on_error("go on"):
            run = self._locked()
            with _warning("cannot clean up after an earlier save"):
                remove_leftovers(run)
            self._log = MetricsLog(run.metrics, step=step)

    def log(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """Append a record to metrics.jsonl."""
        if self._log is not None:
            with _warning("cannot write metrics.jsonl"):
                self._log.write(kind, step, values)

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[SaveIdentity]:
        """Hold the lock inside the block, and yield the identity of the save after `step` steps.

        Raises:
            RunLockedError: another process or trainer trains there, or has continued the run since.
            CheckpointWriteError: the run is no longer there, or cannot be written to.
        """
        is_training = self._log is not None  # then it is locked anyway
        try:
            with self._unlocked_on_error("save"):
                run = self._open() if is_training else self._locked()
            yield SaveIdentity(run.run_id, step)
        finally:
            if not is_training and self._run is not None:
                self._run.unlock()

    def write(
        self,
        identity: SaveIdentity,
        files: Mapping[str, Content],
        state: Mapping[str, object],
        *,
        val_loss: float | None,
    ) -> Path:
        """Make the log durable, and write a checkpoint with `write_checkpoint`.

        Raises:
            CheckpointWriteError: it could not be written; older checkpoints are intact.
        """
        if self._log is not None:
            with _warning("cannot write metrics.jsonl"):
                self._log.flush()
        self._known.add(identity.name)  # a checkpoint may exist although its last fsync failed
        checkpoint = write_checkpoint(self._open(), identity, files, state, val_loss=val_loss)
        self.saved_step = identity.step
        return checkpoint

    def prune(self, newest: Path, *, keep_last: int, keep_best: int) -> None:
        """Delete old checkpoints with `prune_checkpoints`; a failure gives only a warning."""
        with _warning("cannot delete an old checkpoint (the new one is safe)"):
            prune_checkpoints(self._open(), newest, keep_last=keep_last, keep_best=keep_best)

    @contextlib.contextmanager
    def may_fail(self, *, must_succeed: bool) -> Iterator[None]:
        """Turn a failed save in the block into a warning, unless it must succeed or is the third in a row."""
        try:
            yield
            self._failed_saves = 0
        except CheckpointWriteError as error:
            self._failed_saves += 1
            if must_succeed or self._failed_saves >= _MOST_FAILED_SAVES:
                raise
            warn(f"{error} Training goes on.")

    def end(self) -> None:
        """Close the log and release the lock."""
        log, self._log = self._log, None
        try:
            if log is not None:
                with _warning("cannot write metrics.jsonl"):
                    log.close()
        finally:
            if self._run is not None:
                self._run.unlock()

    @contextlib.contextmanager
    def _unlocked_on_error(self, what: str) -> Iterator[None]:
        """Release the lock if the block fails, and name the directory in the error."""
        try:
            yield
        except BaseException as error:
            if self._run is not None:
                self._run.unlock()
            if not isinstance(error, OSError) or isinstance(error, CharLMError):  # it names the directory
                raise
            rest = ". What was saved there is intact." if os.path.lexists(self._directory) else ""
            raise CheckpointWriteError(
                f"cannot {what} in {quoted(str(self._directory))}: {error}{rest}", errno=error.errno
            ) from error

    def _open(self) -> RunDirectory:
        if self._run is None:
            run = RunDirectory.new(self._directory)
            try:
                run.begin()
                self._run = run
            except BaseException:  # `self._run` is not set yet, so only this place can release the lock
                run.unlock()
                raise
        return self._run

    def _locked(self) -> RunDirectory:
        """Return the run with its lock taken, begun if necessary; raise if another trainer saved there."""
        run = self._open()
        run.lock()
        foreign = checkpoint_names(run) - self._known
        if foreign:
            raise RunLockedError(
                f"another process or trainer has trained in {quoted(str(run.path))} since this trainer last "
                f"knew it (there is {max(foreign)} now). Resume from there."
            )
        try:
            there = RunDirectory.open(run.path)
        except CheckpointError as error:  # the run was deleted
            raise CheckpointWriteError(str(error)) from error
        if there.run_id != run.run_id:
            raise RunLockedError(
                f"another run has begun in {quoted(str(run.path))} since this trainer last knew it"
            )
        return run


@contextlib.contextmanager
def _warning(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        warn(f"{what}: {error}")
