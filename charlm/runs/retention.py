"""Which checkpoints stay, and how the others go: once a newer one is durable, and never what is foreign.

A checkpoint is renamed before it is deleted, so that no reader sees a part of one. What a killed save or an
unfinished deletion leaves is deleted by the next trainer that has the run's lock.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import cast

from charlm.files.atomic import is_left_behind, remove_directory, remove_file
from charlm.runs.checkpoint import MANIFEST_FILE, CheckpointInfo, scan_checkpoints
from charlm.runs.directory import RunDirectory

__all__ = ["prune_checkpoints", "remove_leftovers"]

_TRASH = re.compile(r"\.trash-[0-9a-f]{8}")


def prune_checkpoints(run: RunDirectory, newest: Path, *, keep_last: int, keep_best: int) -> None:
    """Delete all checkpoints but the newest and the best. Call it only after `newest` is durable.

    Nothing but checkpoints of this run with a whole manifest is ever deleted, and none that somebody has put
    other files into. `newest` always stays, and others of its step go. Those past its step are left alone
    and do not count: they belong to what a resume has fallen back from, and may be damaged.

    Args:
        run: where.
        newest: the checkpoint that was just saved.
        keep_last: how many of the newest stay, at least 1.
        keep_best: how many of those with the lowest validation loss stay beside them.

    Raises:
        OSError: one could not be deleted.
    """
    checkpoints = scan_checkpoints(run)[0]
    current = [info for info in checkpoints if info.path == newest]
    if not current:
        return
    step = current[0].step
    candidates = [info for info in checkpoints if info.step < step] + current
    scored = sorted(
        (info for info in candidates if info.val_loss is not None),
        key=lambda info: (cast("float", info.val_loss), info.step),
    )
    kept = {info.path for info in [*candidates[-max(keep_last, 1) :], *scored[:keep_best]]}
    for info in checkpoints:
        if info.step <= step and info.path not in kept and _holds_only_its_own(info):
            remove_directory(info.path, run.checkpoints / f".trash-{info.save_id}")


def remove_leftovers(run: RunDirectory) -> None:
    """Delete what killed saves and unfinished deletions left behind. Only while the run is locked.

    Raises:
        OSError: one could not be deleted.
    """
    for path in run.checkpoints.iterdir():
        is_ours = is_left_behind(path.name) or _TRASH.fullmatch(path.name)
        if is_ours and stat.S_ISDIR(path.lstat().st_mode):
            remove_directory(path, path)
    for path in run.path.iterdir():  # of the log, when a resume cuts it back, and of the n-gram model
        if is_left_behind(path.name) and stat.S_ISDIR(path.lstat().st_mode):
            remove_directory(path, path)
        elif is_left_behind(path.name):
            remove_file(path)


def _holds_only_its_own(info: CheckpointInfo) -> bool:
    """Return whether nobody has put anything into a checkpoint, or a link in its place."""
    return not info.path.is_symlink() and {entry.name for entry in info.path.iterdir()} <= {
        *info.files,
        MANIFEST_FILE,
    }
