"""What a trainer writes into a checkpoint, each part beside the function that reads it back.

Everything that the next step depends on is here: weights (the model's files), optimizer state by
parameter name, the gradient scaler, counters, the best evaluation. Batches and dropout need nothing, they
have addresses. The states of torch's, numpy's and Python's own generators are kept for callbacks that draw
from them.
"""

from __future__ import annotations

import hashlib
import math
import platform
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from charlm.backends.base import DeviceBackend
from charlm.data.blocks import BlockDataset
from charlm.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    FileFormatError,
    InputError,
    quoted,
)
from charlm.evaluation.evaluate import EvalResult
from charlm.files import safetensors, strict_json
from charlm.files.atomic import Content
from charlm.files.strict_json import take
from charlm.models.base import LanguageModel
from charlm.models.saving import (
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    model_files,
    unique_tensors,
)
from charlm.runs.checkpoint import (
    TRAIN_FILE,
)
from charlm.runs.log import eval_values, finite
from charlm.training.records import Evaluation

if TYPE_CHECKING:
    from charlm.training.trainer import Trainer

__all__ = [
    "environment",
    "files",
    "fingerprint",
    "finite_loss",
    "optimizer_names",
    "optimizer_state",
    "read_evaluation",
    "restore_generators",
    "take_seconds",
    "values",
]

_MOST_SECONDS = 1e12


def files(trainer: Trainer, metadata: Mapping[str, str]) -> dict[str, Content]:
    """Return the contents of the model's files and of train.safetensors; views, so write them at once.

    Args:
        trainer: what is to be saved.
        metadata: strings for the header of both safetensors files.

    Raises:
        InputError: an optimizer of the caller's keeps something other than tensors for a parameter.
    """
    model = trainer.model
    contents: dict[str, Content] = {}
    if isinstance(model, LanguageModel):
        contents.update(model_files(model, trainer.tokenizer, metadata))
    else:
        if trainer.tokenizer is not None:
            contents[TOKENIZER_FILE] = strict_json.dumps(trainer.tokenizer.to_dict())
        contents[WEIGHTS_FILE] = safetensors.dumps(unique_tensors(model), metadata)
    tensors = _generator_tensors()
    for name, parameter in model.named_parameters():
        for optimizer in trainer.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value
                elif value is not None:
                    raise InputError(
                        f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} of {name}; a "
                        "checkpoint holds tensors alone. Use another optimizer, or train without out_dir."
                    )
    contents[TRAIN_FILE] = safetensors.dumps(tensors, metadata)
    return contents


def values(trainer: Trainer) -> dict[str, object]:
    """Return what state.json holds."""
    return {
        "config": trainer.config.to_dict(),
        "chars_seen": trainer.chars_seen,
        "seconds": trainer.seconds,
        "evaluations_since_best": trainer._evaluations_since_best,
        "best": _evaluation_values(trainer.best),
        "last": _evaluation_values(trainer.last),
        "optimizers": optimizer_names(trainer),
        "scaler": None if trainer.scaler is None else trainer.scaler.state_dict(),
        "callbacks": [dict(callback.state()) for callback in trainer.callbacks],
        "data": {
            "train": fingerprint(trainer.train_data),
            "val": None if trainer.val_data is None else fingerprint(trainer.val_data),
        },
        "block_size": {
            "train": trainer.train_data.block_size,
            "val": None if trainer.val_data is None else trainer.val_data.block_size,
        },
        "environment": environment(trainer.backend),
        "rng": _generator_scalars(),
        **({} if trainer.timetable is None else {"timetable": trainer._timekeeper.to_dict()}),
    }


def finite_loss(evaluation: Evaluation | None) -> float | None:
    """Return the loss of an evaluation as a checkpoint is ranked by, or None."""
    if evaluation is None:
        return None
    loss = evaluation.result.loss_nats
    return loss if np.isfinite(loss) else None


def optimizer_names(trainer: Trainer) -> list[str]:
    """Return the classes of the optimizers, by which a resume knows them again."""
    return [type(optimizer).__name__ for optimizer in trainer.optimizers]


def optimizer_state(
    tensors: Mapping[str, Tensor], trainer: Trainer, path: str, *, own: bool
) -> list[tuple[nn.Parameter, torch.optim.Optimizer, dict[str, Tensor]]]:
    """Return each parameter's optimizer state, on the parameter's device.

    Shapes are checked, but for those of a caller's own optimizer, which may keep whatever it wants.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            key, _, parameter_name = rest.partition(".")
            by_parameter.setdefault(parameter_name, {})[key] = tensor
    owners = {
        id(p): (optimizer, bool(group.get("fused") or group.get("capturable")))
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    found = []
    for name, parameter in trainer.model.named_parameters():
        saved = by_parameter.pop(name, None)
        if saved is None:
            continue
        fits = own or all(t.shape in {parameter.shape, ()} for t in saved.values())
        if id(parameter) not in owners or not fits:
            raise CheckpointMismatchError(f"{quoted(path)}: the optimizer state of {name} does not fit")
        optimizer, counts_on_device = owners[id(parameter)]
        moved = {
            # A scalar is a step counter, which torch keeps on the CPU unless the optimizer is fused.
            key: (tensor.to(parameter.device) if tensor.dim() or counts_on_device else tensor).clone()
            for key, tensor in saved.items()
        }
        found.append((parameter, optimizer, moved))
    if by_parameter:
        raise CheckpointMismatchError(
            f"{quoted(path)}: the model has no parameter {quoted(min(by_parameter), 80)}"
        )
    return found


def _evaluation_values(evaluation: Evaluation | None) -> dict[str, object] | None:
    if evaluation is None:
        return None
    return {
        "step": evaluation.step,
        "is_best": evaluation.is_best,
        "seconds": evaluation.seconds,
        **finite(eval_values(evaluation.result)),
    }


def read_evaluation(state: Mapping[str, object], name: str, path: str) -> Evaluation | None:
    """Return the evaluation that a state holds under a name; `path` names the file in messages."""
    if state.get(name) is None:
        return None
    saved = take(state, name, dict, path=path)
    nonfinite = take({"nonfinite": {}, **saved}, "nonfinite", dict, path=path)
    result = EvalResult(
        loss_nats=math.nan
        if nonfinite.get("loss_nats") == "nan"
        else math.inf
        if saved.get("loss_nats") is None
        else take(saved, "loss_nats", float, path=path),
        accuracy=take(saved, "accuracy", float, path=path),
        n_chars=take(saved, "n_chars", int, path=path),
        n_left_out=take({"n_left_out": 0, **saved}, "n_left_out", int, path=path),
    )
    return Evaluation(
        step=take(saved, "step", int, path=path),
        result=result,
        is_best=take(saved, "is_best", bool, path=path),
        seconds=take_seconds(saved, path),
    )


def take_seconds(values: Mapping[str, Any], path: str) -> float:
    """Return the time that a state holds as "seconds", at least 0; `path` names the file in messages."""
    seconds = take(values, "seconds", float, path=path)
    if not 0 <= seconds <= _MOST_SECONDS:
        raise FileFormatError(f"{quoted(path)} must hold a time in 'seconds', got {seconds}")
    return seconds


_FINGERPRINTS: WeakKeyDictionary[BlockDataset, str] = WeakKeyDictionary()


def fingerprint(data: BlockDataset) -> str:
    """Return the sha256 of the ids, whatever integer type they are kept in; computed once for a data set."""
    if data not in _FINGERPRINTS:
        _FINGERPRINTS[data] = _sha256(data.ids)
    return _FINGERPRINTS[data]


def _sha256(row: Tensor) -> str:
    ids, digest = row.numpy(), hashlib.sha256()
    for start in range(0, len(ids), 1 << 20):
        digest.update(ids[start : start + (1 << 20)].astype("<i8").tobytes())
    return digest.hexdigest()


def environment(backend: DeviceBackend) -> dict[str, object]:
    """Return what must be the same for a resumed run to be equal bit for bit."""
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": backend.name,
    }


def _generator_tensors() -> dict[str, Tensor]:
    """Return the large parts of the global generators' states."""
    _, keys, *_ = np.random.get_state(legacy=True)  # noqa: NPY002 - the caller's own
    return {
        "rng.torch": torch.get_rng_state(),
        "rng.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),  # (624,)
        "rng.python": torch.tensor(random.getstate()[1], dtype=torch.int64, device="cpu"),  # (625,)
    }


def _generator_scalars() -> dict[str, object]:
    """Return the small parts of the global generators' states."""
    _, _, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the caller's own
    version, _, gauss_next = random.getstate()
    return {"numpy": [position, has_gauss, gauss], "python": [version, gauss_next]}


def restore_generators(scalars: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str) -> None:
    """Set the global generators to the states that `files` and `values` kept, or leave them all.

    Raises:
        CheckpointCorruptError: they are no such states; `path` names the file.
    """
    before = np.random.get_state(), random.getstate(), torch.get_rng_state()  # noqa: NPY002 - the caller's
    try:
        position, has_gauss, gauss = scalars["numpy"]
        version, gauss_next = scalars["python"]
        if type(position) is not int or not 0 <= position <= 624:  # numpy would read beyond its keys
            raise ValueError(position)
        keys = tensors["rng.numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, position, has_gauss, gauss))  # noqa: NPY002 - the caller's own
        random.setstate((version, tuple(tensors["rng.python"].tolist()), gauss_next))
        torch.set_rng_state(tensors["rng.torch"].clone())
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        np.random.set_state(before[0])  # noqa: NPY002 - the caller's own
        random.setstate(before[1])
        torch.set_rng_state(before[2])
        raise CheckpointCorruptError(f"{quoted(path)} holds no valid generator states") from error
