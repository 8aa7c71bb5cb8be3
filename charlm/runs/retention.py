"""Deletes old checkpoints once a newer one is durable, and never the files of others.

A checkpoint is renamed before it is deleted, so that no reader sees a part of one. The next trainer with the
run's lock deletes the remains of a killed save or an unfinished deletion.
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

    Only checkpoints of this run with a whole manifest and without other files are deleted. `newest` always
    stays; other checkpoints of its step are deleted. Those of later steps are ignored: a resume has fallen
    back from them, and they may be damaged.

    Args:
        run: the run.
        newest: the checkpoint that was just saved.
        keep_last: number of newest checkpoints to keep, at least 1.
        keep_best: number of checkpoints with the lowest validation loss to keep, too.

    Raises:
        OSError: a checkpoint could not be deleted.
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
    """Delete the remains of killed saves and unfinished deletions. Call it only while the run is locked.

    Raises:
        OSError: something could not be deleted.
    """
    for path in run.checkpoints.iterdir():
        is_ours = is_left_behind(path.name) or _TRASH.fullmatch(path.name)
        if is_ours and stat.S_ISDIR(path.lstat().st_mode):
            remove_directory(path, path)
    for path in run.path.iterdir():  # remains of the log or of the n-gram model
        if is_left_behind(path.name) and stat.S_ISDIR(path.lstat().st_mode):
            remove_directory(path, path)
        elif is_left_behind(path.name):
            remove_file(path)


def _holds_only_its_own(info: CheckpointInfo) -> bool:
    """Return whether a checkpoint holds no other files and is no link."""
    return not info.path.is_symlink() and {entry.name for entry in info.path.iterdir()} <= {
        *info.files,
        MANIFEST_FILE,
    }
