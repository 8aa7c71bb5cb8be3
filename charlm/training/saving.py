"""The content of a checkpoint (`gather`), and how optimizers and generators restore their parts of it.

A checkpoint holds everything that the next step depends on: weights (the model's files), non-persistent
buffers, optimizer state by parameter name, the gradient scaler, and the `RunState`. Batches and dropout need
no state, since they have addresses. The states of torch's, numpy's and Python's own generators are saved for
callbacks that draw from them.
"""

from __future__ import annotations

import hashlib
import platform
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.backends.base import DeviceBackend
from charlm.backends.world import join
from charlm.data.blocks import BlockDataset
from charlm.data.rows import PREPARED, StoredRow
from charlm.errors import CheckpointCorruptError, CheckpointMismatchError, InputError, quoted
from charlm.files import safetensors, strict_json
from charlm.files.atomic import Content
from charlm.locks import GENERATORS
from charlm.models.base import LanguageModel
from charlm.models.contents import passing_buffers, saved_tensors
from charlm.models.saving import TOKENIZER_FILE, WEIGHTS_FILE, model_files
from charlm.runs.checkpoint import TRAIN_FILE, SaveIdentity
from charlm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from charlm.training.config import TrainerConfig
    from charlm.training.trainer import Trainer

__all__ = [
    "asleep_parts",
    "characters_fingerprint",
    "environment",
    "fingerprint",
    "gather",
    "is_of_prepared",
    "is_same_text",
    "optimizer_names",
    "optimizer_state",
    "restored_generators",
    "saved_buffers",
]


def gather(trainer: Trainer, identity: SaveIdentity) -> tuple[dict[str, Content], dict[str, object]]:
    """Return the contents of a checkpoint's files, and the content of state.json except the identity.

    Args:
        trainer: between two steps.
        identity: of the save.

    Returns:
        The model's files and train.safetensors, which are views of live tensors and must be written before
        the next step; and values of JSON.

    Raises:
        InputError: the state of a caller's optimizer for a parameter holds something else than tensors.
    """
    files = _model_files(trainer, identity.metadata)
    tensors = {
        **_generator_tensors(),
        **_buffer_tensors(trainer.model),
        **_optimizer_tensors(trainer.model, trainer.optimizers),
    }
    files[TRAIN_FILE] = safetensors.dumps(tensors, identity.metadata)
    train, val = trainer.train_data, trainer.val_data
    state: dict[str, object] = {
        "config": trainer.config.to_dict(),
        **trainer._state.to_dict(),
        "optimizers": optimizer_names(trainer.optimizers),
        "scaler": None if trainer.scaler is None else trainer.scaler.state_dict(),
        "callbacks": [dict(callback.state()) for callback in trainer.callbacks],
        "data": {"train": fingerprint(train), "val": None if val is None else fingerprint(val)},
        "n_ids": {"train": train.n_ids, "val": None if val is None else val.n_ids},
        "characters": characters_fingerprint(trainer.tokenizer or train.tokenizer),
        "block_size": {"train": train.block_size, "val": None if val is None else val.block_size},
        "environment": environment(trainer.backend, trainer.config),
        "rng": _generator_scalars(),
    }
    if asleep := asleep_parts(trainer.model):
        state["asleep"] = asleep
    if trainer._stepper.rates_are_shares:
        state["rates"] = "shares"
    if trainer.timetable is not None:
        state["timetable"] = trainer._timekeeper.to_dict()
    return files, state


def asleep_parts(model: nn.Module) -> list[str]:
    """Return the parts of a training model that are in evaluation mode; none if the model itself is."""
    return [name for name, part in model.named_modules() if model.training and not part.training]


def _model_files(trainer: Trainer, metadata: Mapping[str, str]) -> dict[str, Content]:
    if isinstance(trainer.model, LanguageModel):
        return dict(model_files(trainer.model, trainer.tokenizer, metadata))
    files: dict[str, Content] = {}
    if trainer.tokenizer is not None:
        files[TOKENIZER_FILE] = strict_json.dumps(trainer.tokenizer.to_dict())
    files[WEIGHTS_FILE] = safetensors.dumps(saved_tensors(trainer.model), metadata)
    return files


def _optimizer_tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Return the optimizers' state for each parameter, as "optimizer.KEY.PARAMETER"."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value
                elif value is not None:
                    raise InputError(
                        f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} of {name}; a "
                        "checkpoint holds tensors alone. Use another optimizer, or train without out_dir."
                    )
    return tensors


def optimizer_names(optimizers: Sequence[Optimizer]) -> list[str]:
    """Return the class names of the optimizers, which a resume compares."""
    return [type(optimizer).__name__ for optimizer in optimizers]


def optimizer_state(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizers: Sequence[Optimizer], path: str, *, own: bool
) -> list[tuple[nn.Parameter, Optimizer, dict[str, Tensor]]]:
    """Return each parameter with its optimizer and its optimizer state, on the parameter's device.

    Args:
        tensors: of train.safetensors.
        model: the model.
        optimizers: each parameter is in one of them.
        path: names the file in messages.
        own: whether the optimizer is the caller's, whose state may have any shape; else shapes are checked.

    Raises:
        CheckpointMismatchError: the tensors do not belong to this model.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            key, _, parameter_name = rest.partition(".")
            by_parameter.setdefault(parameter_name, {})[key] = tensor
    owners = {
        id(p): (optimizer, bool(group.get("fused") or group.get("capturable")))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    states = []
    for name, parameter in model.named_parameters():
        saved = by_parameter.pop(name, None)
        if saved is None:
            continue
        fits = own or all(t.shape in {parameter.shape, ()} for t in saved.values())
        if id(parameter) not in owners or not fits:
            raise CheckpointMismatchError(f"{quoted(path)}: the optimizer state of {name} does not fit")
        optimizer, counts_on_device = owners[id(parameter)]
        moved = {
            # A scalar is a step counter, which stays on the CPU unless the optimizer is fused.
            key: (tensor.to(parameter.device) if tensor.dim() or counts_on_device else tensor).clone()
            for key, tensor in saved.items()
        }
        states.append((parameter, optimizer, moved))
    if by_parameter:
        raise CheckpointMismatchError(
            f"{quoted(path)}: the model has no parameter {quoted(min(by_parameter), 80)}"
        )
    return states


def _buffer_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the non-persistent buffers, as "buffer.NAME" or "complex.NAME"."""
    tensors = {}
    for name, buffer in passing_buffers(model).items():
        if buffer.is_complex():
            tensors[f"complex.{name}"] = torch.view_as_real(buffer.resolve_conj())
        else:
            tensors[f"buffer.{name}"] = buffer
    return tensors


def saved_buffers(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the non-persistent buffers that `gather` saved, by name, on a device."""
    buffers = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "buffer":
            buffers[rest] = tensor.to(device)
        elif kind == "complex":
            buffers[rest] = torch.view_as_complex(tensor.contiguous()).to(device)
    return buffers


_FINGERPRINTS: WeakKeyDictionary[BlockDataset, str] = WeakKeyDictionary()


def fingerprint(data: BlockDataset) -> str:
    """Return a hash that identifies the ids; for a text on disk, it follows from the hashes of the files."""
    ids = data.row.fingerprint if isinstance(data.row, StoredRow) else _hashed(data)
    return _with_documents(ids, data)


def is_same_text(saved: object, data: BlockDataset | None) -> bool:
    """Return whether data has the ids of a saved fingerprint.

    A text that was in memory may be on disk now: then it is hashed, in pieces. A text that was on disk must
    be on disk again.
    """
    if data is None or not isinstance(saved, str):
        return saved is None and data is None
    return saved == (fingerprint(data) if is_of_prepared(saved) else _with_documents(_hashed(data), data))


def _with_documents(ids: str, data: BlockDataset) -> str:
    return ids if data.documents is None else f"{ids} {data.documents.digest}"


def is_of_prepared(saved: object) -> bool:
    """Return whether a fingerprint belongs to a text on disk."""
    return isinstance(saved, str) and saved.startswith(PREPARED)


def _hashed(data: BlockDataset) -> str:
    """Return the sha256 of the ids, independent of their integer type; computed once per data set."""
    if data not in _FINGERPRINTS:
        digest = hashlib.sha256()
        for start in range(0, data.n_ids, 1 << 20):
            digest.update(data.ids_between(start, start + (1 << 20)).numpy().astype("<i8").tobytes())
        _FINGERPRINTS[data] = digest.hexdigest()
    return _FINGERPRINTS[data]


def characters_fingerprint(tokenizer: Tokenizer | None) -> str | None:
    """Return the sha256 of the characters of a tokenizer's ids; None without a tokenizer."""
    if tokenizer is None:
        return None
    values = {key: value for key, value in tokenizer.to_dict().items() if key != "unknown"}
    return hashlib.sha256(strict_json.dumps(values)).hexdigest()


def environment(backend: DeviceBackend, config: TrainerConfig) -> dict[str, object]:
    """Return the facts that must be the same for a resumed run to be equal bit for bit."""
    return {
        **({"processes": join(backend).size} if config.reduce == "fast" else {}),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": backend.name,
    }


def _generator_tensors() -> dict[str, Tensor]:
    """Return the large parts of the global generators' states."""
    _, keys, *_ = np.random.get_state(legacy=True)  # noqa: NPY002 - the caller's own
    with GENERATORS.lock:
        state = torch.get_rng_state()
    return {
        "rng.torch": state,
        "rng.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),  # (624,)
        "rng.python": torch.tensor(random.getstate()[1], dtype=torch.int64, device="cpu"),  # (625,)
    }


def _generator_scalars() -> dict[str, object]:
    """Return the small parts of the global generators' states."""
    _, _, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the caller's own
    version, _, gauss_next = random.getstate()
    return {"numpy": [position, has_gauss, gauss], "python": [version, gauss_next]}


@contextmanager
def restored_generators(
    scalars: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str
) -> Iterator[None]:
    """Set the global generators to the states of `gather`; after an error here or in the block, undo it.

    Raises:
        CheckpointCorruptError: they are no such states; `path` names the file.
    """
    with GENERATORS.lock:
        before = np.random.get_state(), random.getstate(), torch.get_rng_state()  # noqa: NPY002 - the caller's
    try:
        try:
            _set_generators(scalars, tensors)
        except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointCorruptError(f"{quoted(path)} holds no valid generator states") from error
        yield
    except BaseException:
        np.random.set_state(before[0])  # noqa: NPY002 - the caller's own
        random.setstate(before[1])
        torch.set_rng_state(before[2])
        raise


def _set_generators(scalars: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    position, has_gauss, gauss = scalars["numpy"]
    version, gauss_next = scalars["python"]
    if type(position) is not int or not 0 <= position <= 624:  # else numpy would read beyond its keys
        raise ValueError(position)
    keys = tensors["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, gauss))  # noqa: NPY002 - the caller's own
    random.setstate((version, tuple(tensors["rng.python"].tolist()), gauss_next))
    with GENERATORS.lock:
        torch.set_rng_state(tensors["rng.torch"].clone())
