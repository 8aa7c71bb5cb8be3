"""What the processes of a training agree on: that they train the same, and what comes next after each step.

Everything that ends or changes a run reaches one process first: a signal, the clock, a callback. Each is told
to all at a place where all of them come by, so that all do the same. In one process there is nobody to tell.
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
    """What a run was asked for, in whichever process, up to a place where all of them come by."""

    interrupted: bool
    """To save and stop."""
    save: bool
    """To save."""
    reason: StopReason | None
    """To come to its end, and why."""
    seconds: float
    """The first process's time of the run."""


def agree(world: World, own: Asked) -> Asked:
    """Return what any process was asked for, and the first one's time.

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
    """See to it that all processes train the same: refuse what differs, and copy the first one's weights.

    Returns:
        The model's buffers, for `check_buffers` after the first step; of one process none.

    Raises:
        DataError: another process has another text.
        InputError: it has other settings, another model, device or build.
        PeerError: another process has failed, or is gone.
    """
    if world.size == 1:
        return {}
    train, val = trainer.train_data, trainer.val_data
    found = world.differing(
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
    if found is not None:
        rank, what = found
        kind = DataError if "text" in what else InputError
        raise kind(
            f"all processes must train the same, but process {rank} has another {what} than process 0. Start "
            "each with the same arguments, files, versions and number of threads, on one kind of machine"
        )
    world.copy_first(list(trainer.model.state_dict().values()))
    return {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}


def check_buffers(before: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse a model that changes its buffers while it trains: each process sees a part of a step only.

    Raises:
        InputError: names the first one.
    """
    for name, buffer in model.named_buffers():
        if name in before and before[name].shape == buffer.shape and not torch.equal(before[name], buffer):
            raise InputError(
                f"the model changes its buffer {name!r} in training, as batch normalisation does. Each "
                "of several processes sees a part of a step, and would have another: train it in one process"
            )


def _digest(values: dict[str, object]) -> str:
    return hashlib.sha256(strict_json.dumps(values)).hexdigest()
