"""What a trainer writes into a checkpoint, and how one is built back from it.

Everything that the next step depends on is here: weights (the model's files), optimizer state by
parameter name, the gradient scaler, counters, the best evaluation. Batches and dropout need nothing, they
have addresses. The states of torch's, numpy's and Python's own generators are kept for callbacks that draw
from them. All of a checkpoint is checked before the first live object changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import platform
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from charlm.backends.base import DeviceBackend
from charlm.data.blocks import BlockDataset
from charlm.errors import (
    CheckpointCorruptError,
    CheckpointError,
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
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    build_model,
    build_tokenizer,
    check_tensors,
    model_files,
    unique_tensors,
)
from charlm.text.tokenizer import Tokenizer
from charlm.training.callbacks import Callback
from charlm.training.checkpoint import (
    STATE_FILE,
    TRAIN_FILE,
    Checkpoint,
    list_checkpoints,
    read_checkpoint,
    scan_checkpoints,
)
from charlm.training.config import TrainerConfig
from charlm.training.metrics import eval_values, finite
from charlm.training.optimizers import OptimizerFactory
from charlm.training.records import Evaluation
from charlm.training.run import RunDirectory

if TYPE_CHECKING:
    from charlm.training.trainer import Trainer

__all__ = ["files", "finite_loss", "newest_whole_checkpoint", "resume", "values"]

TrainerT = TypeVar("TrainerT", bound="Trainer")


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
        "optimizers": _names(trainer),
        "scaler": None if trainer.scaler is None else trainer.scaler.state_dict(),
        "callbacks": [dict(callback.state()) for callback in trainer.callbacks],
        "data": {
            "train": _fingerprint(trainer.train_data),
            "val": None if trainer.val_data is None else _fingerprint(trainer.val_data),
        },
        "block_size": {
            "train": trainer.train_data.block_size,
            "val": None if trainer.val_data is None else trainer.val_data.block_size,
        },
        "environment": _environment(trainer.backend),
        "rng": _generator_scalars(),
    }


def finite_loss(evaluation: Evaluation | None) -> float | None:
    """Return the loss of an evaluation as a checkpoint is ranked by, or None."""
    if evaluation is None:
        return None
    loss = evaluation.result.loss_nats
    return loss if np.isfinite(loss) else None


def newest_whole_checkpoint(run: RunDirectory) -> Checkpoint:
    """Read the newest checkpoint that verifies; a damaged newer one is warned about.

    Raises:
        CheckpointError: there is none.
    """
    whole, damaged = scan_checkpoints(run)
    problems = []
    for path in sorted([*(info.path for info in whole), *damaged], reverse=True):  # names sort by step
        if path in damaged:
            problems.append(damaged[path])
            continue
        try:
            checkpoint = read_checkpoint(path, run.run_id)
        except OSError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(
                f"{problem}; going on from step {checkpoint.info.step}", RuntimeWarning, stacklevel=4
            )
        return checkpoint
    found = "; ".join(problems) or "none was saved"
    raise CheckpointError(f"no whole checkpoint in {quoted(str(run.path))}: {found}")


def resume(
    cls: type[TrainerT],
    out_dir: Path,
    train_data: BlockDataset,
    *,
    model: nn.Module | None,
    val_data: BlockDataset | None,
    optimizer: OptimizerFactory | None,
    callbacks: Sequence[Callback],
    device: str | DeviceBackend,
    max_steps: int | None,
) -> TrainerT:
    """Build the trainer that goes on from the newest whole checkpoint; see `Trainer.resume`."""
    run = RunDirectory.open(out_dir)
    checkpoint = newest_whole_checkpoint(run)
    path, state = checkpoint.info.path, checkpoint.state
    where = str(path / STATE_FILE)
    config = TrainerConfig.from_dict(take(state, "config", dict, path=where))
    if max_steps is not None:
        config = config.replace(max_steps=max_steps)
    _check_data(state, train_data, val_data, where)
    tokenizer: Tokenizer | None = None
    if TOKENIZER_FILE in checkpoint.files:
        tokenizer = build_tokenizer(checkpoint.files, path)
    saved: LanguageModel | None = None
    if CONFIG_FILE in checkpoint.files:
        saved = build_model(checkpoint.files, path, LanguageModel)
    if model is None:
        if saved is None:
            raise CheckpointError(f"{quoted(str(path))} does not say how to build its model; pass model=")
        model = saved
    elif isinstance(model, LanguageModel) and saved is not None and model.config != saved.config:
        raise CheckpointMismatchError(
            f"{quoted(str(path))} holds {saved!r}, which is not the model given: {model!r}"
        )
    weights = _weights(checkpoint, model)

    trainer = cls(
        model,
        train_data,
        config,
        val_data=val_data,
        tokenizer=tokenizer,
        device=device,
        callbacks=callbacks,
        optimizer=optimizer,
    )
    if take(state, "optimizers", list, path=where) != _names(trainer):
        raise CheckpointMismatchError(
            f"the run was trained with {state['optimizers']}, got {_names(trainer)}; pass the same optimizer="
        )
    tensors, _ = safetensors.loads(checkpoint.files[TRAIN_FILE], path=str(path / TRAIN_FILE))
    moments = _optimizer_state(tensors, trainer, str(path / TRAIN_FILE), own=optimizer is not None)
    best = _evaluation(state, "best", where)
    last = _evaluation(state, "last", where)
    states = take(state, "callbacks", list, path=where)
    if len(states) != len(trainer.callbacks) and any(states):  # those that remember nothing may stay away
        raise CheckpointMismatchError(
            f"the run was saved with {len(states)} callbacks, got {len(trainer.callbacks)}; pass the same"
        )
    best_weights = _best_weights(run, checkpoint, best, model) if config.restore_best else {}
    chars_seen = take(state, "chars_seen", int, path=where)
    seconds = take(state, "seconds", float, path=where)
    evaluations_since_best = take(state, "evaluations_since_best", int, path=where)
    scaler_state = None if state.get("scaler") is None else take(state, "scaler", dict, path=where)
    generators = take(state, "rng", dict, path=where)

    # All is read and checked: from here on live objects change.
    with torch.no_grad():
        for name, tensor in unique_tensors(model).items():
            tensor.copy_(weights[name])
    for parameter, own_optimizer, own_state in moments:
        own_optimizer.state[parameter] = own_state
    if trainer.scaler is not None and scaler_state is not None:
        trainer.scaler.load_state_dict(scaler_state)
    if len(states) == len(trainer.callbacks):
        for callback, callback_state in zip(trainer.callbacks, states, strict=True):
            callback.load_state(callback_state)
    trainer.out_dir = out_dir
    trainer.step = checkpoint.info.step
    trainer.chars_seen = chars_seen
    trainer.seconds = seconds
    trainer.best, trainer.last = best, last
    trainer.checkpoint = path
    trainer._run = run
    trainer._saved_step = trainer.step
    trainer._evaluations_since_best = evaluations_since_best
    trainer._best_weights = best_weights
    _warn_if_elsewhere(state, trainer.backend)
    _restore_generators(generators, tensors, where)
    return trainer


def _weights(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    path = str(checkpoint.info.path / WEIGHTS_FILE)
    data = checkpoint.files[WEIGHTS_FILE]
    try:
        check_tensors(safetensors.parse_header(data, path=path), unique_tensors(model), path)
    except FileFormatError as error:
        raise CheckpointMismatchError(f"the model given is not the one that was saved: {error}") from error
    return safetensors.loads(data, path=path)[0]


def _best_weights(
    run: RunDirectory, current: Checkpoint, best: Evaluation | None, model: nn.Module
) -> dict[str, Tensor]:
    """Return the weights of the best evaluation so far, from the checkpoint that was kept for it."""
    if best is None:
        return {}
    kept = current if best.step == current.info.step else None
    for info in list_checkpoints(run):
        if kept is None and info.step == best.step:
            with contextlib.suppress(CheckpointCorruptError):
                kept = read_checkpoint(info.path, run.run_id)
    if kept is None:
        warnings.warn(
            f"the weights of the best evaluation, at step {best.step}, are not on disk; they cannot be "
            "restored at the end (keep_best is 0, or that checkpoint is damaged)",
            RuntimeWarning,
            stacklevel=4,
        )
        return {}
    device = next(model.parameters()).device
    return {name: tensor.clone().to(device) for name, tensor in _weights(kept, model).items()}


def _names(trainer: Trainer) -> list[str]:
    return [type(optimizer).__name__ for optimizer in trainer.optimizers]


def _optimizer_state(
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


def _evaluation(state: Mapping[str, object], name: str, path: str) -> Evaluation | None:
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
    )
    return Evaluation(
        step=take(saved, "step", int, path=path),
        result=result,
        is_best=take(saved, "is_best", bool, path=path),
        seconds=take(saved, "seconds", float, path=path),
    )


def _fingerprint(data: BlockDataset) -> str:
    """Return the sha256 of the ids, whatever integer type they are kept in."""
    ids, digest = data.ids.numpy(), hashlib.sha256()
    for start in range(0, len(ids), 1 << 20):
        digest.update(ids[start : start + (1 << 20)].astype("<i8").tobytes())
    return digest.hexdigest()


def _check_data(
    state: Mapping[str, object], train_data: BlockDataset, val_data: BlockDataset | None, path: str
) -> None:
    saved = take(state, "data", dict, path=path)
    for name, data in (("train", train_data), ("val", val_data)):
        now = None if data is None else _fingerprint(data)
        if saved.get(name) != now:
            raise CheckpointMismatchError(
                f"{name}_data is not the text that the run was trained with; pass the same corpus, encoded "
                "with the same tokenizer and split at the same place"
            )
    sizes = take(state, "block_size", dict, path=path)
    for name, data in (("train", train_data), ("val", val_data)):
        if data is not None and sizes.get(name) != data.block_size:
            raise CheckpointMismatchError(
                f"{name}_data has blocks of {data.block_size}, the run was trained with {sizes.get(name)}"
            )


def _environment(backend: DeviceBackend) -> dict[str, object]:
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": backend.name,
    }


def _warn_if_elsewhere(state: Mapping[str, object], backend: DeviceBackend) -> None:
    then = cast("dict[str, object]", state.get("environment") or {})
    changed = [
        f"{name} was {quoted(str(then.get(name)), 40)}, is {value!r}"
        for name, value in _environment(backend).items()
        if then.get(name) != value
    ]
    if changed:
        warnings.warn(
            f"the run goes on, but not bit for bit: {'; '.join(changed)}", RuntimeWarning, stacklevel=2
        )


def _generator_tensors() -> dict[str, Tensor]:
    """Return the large parts of the global generators' states."""
    _, keys, *_ = np.random.get_state(legacy=True)  # noqa: NPY002 - the caller's own
    return {
        "rng.torch": torch.get_rng_state(),
        "rng.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),  # (624,)
        "rng.python": torch.tensor(random.getstate()[1], dtype=torch.int64),  # (625,)
    }


def _generator_scalars() -> dict[str, object]:
    """Return the small parts of the global generators' states."""
    _, _, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the caller's own
    version, _, gauss_next = random.getstate()
    return {"numpy": [position, has_gauss, gauss], "python": [version, gauss_next]}


def _restore_generators(scalars: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str) -> None:
    try:
        position, has_gauss, gauss = scalars["numpy"]
        version, gauss_next = scalars["python"]
        keys = tensors["rng.numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, position, has_gauss, gauss))  # noqa: NPY002 - the caller's own
        random.setstate((version, tuple(tensors["rng.python"].tolist()), gauss_next))
        torch.set_rng_state(tensors["rng.torch"].clone())
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointCorruptError(f"{quoted(path)} holds no valid generator states") from error
