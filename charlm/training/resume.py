"""Resumes a run from its newest whole checkpoint: read, check, apply.

The whole checkpoint is read and checked before the first live object changes. So a resume either succeeds or
changes nothing.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.backends.base import DeviceBackend
from charlm.data.blocks import BlockDataset
from charlm.data.rows import StoredRow
from charlm.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    FileFormatError,
    InputError,
    quoted,
    shown,
    warn,
)
from charlm.files import safetensors
from charlm.files.strict_json import take
from charlm.models.base import LanguageModel
from charlm.models.contents import Contents, passing_buffers, saved_tensors
from charlm.models.saving import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    build_model,
    build_tokenizer,
    check_tensors,
    model_settings,
)
from charlm.plain import as_int, as_path
from charlm.runs.checkpoint import (
    STATE_FILE,
    TRAIN_FILE,
    Checkpoint,
    checkpoint_names,
    read_checkpoint,
    scan_checkpoints,
)
from charlm.runs.choosing import newest_whole_checkpoint
from charlm.runs.directory import RunDirectory
from charlm.runs.writer import RunWriter
from charlm.training.callbacks import Callback
from charlm.training.config import MOST_STEPS, TrainerConfig, saved_config, with_end
from charlm.training.optimizers import OptimizerFactory
from charlm.training.saving import (
    characters_fingerprint,
    environment,
    is_of_prepared,
    is_same_text,
    optimizer_names,
    optimizer_state,
    restored_generators,
    saved_buffers,
)
from charlm.training.state import RunState
from charlm.training.timetable import Timetable, planned_end

if TYPE_CHECKING:
    from charlm.training.trainer import Trainer

__all__ = ["read_timetable", "resume", "warn_if_different"]

TrainerT = TypeVar("TrainerT", bound="Trainer")


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """The newest whole checkpoint of a run, with the parts of its state.json, whose types are checked."""

    run: RunDirectory
    names: frozenset[str]
    """The checkpoints that were there before this one was read."""
    checkpoint: Checkpoint
    where: str
    """Path of state.json, for messages."""
    config: TrainerConfig
    state: RunState
    timetable: Timetable | None
    repeats: bool
    optimizers: Sequence[object]
    asleep: Sequence[object]
    """Names of the model's parts that were in evaluation mode."""
    rates_are_shares: bool
    """Whether the groups of the caller's optimizer had shares of the schedule's learning rate."""
    callbacks: Sequence[Mapping[str, object]]
    data: Mapping[str, object]
    characters: object
    """Fingerprint of the tokenizer's characters; None: unknown."""
    block_size: Mapping[str, object]
    environment: Mapping[str, object]
    generators: Mapping[str, object]
    scaler: dict[str, object] | None


def _read(out_dir: Path) -> _Saved:
    """Read the newest whole checkpoint.

    Raises:
        CheckpointError: there is no run, or no whole checkpoint in it.
        FileFormatError: state.json has wrong content.
    """
    run = RunDirectory.open(out_dir)
    names = frozenset(checkpoint_names(run))
    checkpoint = newest_whole_checkpoint(run)
    values, where = checkpoint.state, str(checkpoint.info.path / STATE_FILE)

    def table(name: str) -> dict[str, object]:
        return take(values, name, dict, path=where)

    timetable, repeats = None, False
    if values.get("timetable") is not None:
        timetable = Timetable.from_dict(table("timetable"), path=where)
        repeats = take(table("timetable"), "repeats", bool, path=where)
    return _Saved(
        run=run,
        names=names,
        checkpoint=checkpoint,
        where=where,
        config=saved_config(table("config")),
        state=RunState.from_dict(values, path=where),
        timetable=timetable,
        repeats=repeats,
        optimizers=take(values, "optimizers", list, path=where),
        asleep=take({"asleep": [], **values}, "asleep", list, path=where),
        rates_are_shares=values.get("rates") == "shares",
        callbacks=take(values, "callbacks", list, path=where),
        data=table("data"),
        characters=_characters_of(checkpoint),
        block_size=table("block_size"),
        environment=table("environment"),
        generators=table("rng"),
        scaler=None if values.get("scaler") is None else table("scaler"),
    )


def _characters_of(checkpoint: Checkpoint) -> object:
    """Return the fingerprint of a run's characters; an older checkpoint has it only in its tokenizer file."""
    if "characters" in checkpoint.state or TOKENIZER_FILE not in checkpoint.files:
        return checkpoint.state.get("characters")
    return characters_fingerprint(build_tokenizer(checkpoint.files, checkpoint.info.path))


def read_timetable(run: str | Path) -> Timetable:
    """Return the decisions of the clock in a run with `minutes`, for `Trainer(..., timetable=...)`.

    With the same model, data and settings, the repetition gives the same bits.

    Args:
        run: its directory.

    Raises:
        CheckpointError: there is no run or no whole checkpoint in it, the run had no `minutes`, or it has
            not ended yet.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from charlm import BigramLM, BlockDataset, Trainer, TrainerConfig
        >>> folder, data = tempfile.mkdtemp() + "/run", BlockDataset(torch.arange(99) % 3, block_size=8)
        >>> config = TrainerConfig(minutes=0.01)
        >>> first = Trainer(BigramLM(3), data, config, out_dir=folder, device="cpu").fit()
        >>> again = Trainer(BigramLM(3), data, config, device="cpu", timetable=read_timetable(folder)).fit()
        >>> again.steps == first.steps
        True
    """
    saved, name = _read(as_path(run)), quoted(str(run))
    config, timetable = saved.config, saved.timetable
    if timetable is None:
        raise CheckpointError(
            f"{name} holds a run whose end is a number of steps, not a time: there is no timetable to repeat"
        )
    last = config.max_steps if timetable.end is None else min(timetable.end, config.max_steps)
    if saved.state.step < last and not saved.state.has_lost(config.patience):
        raise CheckpointError(f"the run in {name} has not ended yet: resume it first")
    return timetable


def warn_if_different(
    run: str | Path, train_data: BlockDataset, val_data: BlockDataset | None, backend: DeviceBackend
) -> None:
    """Warn if a repetition of a run has another text, or another build or device.

    Raises:
        CheckpointError: there is no run, or no whole checkpoint in it.
    """
    saved = _read(as_path(run))
    for name, data in (("train", train_data), ("val", val_data)):
        if not _is_text(saved, name, data):
            warn(f"{name}_data is not the text of the run in {quoted(str(run))}, so this is no repetition")
    _warn_if_elsewhere(saved, backend, "this is a repetition")


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
    minutes: float | None,
) -> TrainerT:
    """Build the trainer that continues from the newest whole checkpoint; see `Trainer.resume`."""
    saved = _read(out_dir)
    config, timetable = saved.config, saved.timetable
    if max_steps is not None and minutes is not None:
        raise ConfigError("max_steps and minutes are two ends for one run; give one of them")
    if max_steps is not None:
        config, timetable = _with_another_end(saved, max_steps), None
    if minutes is not None:
        config, timetable = _with_more_time(saved, minutes)
    moves_end = max_steps is not None or minutes is not None
    _check_data(saved, train_data, val_data)
    files, path = saved.checkpoint.files, saved.checkpoint.info.path
    tokenizer = build_tokenizer(files, path) if TOKENIZER_FILE in files else None
    model = _model(saved, model)
    weights = _weights(saved.checkpoint, model)
    trainer = cls(
        model,
        train_data,
        config,
        val_data=val_data,
        tokenizer=tokenizer,
        device=device,
        callbacks=callbacks,
        optimizer=optimizer,
        timetable=timetable if saved.repeats and not moves_end else None,
    )
    tensors = safetensors.loads(files[TRAIN_FILE], path=str(path / TRAIN_FILE))[0]
    moments = _moments(saved, trainer, tensors, own=optimizer is not None)
    _check_callbacks(saved, trainer.callbacks)
    best_weights = _best_weights(saved, model) if config.restore_best else None
    _load_scaler(saved, trainer)
    _warn_if_elsewhere(saved, trainer.backend, "the run goes on")

    # Everything is read and checked. From here on live objects change; those that may refuse come first.
    place = next(model.parameters()).device
    with restored_generators(saved.generators, tensors, saved.where):
        if len(saved.callbacks) == len(trainer.callbacks):
            for callback, callback_state in zip(trainer.callbacks, saved.callbacks, strict=True):
                callback.load_state(callback_state)
        Contents.saved(weights, saved_buffers(tensors, place)).put_into(model)
    if saved.asleep:
        model.train()
        for name, part in model.named_modules():
            part.training = name not in saved.asleep
    for parameter, own_optimizer, own_state in moments:
        own_optimizer.state[parameter] = own_state
    if trainer._stepper.rates_are_shares and not saved.rates_are_shares:
        for group in trainer.optimizers[0].param_groups:  # as at the beginning of the run
            del group["lr_scale"]
        trainer._stepper.rates_are_shares = False
    trainer._restore(
        saved.state,
        checkpoint=path,
        writer=RunWriter(out_dir, saved.run, saved.checkpoint.info, saved.names),
        timetable=timetable,
        best_weights=best_weights,
        moved_end=config != saved.config or (moves_end and saved.timetable is not None),
    )
    return trainer


def _with_another_end(saved: _Saved, max_steps: int) -> TrainerConfig:
    """Return the run's settings with a new end in steps."""
    done = saved.state.step
    if 0 < (as_int(max_steps) or 0) < done:
        raise ConfigError(f"max_steps must be at least the {done} steps done, got {max_steps}")
    config = with_end(saved.config, max_steps)
    # The clock decides nothing from here on; its choice of the scored part stays.
    return config if saved.timetable is None else config.replace(eval_chars=saved.timetable.eval_chars)


def _with_more_time(saved: _Saved, minutes: float) -> tuple[TrainerConfig, Timetable]:
    """Return the run's settings with another time, and the decisions of the clock that stay."""
    config = saved.config.replace(minutes=minutes)
    used = saved.state.seconds / 60
    if used >= (config.minutes or 0.0):
        raise ConfigError(f"minutes must be more than the {used:.1f} that the run has used, got {minutes}")
    if planned_end(config):
        raise ConfigError(
            f"a {config.schedule} schedule needs its end beforehand, so minutes cannot move it; max_steps can"
        )
    if saved.config.minutes is None:
        config = config.replace(max_steps=MOST_STEPS)
    before = saved.timetable or Timetable(eval_chars=config.eval_chars)
    return config, replace(before, ends=())


def _model(saved: _Saved, given: nn.Module | None) -> nn.Module:
    """Return the given model if it fits the weights, or build the saved one."""
    files, path = saved.checkpoint.files, saved.checkpoint.info.path
    if given is None:
        if CONFIG_FILE not in files:
            raise CheckpointError(f"{quoted(str(path))} does not say how to build its model; pass model=")
        return build_model(files, path, LanguageModel)
    if isinstance(given, LanguageModel) and CONFIG_FILE in files:
        kind, config = model_settings(files, path)
        if (kind, config) != (type(given), given.config):
            raise CheckpointMismatchError(
                f"{quoted(str(path))} holds a {kind.__name__} with {config}, not the model given: {given!r}"
            )
    return given


def _weights(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    path = str(checkpoint.info.path / WEIGHTS_FILE)
    data = checkpoint.files[WEIGHTS_FILE]
    own = saved_tensors(model)
    try:
        dtype = check_tensors(safetensors.parse_header(data, path=path), own, path)
    except FileFormatError as error:
        raise CheckpointMismatchError(f"the model given is not the one that was saved: {error}") from error
    if any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in own.values()):
        raise CheckpointMismatchError(f"the model given is not in {dtype}, in which it was saved")
    return safetensors.loads(data, path=path)[0]


def _moments(
    saved: _Saved, trainer: Trainer, tensors: Mapping[str, Tensor], *, own: bool
) -> list[tuple[nn.Parameter, Optimizer, dict[str, Tensor]]]:
    """Return the optimizer state of each parameter."""
    names = optimizer_names(trainer.optimizers)
    if saved.optimizers != names:
        raise CheckpointMismatchError(
            f"the run was trained with {reprlib.repr(saved.optimizers)[:200]}, got {names}; "
            "pass the same optimizer="
        )
    where = str(saved.checkpoint.info.path / TRAIN_FILE)
    return optimizer_state(tensors, trainer.model, trainer.optimizers, where, own=own)


def _load_scaler(saved: _Saved, trainer: Trainer) -> None:
    """Restore the state of the gradient scaler."""
    if trainer.scaler is None or saved.scaler is None:
        return
    try:
        trainer.scaler.load_state_dict(saved.scaler)
    except (RuntimeError, KeyError, TypeError) as error:
        raise CheckpointCorruptError(f"{quoted(saved.where)} holds no state of a gradient scaler") from error


def _check_callbacks(saved: _Saved, callbacks: Sequence[Callback]) -> None:
    """Raise unless the states of the run's callbacks can be restored; if none had a state, any will do."""
    if len(saved.callbacks) != len(callbacks) and any(saved.callbacks):
        raise CheckpointMismatchError(
            f"the run was saved with {len(saved.callbacks)} callbacks, got {len(callbacks)}; pass the same"
        )


def _best_weights(saved: _Saved, model: nn.Module) -> Contents | None:
    """Return the weights of the best evaluation so far, on the model's device, if they are on disk."""
    best, current = saved.state.best, saved.checkpoint
    if best is None:
        return None
    kept = current if best.step == current.info.step else None
    for info in scan_checkpoints(saved.run)[0]:
        if kept is None and info.step == best.step:
            with contextlib.suppress(OSError):  # damaged, or deleted by another process
                kept = read_checkpoint(info.path, saved.run.run_id)
    if kept is None:
        warn(
            f"the weights of the best evaluation, at step {best.step}, are not on disk; they cannot be "
            "restored at the end (keep_best is 0, or that checkpoint is damaged)"
        )
        return None
    device, passing = next(model.parameters()).device, {}
    if passing_buffers(model):
        path = str(kept.info.path / TRAIN_FILE)
        passing = saved_buffers(safetensors.loads(kept.files[TRAIN_FILE], path=path)[0], device)
    weights = {name: tensor.to(device) for name, tensor in _weights(kept, model).items()}
    return Contents.saved(weights, passing)


def _is_text(saved: _Saved, name: str, data: BlockDataset | None) -> bool:
    """Return whether data is the run's text of that name: the same ids with the same characters."""
    if data is None or data.tokenizer is None or saved.characters is None:
        return is_same_text(saved.data.get(name), data)
    same_characters = characters_fingerprint(data.tokenizer) == saved.characters
    return same_characters and is_same_text(saved.data.get(name), data)


def _check_data(saved: _Saved, train_data: BlockDataset, val_data: BlockDataset | None) -> None:
    for name, data in (("train", train_data), ("val", val_data)):
        if not isinstance(data, BlockDataset) and not (data is None and name == "val"):
            raise InputError(f"{name}_data must be a BlockDataset, got {shown(data)}")
        if not _is_text(saved, name, data):
            if is_of_prepared(saved.data.get(name)) and not (data and isinstance(data.row, StoredRow)):
                raise CheckpointMismatchError(
                    f"{name}_data is in memory, and the run was trained with a prepared corpus, which is "
                    "known by its files; pass the same corpus (BlockDataset.open)"
                )
            raise CheckpointMismatchError(
                f"{name}_data is not the text that the run was trained with; pass the same corpus, encoded "
                "with the same tokenizer and split at the same place. To train its model on another text, "
                "begin a run with it: charlm train FILE -o NEW --from RUN, or CharLM.extend"
            )
        if data is not None and saved.block_size.get(name) != data.block_size:
            raise CheckpointMismatchError(
                f"{name}_data has blocks of {data.block_size}, the run was trained with "
                f"{shown(saved.block_size.get(name))}"
            )


def _warn_if_elsewhere(saved: _Saved, backend: DeviceBackend, what: str) -> None:
    changed = [
        f"{name} was {quoted(str(saved.environment.get(name)), 40)}, is {value!r}"
        for name, value in environment(backend, saved.config).items()
        if saved.environment.get(name) != value
    ]
    if changed:
        warn(f"{what}, but not bit for bit: {'; '.join(changed)}")
