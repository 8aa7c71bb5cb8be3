"""What the formats share: the GPT that goes out, a folder written whole, a GPT made of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from charlm.errors import (
    CheckpointWriteError,
    FileFormatError,
    InputError,
    RunExistsError,
    quoted,
    shown,
)
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
    """Return the GPT of a model and its tokenizer.

    Raises:
        InputError: it is another model.
    """
    if not isinstance(lm, CharLM):
        raise InputError(f"lm must be a CharLM, as charlm.load returns, got {shown(lm)}")
    if type(lm.model) is GPT:
        return lm.model
    way = ""
    if isinstance(lm.model, MixtureLM):
        way = ". Of a mixture, give the GPT: load(run, mixture=False), or CharLM(lm.model.members[0], ...)"
    raise InputError(f"only a GPT can be exported, got a {type(lm.model).__name__}{way}")


def check_free(directory: str | Path, *, known_by: str, overwrite: bool) -> None:
    """Refuse a directory that is not to be written to, before the work whose result goes there.

    Args:
        directory: missing or empty.
        known_by: the name of a file that only an export of this kind has.
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
    """Write a folder of files at once, in place of one that holds no others.

    Raises:
        RunExistsError: it holds others.
        CheckpointWriteError: it could not be written. What was there before is intact.
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
    """Return a GPT of these tensors, checked as those of a saved model are.

    Args:
        tensors: by the names that a GPT has for them.
        config: its settings.
        path: the file that they come from, for messages.

    Raises:
        FileFormatError: a tensor is missing, unexpected, or of another shape or type.
    """
    try:
        pieces = safetensors.dumps(tensors)
    except InputError as error:
        raise refusal(path, f"holds what is no weight: {error}") from error
    values = {"format": FORMAT, "version": VERSION, "kind": GPT.kind, "config": config.to_dict()}
    files = {
        CONFIG_FILE: bytearray(strict_json.dumps(values)),
        WEIGHTS_FILE: bytearray(b"".join(pieces)),
    }
    folder = Path(path).parent
    try:
        return build_model(files, folder, GPT).eval()
    except FileFormatError as error:  # which names the file that ours would be
        said = str(error).replace(quoted(str(folder / WEIGHTS_FILE)), quoted(path))
        raise FileFormatError(said, path=path) from error
