"""A saved model: a directory with config.json, model.safetensors and, with a tokenizer, tokenizer.json.

config.json holds the kind of the model and every setting, so the directory is complete. Reading checks before
it builds: the settings first, then names, shapes and types of the tensors, then their values. Nothing in a
file is executed, so models of strangers can be opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from charlm.errors import (
    CheckpointError,
    CheckpointWriteError,
    ConfigError,
    FileFormatError,
    InputError,
    RunExistsError,
    quoted,
)
from charlm.files import safetensors, strict_json
from charlm.files.atomic import Content, make_directory, replace_directory, standing_directory
from charlm.files.reading import read_file, read_together, refusal
from charlm.locks import GENERATORS
from charlm.models.contents import Contents, extra_name, saved_tensors
from charlm.models.registry import class_of, known_kinds
from charlm.modes import without_draws
from charlm.plain import as_path, as_text
from charlm.text.tokenizer import MAX_FILE_BYTES, ByteTokenizer, CharTokenizer, Tokenizer, tokenizer_from_dict

if TYPE_CHECKING:
    from charlm.models.base import LanguageModel
    from charlm.models.config import ModelConfig

__all__ = [
    "CONFIG_FILE",
    "MODEL_FILES",
    "TOKENIZER_FILE",
    "WEIGHTS_FILE",
    "build_model",
    "build_tokenizer",
    "check_savable",
    "check_tensors",
    "load_model",
    "model_files",
    "model_settings",
    "most_bytes",
    "read_model_files",
    "save_model",
]

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_FILES = (CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE)
FORMAT, VERSION = "charlm.model", 1

_MOST_BUFFERS = 64 * 1024**2  # the most bytes beyond the parameters in a weights file with holes
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

ModelT = TypeVar("ModelT", bound="LanguageModel")


def check_savable(model: LanguageModel) -> None:
    """Raise InputError unless the model could be loaded after it was saved.

    Its class must have its own `kind`, and its config must count its parameters.
    """
    name = type(model).__name__
    if class_of(getattr(model, "kind", "")) is not type(model):
        raise InputError(f"{name} cannot be saved: give it a kind of its own, say kind = {name.lower()!r}")
    try:
        counted = model.config.num_parameters()
    except NotImplementedError as error:
        raise InputError(f"{name} cannot be saved: {error}") from error
    has = model.num_parameters()
    if counted != has:
        raise InputError(f"{name} cannot be saved: its config says {counted} parameters, the model has {has}")


def model_files(
    model: LanguageModel, tokenizer: Tokenizer | None, metadata: Mapping[str, str] | None = None
) -> dict[str, Content]:
    """Return the contents of a model's files by name; the weights are views, so write them at once.

    Args:
        model: the model.
        tokenizer: the content of tokenizer.json; None: there is no such file.
        metadata: strings for the header of model.safetensors.

    Raises:
        InputError: the model could not be loaded again.
    """
    check_savable(model)
    files: dict[str, Content] = {
        CONFIG_FILE: strict_json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "kind": as_text(model.kind),
                "config": model.config.to_dict(),
            }
        )
    }
    if tokenizer is not None:
        files[TOKENIZER_FILE] = strict_json.dumps(tokenizer.to_dict())
    files[WEIGHTS_FILE] = safetensors.dumps(saved_tensors(model), metadata or {})
    return files


def save_model(
    model: LanguageModel,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model; a model in the directory is replaced. Arguments are those of `model_files`.

    Raises:
        CheckpointWriteError: it could not be written. A model that was there before is intact.
        RunExistsError: the directory holds other files.
    """
    directory = as_path(directory)
    try:
        make_directory(directory.absolute().parent)
        files = model_files(model, tokenizer, metadata)
        replace_directory(directory.absolute(), files, owned=MODEL_FILES)
    except FileExistsError as error:
        raise RunExistsError(f"cannot save the model in {quoted(str(directory))}: {error}") from error
    except OSError as error:
        raise CheckpointWriteError(
            f"cannot save the model in {quoted(str(directory))}: {error}", errno=error.errno
        ) from error


def read_model_files(directory: str | Path, *, weights: bool = True) -> dict[str, bytearray]:
    """Read the files of a saved model, all of the same save.

    Args:
        directory: of the model. Another process may save another model there meanwhile.
        weights: read model.safetensors, too.

    Raises:
        CheckpointError: there is no such directory, or config.json or model.safetensors is missing.
        FileFormatError: a file is too large or no regular file.
    """
    target = as_path(directory).absolute()

    def read(where: Path, descriptor: int | None) -> dict[str, bytearray]:
        files: dict[str, bytearray] = {}
        for name in MODEL_FILES if weights else (CONFIG_FILE, TOKENIZER_FILE):
            most = most_bytes(name, files, where)
            try:
                files[name] = read_file(
                    where / name, max_bytes=most, inside=descriptor, larger_if_stored=name == WEIGHTS_FILE
                )
            except FileNotFoundError as error:
                if name != TOKENIZER_FILE:
                    way = _if_of_others(where / "ckpt.pt")
                    raise CheckpointError(
                        f"no model in {quoted(str(where))}: it has no {name}{way}"
                    ) from error
        return files

    try:
        return read_together(lambda: standing_directory(target), read)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else "is no directory"
        raise CheckpointError(
            f"no model in {quoted(str(directory))}: it {what}{_if_of_others(target)}"
        ) from error


def _if_of_others(path: Path) -> str:
    """Return advice for a checkpoint of nanoGPT or minGPT, or an empty string for another file."""
    is_one = path.suffix == ".pt" and path.is_file()
    return "; `charlm import` makes one of a checkpoint of nanoGPT or minGPT" if is_one else ""


def most_bytes(name: str, files: Mapping[str, bytes | bytearray], directory: Path) -> int:
    """Return the largest accepted size of a model's file; for the weights, it follows from config.json.

    Raises:
        FileFormatError: the content of config.json is refused.
    """
    if name == WEIGHTS_FILE:  # the settings do not count buffers; a file without holes may be larger
        _, config = model_settings(files, directory)
        return 8 * config.num_parameters() + _MOST_BUFFERS
    return MAX_FILE_BYTES if name == TOKENIZER_FILE else strict_json.MAX_BYTES


def load_model(directory: str | Path, expected: type[ModelT]) -> ModelT:
    """Read a model of the expected class onto the CPU.

    Raises:
        CheckpointError: there is no model, or one of another class.
        FileFormatError: a file's content is refused.
    """
    return build_model(read_model_files(directory), as_path(directory), expected)


def build_tokenizer(files: Mapping[str, bytearray], directory: Path) -> CharTokenizer | ByteTokenizer:
    """Make the tokenizer from the contents of a model's files; `directory` names them in messages."""
    if TOKENIZER_FILE not in files:
        raise CheckpointError(
            f"{quoted(str(directory))} has no {TOKENIZER_FILE}, so its ids cannot be turned into text. "
            "Save with a tokenizer: CharLM(model, tokenizer).save(directory), or Trainer(..., tokenizer=...)."
        )
    path = str(directory / TOKENIZER_FILE)
    values = strict_json.loads(files[TOKENIZER_FILE], path=path, max_bytes=MAX_FILE_BYTES)
    return tokenizer_from_dict(values, path=path)


def build_model(files: Mapping[str, bytearray], directory: Path, expected: type[ModelT]) -> ModelT:
    """Make the model from the contents of its files; `directory` names them in messages."""
    cls, config = model_settings(files, directory)
    if not issubclass(cls, expected):
        raise CheckpointError(
            f"{quoted(str(directory))} holds a {cls.__name__}, not a {expected.__name__}; "
            f"use {cls.__name__}.load or charlm.load"
        )
    weights = str(directory / WEIGHTS_FILE)
    header = safetensors.parse_header(files[WEIGHTS_FILE], path=weights)
    # Checked before a model of that size is built. Tensors of one byte are never parameters.
    numbers = [info for info in header.tensors.values() if info.dtype.itemsize > 1]
    stored = sum(torch.Size(info.shape).numel() for info in numbers)
    if stored < config.num_parameters():
        raise refusal(
            weights, f"must hold the {config.num_parameters()} parameters of {CONFIG_FILE}, got {stored}."
        )
    # The initial weights are not drawn, since they are replaced. The CPU is used whatever torch's default is.
    with GENERATORS.lock, torch.random.fork_rng(devices=[]), torch.device("cpu"), without_draws():
        model: ModelT = cls.from_config(config)
    own, names = saved_tensors(model), {name: [name] for name in header.tensors}
    if names.keys() != own.keys():
        names = _stored_names(model, header)
        header = replace(header, tensors={name: header.tensors[there[0]] for name, there in names.items()})
    model.to(check_tensors(header, own, weights))
    tensors, _ = safetensors.loads(files[WEIGHTS_FILE], path=weights)
    for one, *others in names.values():
        for other in others:
            if not _same_bits(tensors[one], tensors[other]):
                tied = f"{quoted(one, 80)} and {quoted(other, 80)}"
                raise refusal(weights, f"must hold one value for {tied}, which the model ties, got two.")
    Contents.saved({name: tensors[there[0]] for name, there in names.items()}, {}).put_into(model)
    try:
        model._check_values()
    except InputError as error:
        raise refusal(weights, f"does not fit a {cls.__name__}: {error}") from error
    return model


def _stored_names(model: nn.Module, header: safetensors.Header) -> dict[str, list[str]]:
    """Return for each name of `saved_tensors`, and each unknown name, the names of that tensor in a file.

    Other programs store a tied tensor under another of its names, or under all of them.
    """
    state = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    names: dict[str, list[str]] = {}
    for name in header.tensors:
        is_fixed = name in state and extra_name(name) is None
        names.setdefault(first[id(state[name])] if is_fixed else name, []).append(name)
    return names


def _same_bits(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def model_settings(
    files: Mapping[str, bytes | bytearray], directory: Path
) -> tuple[type[LanguageModel], ModelConfig]:
    """Return the class of the model and its settings, as config.json names them.

    Raises:
        FileFormatError: its content is refused.
    """
    path = str(directory / CONFIG_FILE)
    values = strict_json.loads(files[CONFIG_FILE], path=path)
    if "model_type" in values and "format" not in values:
        kind = f"a model of transformers ({quoted(str(values['model_type']), 40)})"
        way = f"charlm import {quoted(str(directory))} -o NEW, or charlm.interchange.from_transformers"
        raise refusal(path, f"must describe a model of charlm's, got {kind}. Convert it: {way}.")
    strict_json.check_version(values, FORMAT, VERSION, path=path)
    kind = strict_json.take(values, "kind", str, path=path)
    cls = class_of(kind)
    if cls is None:
        kinds = ", ".join(known_kinds())
        raise refusal(path, f"holds a model of the kind {quoted(kind, 40)}; known are {kinds}.")
    try:
        return cls, cls.config_class.from_dict(strict_json.take(values, "config", dict, path=path))
    except ConfigError as error:
        raise FileFormatError(f"{quoted(path)}: {error}", path=path) from error


def check_tensors(header: safetensors.Header, expected: Mapping[str, Tensor], path: str) -> torch.dtype:
    """Check names, shapes and types of stored tensors, and return their floating-point type.

    Args:
        header: of the file.
        expected: the model's tensors.
        path: the file's name, for messages.

    Raises:
        FileFormatError: a tensor is missing, unexpected, or of another shape or type.
    """
    stored = header.tensors
    in_model, in_file = ({extra_name(name) or name for name in names} for names in (expected, stored))
    for name in sorted(in_model - in_file):
        raise refusal(path, f"must hold the tensor {quoted(name, 80)}, which is missing.")
    for name in sorted(in_file - in_model):
        raise refusal(path, f"holds the tensor {quoted(name, 80)}, which the model does not have.")
    expected = {name: tensor for name, tensor in expected.items() if extra_name(name) is None}
    for name, tensor in expected.items():
        if stored[name].shape != tuple(tensor.shape):
            raise refusal(
                path,
                f"must hold {quoted(name, 80)} with shape {tuple(tensor.shape)}, got {stored[name].shape}.",
            )
        if not tensor.is_floating_point() and stored[name].dtype != tensor.dtype:
            raise refusal(path, f"must hold {quoted(name, 80)} as {tensor.dtype}, got {stored[name].dtype}.")
    dtypes = {stored[name].dtype for name, tensor in expected.items() if tensor.is_floating_point()}
    if len(dtypes) > 1 or not dtypes <= set(_FLOATS):
        names = ", ".join(sorted(str(d) for d in dtypes))
        raise refusal(path, f"must hold floating-point tensors of one type, got {names}.")
    return dtypes.pop() if dtypes else torch.float32
