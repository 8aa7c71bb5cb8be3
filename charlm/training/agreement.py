"""The agreement of the processes of a training: the same training, and the same decision after each step.

A signal, the clock or a callback reaches one process first. It is shared with all processes at a place that
all of them pass, so that all do the same. A single process has nothing to share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from torch import Tensor, nn

from charlm.backends.world import World
from charlm.errors import DataError, InputError
from charlm.files import strict_json
from charlm.training.records import StopReason
from charlm.training.saving import environment, fingerprint, optimizer_names

if TYPE_CHECKING:
    from charlm.training.trainer import Trainer

__all__ = ["Asked", "agree", "check_buffers", "meet"]

_REASONS: tuple[StopReason, ...] = get_args(StopReason)


class Asked(NamedTuple):
    """The requests to a run, in any process, and its time."""

    interrupted: bool
    """Whether to save and stop."""
    save: bool
    """Whether to save."""
    reason: StopReason | None
    """Why to end the run; None: continue."""
    seconds: float
    """Time of the run, in the first process."""


def agree(world: World, own: Asked) -> Asked:
    """Return the requests to any process, and the time of the first one.

    Raises:
        PeerError: another process has failed, or is gone.
    """
    if world.size == 1:
        return own
    reason = -1 if own.reason is None else _REASONS.index(own.reason)
    rows = world.agree([own.interrupted, own.save, reason, own.seconds])
    reasons = [int(row[2]) for row in rows if row[2] >= 0]
    return Asked(
        interrupted=any(row[0] for row in rows),
        save=any(row[1] for row in rows),
        reason=_REASONS[reasons[0]] if reasons else None,
        seconds=rows[0][3],
    )


def meet(world: World, trainer: Trainer) -> dict[str, Tensor]:
    """Check that all processes train the same, and copy the weights of the first one.

    Returns:
        The model's buffers, for `check_buffers` after the first step; none in a single process.

    Raises:
        DataError: another process has another text.
        InputError: another process has other settings, or another model, device or build.
        PeerError: another process has failed, or is gone.
    """
    if world.size == 1:
        return {}
    train, val = trainer.train_data, trainer.val_data
    difference = world.differing(
        {
            "training text": fingerprint(train),
            "validation text": "" if val is None else fingerprint(val),
            "block size": f"{train.block_size} {None if val is None else val.block_size}",
            "choice of settings": _digest({**trainer.config.to_dict(), "precision": trainer.precision}),
            "model": _digest(
                {n: f"{t.dtype} {list(t.shape)}" for n, t in trainer.model.state_dict().items()}
            ),
            "optimizer": " ".join(optimizer_names(trainer.optimizers)),
            "number of steps done": str(trainer.step),
            "build or device": _digest(
                {
                    **environment(trainer.backend, trainer.config),
                    "processor": torch.backends.cpu.get_cpu_capability(),
                }
            ),
        }
    )
    if difference is not None:
        rank, what = difference
        kind = DataError if "text" in what else InputError
        raise kind(
            f"all processes must train the same, but process {rank} has another {what} than process 0. Start "
            "each with the same arguments, files, versions and number of threads, on one kind of machine"
        )
    world.copy_first(list(trainer.model.state_dict().values()))
    return {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}


def check_buffers(before: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise InputError if training changes a buffer, since each process sees only a part of a step."""
    for name, buffer in model.named_buffers():
        if name in before and before[name].shape == buffer.shape and not torch.equal(before[name], buffer):
            raise InputError(
                f"the model changes its buffer {name!r} in training, as batch normalisation does. Each "
                "of several processes sees a part of a step, and would have another: train it in one process"
            )


def _digest(values: dict[str, object]) -> str:
    return hashlib.sha256(strict_json.dumps(values)).hexdigest()
