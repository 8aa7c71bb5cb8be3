"""Checkpoints: a model and the whole training state, in one directory that appears at once.

    RUN/checkpoints/step-000000001200-5f3a9c1e/
        config.json  tokenizer.json  model.safetensors    a complete model (see models/saving.py)
        train.safetensors                                 optimizer state by parameter name, generators
        state.json                                        counters, settings, fingerprints
        manifest.json                                     written last: size and sha256 of every file

A checkpoint exists if and only if its name has this form and its manifest verifies. There is no "latest"
file and no symlink, and modification times mean nothing. Files are verified before they are parsed, from the
same bytes in memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from charlm.errors import (
    CharLMError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointWriteError,
    FileFormatError,
    InputError,
    quoted,
)
from charlm.files import safetensors, strict_json
from charlm.files.atomic import (
    Content,
    FileDigest,
    write_directory,
)
from charlm.files.reading import read_file
from charlm.models.saving import MODEL_FILES, WEIGHTS_FILE, model_settings, most_bytes
from charlm.plain import as_path
from charlm.runs.directory import RunDirectory

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "SaveIdentity",
    "checkpoint_names",
    "encode_state",
    "is_checkpoint_name",
    "list_checkpoints",
    "read_checkpoint",
    "scan_checkpoints",
    "verify_checkpoint",
    "write_checkpoint",
]

STATE_FILE = "state.json"
TRAIN_FILE = "train.safetensors"
MANIFEST_FILE = "manifest.json"
FORMAT, VERSION = "charlm.checkpoint", 1

_NAME = re.compile(r"step-(\d{12})-([0-9a-f]{8})")
_FILES = (*MODEL_FILES, TRAIN_FILE, STATE_FILE)  # in the order of reading
_TENSORS = {WEIGHTS_FILE, TRAIN_FILE}
_MOST_STATE = 256  # bytes of train.safetensors for each parameter; AdamW's moments take eight
_MOST_BESIDE = 64 * 1024**2  # bytes of train.safetensors for generators and the like


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as its manifest describes it."""

    path: Path
    """Its directory."""
    step: int
    """Number of steps done."""
    run_id: str
    """The id of its run."""
    save_id: str
    """The id of this save."""
    val_loss: float | None
    """Validation loss in nats at this step, if it was evaluated."""
    files: Mapping[str, FileDigest]
    """Size and sha256 of each file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    info: CheckpointInfo
    """Its manifest."""
    files: Mapping[str, bytearray]
    """The contents of its files, by name."""
    state: Mapping[str, object]
    """The content of state.json."""


@dataclass(frozen=True)
class SaveIdentity:
    """Identifies one save of one run. Every file has this identity, so files of two saves cannot be mixed."""

    run_id: str
    """The id of the run."""
    step: int
    """Number of steps done."""
    save_id: str = field(default_factory=lambda: secrets.token_hex(4))
    """Random, so that a step can be saved twice."""

    @property
    def name(self) -> str:
        """The name of the checkpoint's directory."""
        return f"step-{self.step:012d}-{self.save_id}"

    @property
    def values(self) -> dict[str, str | int]:
        """The identity in JSON files."""
        return {"run_id": self.run_id, "save_id": self.save_id, "step": self.step}

    @property
    def metadata(self) -> dict[str, str]:
        """The identity in the metadata of safetensors files, which are strings."""
        return {name: str(value) for name, value in self.values.items()}


def write_checkpoint(
    run: RunDirectory,
    identity: SaveIdentity,
    files: Mapping[str, Content],
    state: Mapping[str, object],
    *,
    val_loss: float | None,
) -> Path:
    """Write a checkpoint. When this returns, it survives a loss of power.

    Args:
        run: the run.
        identity: of this save.
        files: contents of the model's files and of train.safetensors; the safetensors files have
            `identity.metadata`.
        state: the content of state.json; the identity is added.
        val_loss: finite validation loss at this step in nats; None: unknown.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointWriteError: it could not be written. Older checkpoints are intact.
        InputError: the state is not JSON, or a file is too large to be read again.
    """

    def manifest(digests: Mapping[str, FileDigest]) -> tuple[str, bytes]:
        for name, digest in digests.items():
            if name not in _TENSORS and digest.size > (
                most := _most_bytes(name, {}, target, size=digest.size)
            ):
                raise InputError(f"{name} must have at most {most} bytes to be read again, got {digest.size}")
        listed = {name: {"size": d.size, "sha256": d.sha256} for name, d in digests.items()}
        head = {"format": FORMAT, "version": VERSION, **identity.values}
        values = {**head, "val_loss": val_loss, "files": listed}
        return MANIFEST_FILE, strict_json.dumps({**values, "sha256": _own_digest(values)})

    target = run.checkpoints / identity.name
    state_data = encode_state(identity, state)
    try:
        write_directory(target, {**files, STATE_FILE: state_data}, seal=manifest, temporary=identity.save_id)
    except OSError as error:
        rest = ". Older checkpoints are intact." if os.path.lexists(run.checkpoints) else ""
        raise CheckpointWriteError(
            f"cannot save the checkpoint of step {identity.step} in {quoted(str(run.path))}: {error}{rest}",
            errno=error.errno,
        ) from error
    return target


def encode_state(identity: SaveIdentity, state: Mapping[str, object]) -> bytes:
    """Return the content of state.json, and check that it could be read again.

    Raises:
        InputError: the state is not JSON, or too large.
    """
    try:
        data = strict_json.dumps({**identity.values, **state})
        strict_json.loads(data, path=STATE_FILE)
    except (TypeError, FileFormatError) as error:
        raise InputError(f"a callback's state() cannot be saved: {error}") from error
    return data


def is_checkpoint_name(name: str) -> bool:
    """Return whether this can be the name of a checkpoint."""
    return _NAME.fullmatch(name) is not None


def checkpoint_names(run: RunDirectory) -> set[str]:
    """Return the names of all directories that may be checkpoints, without reading them."""
    present = run.checkpoints.iterdir() if run.checkpoints.is_dir() else ()
    return {path.name for path in present if _NAME.fullmatch(path.name)}


def list_checkpoints(run: str | Path) -> list[CheckpointInfo]:
    """Return the checkpoints with a whole manifest, in the order of their steps. Contents are not read.

    Directories with other names or damaged manifests are ignored.

    Args:
        run: its directory.

    Raises:
        CheckpointError: there is no run.

    Example:
        >>> import tempfile
        >>> from charlm import BigramLM, BlockDataset, CharTokenizer, Trainer, TrainerConfig
        >>> folder = tempfile.mkdtemp() + "/run"
        >>> data = BlockDataset.from_text("to be or not to be " * 9, CharTokenizer("benort "), block_size=8)
        >>> config = TrainerConfig(max_steps=4, save_interval=2, keep_last=2)
        >>> result = Trainer(BigramLM(7), data, config, out_dir=folder, device="cpu").fit()
        >>> [info.step for info in list_checkpoints(folder)]
        [2, 4]
    """
    return scan_checkpoints(RunDirectory.open(as_path(run)))[0]


def scan_checkpoints(run: RunDirectory) -> tuple[list[CheckpointInfo], dict[Path, OSError]]:
    """Return the checkpoints of `list_checkpoints`, and the error of each damaged manifest, by directory."""
    while True:
        whole: list[CheckpointInfo] = []
        problems: dict[Path, OSError] = {}
        deleted = False
        for path in [run.checkpoints / name for name in sorted(checkpoint_names(run))]:
            try:
                whole.append(_read_manifest(path, run.run_id))
            except OSError as error:
                deleted = deleted or not os.path.lexists(path)
                problems[path] = error
        if not deleted:  # else a process that trains there has saved a newer one: look again
            return whole, problems


def verify_checkpoint(path: str | Path) -> CheckpointInfo:
    """Check every byte of a checkpoint and return its manifest.

    Args:
        path: its directory, such as `TrainResult.checkpoint`.

    Raises:
        CheckpointCorruptError: a file is missing, too many, or changed; the message names it.
        CheckpointError: there is no checkpoint.

    Example:
        >>> import tempfile
        >>> from charlm import BigramLM, BlockDataset, CharTokenizer, Trainer, TrainerConfig
        >>> folder = tempfile.mkdtemp() + "/run"
        >>> data = BlockDataset.from_text("to be or not to be " * 9, CharTokenizer("benort "), block_size=8)
        >>> trainer = Trainer(BigramLM(7), data, TrainerConfig(max_steps=4), out_dir=folder, device="cpu")
        >>> verify_checkpoint(trainer.fit().checkpoint).step
        4
    """
    return read_checkpoint(as_path(path)).info


def read_checkpoint(path: Path, run_id: str | None = None) -> Checkpoint:
    """Read a checkpoint into memory, verify every byte, and return its contents.

    Args:
        path: its directory.
        run_id: the run that it must belong to; None: any.

    Raises:
        CheckpointCorruptError: a file is missing, too many, or changed; the message names it.
        CheckpointError: there is no checkpoint.
    """
    info = _read_manifest(path, run_id)
    present = {entry.name for entry in path.iterdir()} - {MANIFEST_FILE}
    if present != set(info.files):
        names = ", ".join(quoted(name, 40) for name in sorted(present ^ set(info.files)))
        raise CheckpointCorruptError(
            f"{quoted(str(path))} must hold exactly the files of its manifest; missing or too many: {names}"
        )
    files: dict[str, bytearray] = {}
    for name in _FILES:  # in this order: config.json determines how large the others may be
        if name not in info.files:
            continue
        listed = info.files[name]
        try:
            data = read_file(
                path / name,
                max_bytes=_most_bytes(name, files, path, size=listed.size),
                exact_size=listed.size,
                larger_if_stored=name in _TENSORS,
            )
        except FileFormatError as error:
            raise CheckpointCorruptError(str(error)) from error
        if hashlib.sha256(data).hexdigest() != listed.sha256:
            raise CheckpointCorruptError(f"{quoted(str(path / name))} has changed since it was saved")
        files[name] = data
    state = _parsed(files[STATE_FILE], path / STATE_FILE)
    identities = {STATE_FILE: {key: str(state.get(key)) for key in ("run_id", "save_id", "step")}}
    for name in files.keys() & {"model.safetensors", TRAIN_FILE}:
        identities[name] = _metadata(files[name], path / name)
    for name, identity in identities.items():
        if identity != {"run_id": info.run_id, "save_id": info.save_id, "step": str(info.step)}:
            raise CheckpointCorruptError(f"{quoted(str(path / name))} belongs to another checkpoint")
    return Checkpoint(info=info, files=files, state=state)


def _most_bytes(name: str, files: Mapping[str, bytes | bytearray], path: Path, *, size: int) -> int:
    """Return the largest accepted size of a file; files of tensors may exceed it if they have no holes."""
    if name == STATE_FILE:
        return strict_json.MAX_BYTES
    if name in _TENSORS and size <= _MOST_BESIDE:  # reading the settings would take time
        return _MOST_BESIDE
    try:
        if name == TRAIN_FILE:
            return _MOST_STATE * model_settings(files, path)[1].num_parameters() + _MOST_BESIDE
        return most_bytes(name, files, path)
    except (KeyError, CharLMError):  # a model of an unknown class
        return _MOST_BESIDE


def _read_manifest(path: Path, run_id: str | None) -> CheckpointInfo:
    match = _NAME.fullmatch(path.name)
    file = path / MANIFEST_FILE
    where = str(file)
    if match is None:
        raise CheckpointError(
            f"{quoted(str(path))} is no checkpoint: its name must be step-NNNNNNNNNNNN-xxxxxxxx"
        )
    if path.is_symlink():
        raise CheckpointCorruptError(f"{quoted(str(path))} must be a directory, got a symbolic link")
    try:
        data = read_file(file, max_bytes=256 * 1024)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointCorruptError(
            f"{quoted(str(path))} has no {MANIFEST_FILE}: the save did not end"
        ) from error
    except FileFormatError as error:
        raise CheckpointCorruptError(str(error)) from error
    values = _parsed(data, file)
    digest = values.pop("sha256", None)
    if digest != _own_digest(values) or data != strict_json.dumps({**values, "sha256": digest}):
        raise CheckpointCorruptError(f"{quoted(where)} has changed since it was saved")
    # The manifest was written by a charlm; but its version, run or save may be another.
    try:
        strict_json.check_version(values, FORMAT, VERSION, path=where)
    except FileFormatError as error:
        raise CheckpointError(str(error)) from error
    try:
        step = strict_json.take(values, "step", int, path=where)
        save_id = strict_json.take(values, "save_id", str, path=where)
        owner = strict_json.take(values, "run_id", str, path=where)
        listed = strict_json.take(values, "files", dict, path=where)
        files = {}
        for name in listed:
            entry = strict_json.take(listed, name, dict, path=where)
            files[name] = FileDigest(
                size=strict_json.take(entry, "size", int, path=where),
                sha256=strict_json.take(entry, "sha256", str, path=where),
            )
        val_loss = values.get("val_loss")
        if val_loss is not None:
            val_loss = strict_json.take(values, "val_loss", float, path=where)
    except FileFormatError as error:
        raise CheckpointCorruptError(str(error)) from error
    if (step, save_id) != (int(match[1]), match[2]) or run_id not in {None, owner}:
        raise CheckpointCorruptError(f"{quoted(where)} belongs to another checkpoint")
    if not files.keys() <= set(_FILES) or STATE_FILE not in files:
        raise CheckpointCorruptError(f"{quoted(where)} lists other files than a checkpoint has")
    return CheckpointInfo(path=path, step=step, run_id=owner, save_id=save_id, val_loss=val_loss, files=files)


def _parsed(data: bytearray, path: Path) -> dict[str, object]:
    try:
        return strict_json.loads(data, path=str(path))
    except FileFormatError as error:
        raise CheckpointCorruptError(str(error)) from error


def _metadata(data: bytearray, path: Path) -> dict[str, str]:
    try:
        return safetensors.parse_header(data, path=str(path)).metadata
    except FileFormatError as error:
        raise CheckpointCorruptError(str(error)) from error


def _own_digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(strict_json.dumps(values)).hexdigest()
