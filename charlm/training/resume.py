"""From a run's newest whole checkpoint to a trainer that goes on.

All of a checkpoint is read and checked before the first live object changes: a resume succeeds whole, or
leaves everything as it was.
"""

from __future__ import annotations

import contextlib
import os
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from charlm.backends.base import DeviceBackend
from charlm.data.blocks import BlockDataset
from charlm.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    FileFormatError,
    InputError,
    quoted,
    shown,
)
from charlm.files import safetensors
from charlm.files.strict_json import take
from charlm.models.base import LanguageModel
from charlm.models.saving import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    build_model,
    build_tokenizer,
    check_tensors,
    model_settings,
    unique_tensors,
)
from charlm.plain import as_int
from charlm.runs.checkpoint import (
    STATE_FILE,
    TRAIN_FILE,
    Checkpoint,
    checkpoint_names,
    read_checkpoint,
    scan_checkpoints,
)
from charlm.runs.directory import RunDirectory
from charlm.text.tokenizer import Tokenizer
from charlm.training.callbacks import Callback
from charlm.training.config import saved_config
from charlm.training.optimizers import OptimizerFactory
from charlm.training.records import Evaluation
from charlm.training.state import (
    environment,
    fingerprint,
    optimizer_names,
    optimizer_state,
    read_evaluation,
    restore_generators,
    take_seconds,
)
from charlm.training.timetable import Timetable
from charlm.training.writer import RunWriter

if TYPE_CHECKING:
    from charlm.training.trainer import Trainer

__all__ = ["newest_whole_checkpoint", "read_timetable", "resume", "warn_if_different"]

TrainerT = TypeVar("TrainerT", bound="Trainer")


def newest_whole_checkpoint(run: RunDirectory) -> Checkpoint:
    """Read the newest checkpoint that verifies; a damaged newer one is warned about.

    Raises:
        CheckpointError: there is none, or a newer charlm wrote the newest.
    """
    deleted = True
    while deleted:  # by a process that trains there, which has saved a newer one before: look again
        deleted = False
        whole, damaged = scan_checkpoints(run)
        problems: list[OSError] = []
        for path in sorted([*(info.path for info in whole), *damaged], reverse=True):  # names sort by step
            try:
                if path in damaged:
                    raise damaged[path]
                checkpoint = read_checkpoint(path, run.run_id)
            except OSError as error:
                deleted = not os.path.lexists(path)
                if deleted:
                    break
                if isinstance(error, CheckpointError) and not isinstance(error, CheckpointCorruptError):
                    raise  # it is whole, and what came before it is not what the caller means
                problems.append(error)
                continue
            for problem in problems:
                warnings.warn(
                    f"{problem}; going on from step {checkpoint.info.step}", RuntimeWarning, stacklevel=4
                )
            return checkpoint
    found = "; ".join(map(str, problems)) or "none was saved. Delete the directory and begin anew"
    raise CheckpointError(f"no whole checkpoint in {quoted(str(run.path))}: {found}")


def read_timetable(run: str | Path) -> Timetable:
    """Return what the clock decided in a run with `minutes`, to repeat it with `Trainer(..., timetable=...)`.

    With the same model, data and settings the repetition gives the same bits.

    Args:
        run: its directory.

    Raises:
        CheckpointError: there is no run, no whole checkpoint in it, it had no `minutes`, or it has not
            ended yet.

    Example:
        >>> import tempfile
        >>> from charlm import BigramLM, BlockDataset, Trainer, TrainerConfig
        >>> folder, data = tempfile.mkdtemp() + "/run", BlockDataset(torch.arange(99) % 3, block_size=8)
        >>> config = TrainerConfig(minutes=0.01)
        >>> first = Trainer(BigramLM(3), data, config, out_dir=folder, device="cpu").fit()
        >>> again = Trainer(BigramLM(3), data, config, device="cpu", timetable=read_timetable(folder)).fit()
        >>> again.steps == first.steps
        True
    """
    directory = RunDirectory.open(Path(run))
    checkpoint = newest_whole_checkpoint(directory)
    name, where = quoted(str(run)), str(checkpoint.info.path / STATE_FILE)
    if checkpoint.state.get("timetable") is None:
        raise CheckpointError(f"{name} holds a run that did not depend on the clock: its settings repeat it")
    values = take(checkpoint.state, "timetable", dict, path=where)
    timetable = Timetable.from_dict(values, path=where)
    config = saved_config(take(checkpoint.state, "config", dict, path=where))
    since_best = take(checkpoint.state, "evaluations_since_best", int, path=where)
    last = config.max_steps if timetable.end is None else min(timetable.end, config.max_steps)
    lost_patience = config.patience is not None and since_best >= config.patience
    if checkpoint.info.step < last and not lost_patience:
        raise CheckpointError(f"the run in {name} has not come to its end yet: go on with it first")
    return timetable


def warn_if_different(
    run: str | Path, train_data: BlockDataset, val_data: BlockDataset | None, backend: DeviceBackend
) -> None:
    """Warn where a repetition of a run has another text, or goes on where bits are not the same.

    Raises:
        CheckpointError: there is no run, or no whole checkpoint in it.
    """
    checkpoint = newest_whole_checkpoint(RunDirectory.open(Path(run)))
    where = str(checkpoint.info.path / STATE_FILE)
    saved = take(checkpoint.state, "data", dict, path=where)
    for name, data in (("train", train_data), ("val", val_data)):
        if saved.get(name) != (None if data is None else fingerprint(data)):
            warnings.warn(
                f"{name}_data is not the text of the run in {quoted(str(run))}, so this is no repetition",
                RuntimeWarning,
                stacklevel=2,
            )
    _warn_if_elsewhere(take(checkpoint.state, "environment", dict, path=where), backend)


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
    known = checkpoint_names(run)
    checkpoint = newest_whole_checkpoint(run)
    path, state = checkpoint.info.path, checkpoint.state
    where = str(path / STATE_FILE)
    config = saved_config(take(state, "config", dict, path=where))
    timetable, repeats = None, False
    if state.get("timetable") is not None:
        values = take(state, "timetable", dict, path=where)
        timetable, repeats = (
            Timetable.from_dict(values, path=where),
            take(values, "repeats", bool, path=where),
        )
    new_end = False
    if max_steps is not None:
        if 0 < (as_int(max_steps) or 0) < checkpoint.info.step:
            raise ConfigError(
                f"max_steps must be at least the {checkpoint.info.step} steps done, got {max_steps}"
            )
        new_end = max_steps != config.max_steps or timetable is not None
        config = config.replace(max_steps=max_steps)
        if timetable is not None:  # from here on the clock decides nothing; what it chose to score stays
            by_the_clock = config.eval_interval is None
            config = config.replace(
                minutes=None,
                eval_chars=timetable.eval_chars,
                eval_interval=-(-config.max_steps // 5) if by_the_clock else config.eval_interval,
            )
            timetable, repeats = None, False
    _check_data(state, train_data, val_data, where)
    tokenizer: Tokenizer | None = None
    if TOKENIZER_FILE in checkpoint.files:
        tokenizer = build_tokenizer(checkpoint.files, path)
    if model is None:
        if CONFIG_FILE not in checkpoint.files:
            raise CheckpointError(f"{quoted(str(path))} does not say how to build its model; pass model=")
        model = build_model(checkpoint.files, path, LanguageModel)
    elif isinstance(model, LanguageModel) and CONFIG_FILE in checkpoint.files:
        kind, saved = model_settings(checkpoint.files, path)
        if (kind, saved) != (type(model), model.config):
            raise CheckpointMismatchError(
                f"{quoted(str(path))} holds a {kind.__name__} with {saved}, not the model given: {model!r}"
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
        timetable=timetable if repeats else None,
    )
    names = optimizer_names(trainer)
    if take(state, "optimizers", list, path=where) != names:
        raise CheckpointMismatchError(
            f"the run was trained with {reprlib.repr(state['optimizers'])[:200]}, got {names}; "
            "pass the same optimizer="
        )
    tensors, _ = safetensors.loads(checkpoint.files[TRAIN_FILE], path=str(path / TRAIN_FILE))
    moments = optimizer_state(tensors, trainer, str(path / TRAIN_FILE), own=optimizer is not None)
    best = read_evaluation(state, "best", where)
    last = read_evaluation(state, "last", where)
    states = take(state, "callbacks", list, path=where)
    if len(states) != len(trainer.callbacks) and any(states):  # those that remember nothing may stay away
        raise CheckpointMismatchError(
            f"the run was saved with {len(states)} callbacks, got {len(trainer.callbacks)}; pass the same"
        )
    best_weights = _best_weights(run, checkpoint, best, model) if config.restore_best else {}
    chars_seen = take(state, "chars_seen", int, path=where)
    seconds = take_seconds(state, where)
    evaluations_since_best = take(state, "evaluations_since_best", int, path=where)
    scaler_state = None if state.get("scaler") is None else take(state, "scaler", dict, path=where)
    generators = take(state, "rng", dict, path=where)

    if trainer.scaler is not None and scaler_state is not None:
        try:
            trainer.scaler.load_state_dict(scaler_state)
        except (RuntimeError, KeyError, TypeError) as error:
            raise CheckpointCorruptError(f"{quoted(where)} holds no state of a gradient scaler") from error
    _warn_if_elsewhere(take(state, "environment", dict, path=where), trainer.backend)

    # All is read and checked: from here on live objects change, first those that may refuse.
    if len(states) == len(trainer.callbacks):
        for callback, callback_state in zip(trainer.callbacks, states, strict=True):
            callback.load_state(callback_state)
    restore_generators(generators, tensors, where)
    with torch.no_grad():
        for name, tensor in unique_tensors(model).items():
            tensor.copy_(weights[name])
    for parameter, own_optimizer, own_state in moments:
        own_optimizer.state[parameter] = own_state
    if timetable is not None:
        trainer._timekeeper.timetable = timetable
    trainer.out_dir = out_dir
    trainer.step = checkpoint.info.step
    trainer.chars_seen = chars_seen
    trainer.seconds = seconds
    trainer.best, trainer.last = best, last
    trainer.checkpoint = path
    trainer._writer = RunWriter(out_dir, run, checkpoint.info, known)
    trainer._evaluations_since_best = evaluations_since_best
    trainer._other_weights = best_weights
    trainer._new_end = new_end
    return trainer


def _weights(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    path = str(checkpoint.info.path / WEIGHTS_FILE)
    data = checkpoint.files[WEIGHTS_FILE]
    own = unique_tensors(model)
    try:
        dtype = check_tensors(safetensors.parse_header(data, path=path), own, path)
    except FileFormatError as error:
        raise CheckpointMismatchError(f"the model given is not the one that was saved: {error}") from error
    if any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in own.values()):
        raise CheckpointMismatchError(f"the model given is not in {dtype}, in which it was saved")
    return safetensors.loads(data, path=path)[0]


def _best_weights(
    run: RunDirectory, current: Checkpoint, best: Evaluation | None, model: nn.Module
) -> dict[str, Tensor]:
    """Return the weights of the best evaluation so far, from the checkpoint that was kept for it."""
    if best is None:
        return {}
    kept = current if best.step == current.info.step else None
    for info in scan_checkpoints(run)[0]:
        if kept is None and info.step == best.step:
            with contextlib.suppress(OSError):  # damaged, or deleted by a process that trains there
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


def _check_data(
    state: Mapping[str, object], train_data: BlockDataset, val_data: BlockDataset | None, path: str
) -> None:
    saved = take(state, "data", dict, path=path)
    for name, data in (("train", train_data), ("val", val_data)):
        if not isinstance(data, BlockDataset) and not (data is None and name == "val"):
            raise InputError(f"{name}_data must be a BlockDataset, got {shown(data)}")
        now = None if data is None else fingerprint(data)
        if saved.get(name) != now:
            raise CheckpointMismatchError(
                f"{name}_data is not the text that the run was trained with; pass the same corpus, encoded "
                "with the same tokenizer and split at the same place"
            )
    sizes = take(state, "block_size", dict, path=path)
    for name, data in (("train", train_data), ("val", val_data)):
        if data is not None and sizes.get(name) != data.block_size:
            raise CheckpointMismatchError(
                f"{name}_data has blocks of {data.block_size}, the run was trained with "
                f"{shown(sizes.get(name))}"
            )


def _warn_if_elsewhere(then: Mapping[str, object], backend: DeviceBackend) -> None:
    changed = [
        f"{name} was {quoted(str(then.get(name)), 40)}, is {value!r}"
        for name, value in environment(backend).items()
        if then.get(name) != value
    ]
    if changed:
        warnings.warn(
            f"the run goes on, but not bit for bit: {'; '.join(changed)}", RuntimeWarning, stacklevel=3
        )
