"""Chooses a checkpoint of a run: the newest one to resume, the best one to load.

A damaged checkpoint gives a warning, and the next one is used. A process that trains in the run may delete a
checkpoint just before it is read; then there is a newer one, and the search starts again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from charlm.errors import CheckpointCorruptError, CheckpointError, FileFormatError, quoted, warn
from charlm.files import safetensors
from charlm.models.saving import WEIGHTS_FILE, read_model_files
from charlm.runs.checkpoint import (
    Checkpoint,
    CheckpointInfo,
    is_checkpoint_name,
    read_checkpoint,
    scan_checkpoints,
)
from charlm.runs.directory import RunDirectory, runs_in

__all__ = [
    "MIXTURE_FOLDER",
    "best_of",
    "best_whole_checkpoint",
    "made_of",
    "mixture_of",
    "model_files_at",
    "newest_whole_checkpoint",
]

MIXTURE_FOLDER = "mixture"
"""Folder in a run for its result, if that is a mixture and not the model of its best checkpoint."""


def newest_whole_checkpoint(run: RunDirectory) -> Checkpoint:
    """Read the newest checkpoint that verifies, and warn about damaged newer ones.

    Raises:
        CheckpointError: there is none, or a newer charlm wrote the newest.
    """
    while True:
        whole, damaged = scan_checkpoints(run)
        problems: dict[Path, OSError] = {}
        for path in sorted([*(info.path for info in whole), *damaged], reverse=True):  # names sort by step
            try:
                if path in damaged:
                    raise damaged[path]
                checkpoint = read_checkpoint(path, run.run_id)
            except OSError as error:
                if not os.path.lexists(path):
                    break
                if isinstance(error, CheckpointError) and not isinstance(error, CheckpointCorruptError):
                    raise  # it is whole, so an older one must not replace it
                problems[path] = error
                continue
            _warn(problems, f"going on from step {checkpoint.info.step}")
            return checkpoint
        else:
            which = "in the same" if RunDirectory.is_free(run.path) else "in another"
            raise _none_is_whole(
                run,
                problems,
                f"none was saved. Start again, {which} directory (Trainer(..., out_dir=...), charlm train)",
            )


def best_whole_checkpoint(run: RunDirectory) -> Checkpoint:
    """Read the checkpoint with the lowest validation loss, or without losses the newest, that verifies.

    Raises:
        CheckpointError: there is none.
    """
    problems: dict[Path, OSError] = {}
    while True:
        whole, damaged = scan_checkpoints(run)
        problems.update(damaged)
        newest_first = [info for info in reversed(whole) if info.path not in problems]
        if not newest_first:
            raise _none_is_whole(run, problems, "none was saved yet")
        path = best_of(newest_first).path
        try:
            checkpoint = read_checkpoint(path, run.run_id)
        except OSError as error:
            if os.path.lexists(path):
                problems[path] = error
            continue
        _warn(problems, f"loading {quoted(path.name)} instead")
        return checkpoint


def best_of(newest_first: Sequence[CheckpointInfo]) -> CheckpointInfo:
    """Return the checkpoint with the lowest validation loss, of equals the newest; without losses the newest.

    Args:
        newest_first: at least one.
    """
    return min(newest_first, key=lambda info: (info.val_loss is None, info.val_loss or 0.0))


def model_files_at(directory: Path, *, mixture: bool) -> tuple[Mapping[str, bytearray], Path]:
    """Read the model's files of a run, a checkpoint or a saved model, and return them with their directory.

    Args:
        directory: one of the three.
        mixture: take the mixture of a run, if there is one.

    Raises:
        CheckpointError: there is nothing to load.
        FileFormatError: a file's content is refused.
    """
    if (directory / "run.json").exists():
        run = RunDirectory.open(directory)
        best = best_whole_checkpoint(run)
        if mixture and (mixed := mixture_of(run, best.info)) is not None:
            return mixed, run.path / MIXTURE_FOLDER
        return best.files, best.info.path
    if is_checkpoint_name(directory.name) and directory.exists():  # whole or damaged, but no saved model
        return read_checkpoint(directory).files, directory
    try:
        return read_model_files(directory), directory
    except CheckpointError as error:
        if names := runs_in(directory):
            raise CheckpointError(f"{quoted(str(directory))} is no run, but {names}") from error
        raise


def made_of(info: CheckpointInfo) -> dict[str, str]:
    """Return the metadata that connects the weights of a run's result with its checkpoint."""
    digest = info.files[WEIGHTS_FILE].sha256
    return {"run": info.run_id, "checkpoint": info.path.name, "sha256": digest}


def mixture_of(run: RunDirectory, info: CheckpointInfo) -> dict[str, bytearray] | None:
    """Read the run's mixture if it was made from this checkpoint, else return None."""
    folder = run.path / MIXTURE_FOLDER
    if not folder.exists() or WEIGHTS_FILE not in info.files:
        return None
    try:
        files = read_model_files(folder)
        header = safetensors.parse_header(files[WEIGHTS_FILE], path=str(folder / WEIGHTS_FILE))
    except (CheckpointError, FileFormatError) as error:
        warn(f"{error}; taking the model of the best checkpoint instead")
        return None
    return files if header.metadata == made_of(info) else None


def _warn(problems: Mapping[Path, OSError], instead: str) -> None:
    for problem in problems.values():
        warn(f"{problem}; {instead}")


def _none_is_whole(run: RunDirectory, problems: Mapping[Path, OSError], none: str) -> CheckpointError:
    reason = "; ".join(map(str, problems.values())) or none
    return CheckpointError(f"no whole checkpoint in {quoted(str(run.path))}: {reason}")
