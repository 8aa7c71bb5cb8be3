"""`RunWriter`: everything of a run that goes to disk, and what happens when the disk refuses.

It knows where and when to write; what a checkpoint holds is `state.py`'s business, how it is written
`checkpoint.py`'s. Training does not end for a log line, an old checkpoint that cannot be deleted, or a
save that fails once; it ends when saving fails three times in a row.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from charlm.errors import CheckpointWriteError, RunLockedError, quoted
from charlm.runs.checkpoint import (
    CheckpointInfo,
    checkpoint_name,
    checkpoint_names,
    new_save_id,
    part_metadata,
    save_checkpoint,
)
from charlm.runs.directory import RunDirectory
from charlm.runs.log import MetricsLog
from charlm.runs.retention import prune_checkpoints, remove_leftovers
from charlm.training import state

if TYPE_CHECKING:
    from charlm.training.trainer import Trainer

__all__ = ["RunWriter"]

_MOST_FAILED_SAVES = 3


class RunWriter:
    """Writes the log and the checkpoints of one run.

    Args:
        directory: where. Made at the first need.
        run: the run that lies there already, when it is resumed.
        resumed_from: the checkpoint from which it is resumed.
        known: names of the checkpoints that lay there before it was read.

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
            RunLockedError: another process trains there, or has trained since this trainer knew the run.
        """
        if self._run is None:
            self._run = RunDirectory.create(self._directory, keep_lock=True)
        run = self._run
        run.lock()
        foreign = checkpoint_names(run) - self._known
        if foreign:
            run.unlock()
            raise RunLockedError(
                f"another process has trained in {quoted(str(run.path))} since this trainer last knew it "
                f"(there is {max(foreign)} now). Resume from there."
            )
        with _warning("cannot clean up after an earlier save"):
            remove_leftovers(run)
        self._log = MetricsLog(run.metrics, step=step)

    def log(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """Append a record to metrics.jsonl."""
        if self._log is not None:
            with _warning("cannot write metrics.jsonl"):
                self._log.write(kind, step, values)

    def save(self, trainer: Trainer) -> Path:
        """Write a checkpoint, then delete what need not be kept.

        Raises:
            CheckpointWriteError: it could not be written; older checkpoints are intact.
        """
        if self._run is None:
            self._run = RunDirectory.create(self._directory)
        run = self._run
        if self._log is not None:
            with _warning("cannot write metrics.jsonl"):
                self._log.flush()
        step, save_id = trainer.step, new_save_id()
        self._known.add(checkpoint_name(step, save_id))  # a save may stand though its last fsync failed
        at_this_step = trainer.last if trainer.last is not None and trainer.last.step == step else None
        checkpoint = save_checkpoint(
            run,
            step,
            state.files(trainer, part_metadata(run, step, save_id)),
            state.values(trainer),
            val_loss=state.finite_loss(at_this_step),
            save_id=save_id,
        )
        self.saved_step = step
        with _warning("cannot delete an old checkpoint (the new one is safe)"):
            prune_checkpoints(
                run, checkpoint, keep_last=trainer.config.keep_last, keep_best=trainer.config.keep_best
            )
        return checkpoint

    @contextlib.contextmanager
    def may_fail(self, *, must_succeed: bool) -> Iterator[None]:
        """Turn a failed save inside the block into a warning, unless it must succeed or is one too many."""
        try:
            yield
            self._failed_saves = 0
        except CheckpointWriteError as error:
            self._failed_saves += 1
            if must_succeed or self._failed_saves >= _MOST_FAILED_SAVES:
                raise
            warnings.warn(f"{error} Training goes on.", RuntimeWarning, stacklevel=3)

    def end(self) -> None:
        """Close the log and give the lock back."""
        log, self._log = self._log, None
        try:
            if log is not None:
                log.close()
        finally:
            if self._run is not None:
                self._run.unlock()


@contextlib.contextmanager
def _warning(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what}: {error}", RuntimeWarning, stacklevel=3)
