"""Functions that the formats share: the GPT to export, a folder written atomically, a GPT from tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from charlm.errors import CheckpointWriteError, FileFormatError, InputError, RunExistsError, quoted, shown
from charlm.files import safetensors, strict_json
from charlm.files.atomic import Content, make_directory, replace_directory
from charlm.files.reading import refusal
from charlm.lm import CharLM
from charlm.models.config import GPTConfig
from charlm.models.gpt import GPT
from charlm.models.mixture import MixtureLM
from charlm.models.saving import CONFIG_FILE, FORMAT, VERSION, WEIGHTS_FILE, build_model
from charlm.plain import as_path

__all__ = ["built", "check_free", "exported", "write_folder"]


def exported(lm: CharLM) -> GPT:
    """Return the GPT of a CharLM.

    Raises:
        InputError: its model is no GPT.
    """
    if not isinstance(lm, CharLM):
        raise InputError(f"lm must be a CharLM, as charlm.load returns, got {shown(lm)}")
    if type(lm.model) is GPT:
        return lm.model
    advice = ""
    if isinstance(lm.model, MixtureLM):
        advice = ". Export the GPT of the mixture: load(run, mixture=False)"
    raise InputError(f"only a GPT can be exported, got a {type(lm.model).__name__}{advice}")


def check_free(directory: str | Path, *, known_by: str, overwrite: bool) -> None:
    """Refuse a directory that must not be written to, before the work whose result goes there.

    Args:
        directory: missing or empty.
        known_by: the name of a file that every export of this kind has.
        overwrite: the directory may also hold such an export.

    Raises:
        RunExistsError: it holds something else.
    """
    target = as_path(directory)
    if not target.is_dir() or not any(target.iterdir()) or (overwrite and (target / known_by).is_file()):
        return
    what = "is not empty. Replace it (--overwrite, overwrite=True)"
    if overwrite:
        what = "holds something else than such an export, so nothing is replaced. Move it away"
    raise RunExistsError(f"{quoted(str(directory))} {what}, or choose another directory.")


def write_folder(directory: str | Path, files: Mapping[str, Content]) -> None:
    """Write a folder of files atomically. It may replace one that holds only files of these names.

    Raises:
        RunExistsError: the old folder holds other files.
        CheckpointWriteError: it could not be written. The old folder is intact.
    """
    target, name = as_path(directory).absolute(), quoted(str(directory))
    try:
        make_directory(target.parent)
        replace_directory(target, files, owned=files)
    except FileExistsError as error:
        raise RunExistsError(f"cannot write {name}: {error}") from error
    except OSError as error:
        raise CheckpointWriteError(f"cannot write {name}: {error}", errno=error.errno) from error


def built(tensors: Mapping[str, Tensor], config: GPTConfig, path: str) -> GPT:
    """Return a GPT with these tensors, checked like those of a saved model.

    Args:
        tensors: by their names in a GPT.
        config: its settings.
        path: the file with the tensors, for messages.

    Raises:
        FileFormatError: a tensor is missing, unexpected, or of another shape or type.
    """
    try:
        pieces = safetensors.dumps(tensors)
    except InputError as error:
        raise refusal(path, f"holds a tensor that is no weight: {error}") from error
    values = {"format": FORMAT, "version": VERSION, "kind": GPT.kind, "config": config.to_dict()}
    files = {
        CONFIG_FILE: bytearray(strict_json.dumps(values)),
        WEIGHTS_FILE: bytearray(b"".join(pieces)),
    }
    folder = Path(path).parent
    try:
        return build_model(files, folder, GPT).eval()
    except FileFormatError as error:  # it names a file of a saved model
        message = str(error).replace(quoted(str(folder / WEIGHTS_FILE)), quoted(path))
        raise FileFormatError(message, path=path) from error
