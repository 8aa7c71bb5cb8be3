"""`World`: the processes that train together, and what they tell one another.

A training in one process is a world of one, in which everybody knows everything. Larger ones are started by
torchrun, or by a program that has initialised torch.distributed; `join` finds out, and without either it
imports nothing. It knows of numbers and tensors, and nothing of training.

A process that fails says so in the next exchange of numbers, whichever that is, and so no other waits for it.
Therefore an exchange comes before every transfer of tensors. A process that is gone closes its connections,
and for one that hangs nobody waits longer than `TIMEOUT`.
"""

from __future__ import annotations

import atexit
import datetime as dt
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from typing_extensions import override

from charlm.backends.host import is_under_torchrun
from charlm.errors import CharLMError, InputError, PeerError

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel

    from charlm.backends.base import DeviceBackend

__all__ = ["TIMEOUT", "World", "alone", "join", "leave"]

T = TypeVar("T")

TIMEOUT = dt.timedelta(minutes=5)
"""The longest that a process waits for another: longer than a save, or a callback, should take."""

_NUMBERS, _TEXT = 6, 1_024  # of an exchange: numbers, and bytes in which a failure is described
_OF_PEERS = ("gloo", "peer", "NCCL")  # what torch's errors about other processes have in them

_alone: ContextVar[bool] = ContextVar("charlm_alone", default=False)


class World:
    """The world of one process.

    Attributes:
        rank: which process this is, from 0.
        size: W, how many there are.

    Example:
        >>> world = World()
        >>> world.is_first, world.agree([3.0]), world.tell(lambda: "all")
        (True, [[3.0]], 'all')
    """

    rank: int = 0
    size: int = 1

    def __deepcopy__(self, memo: object) -> World:
        """A copy of a trainer is in the same world."""
        return self

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, samples, and talks to people."""
        return self.rank == 0

    def agree(self, numbers: Sequence[float] = ()) -> list[list[float]]:
        """Tell all processes some numbers, at most six, and return everybody's, by rank.

        Raises:
            PeerError: another process has failed, or is gone.
        """
        return [list(numbers)]

    def tell(self, make: Callable[[], T]) -> T:
        """Return what the first process makes, everywhere.

        Args:
            make: called there alone; makes a value that JSON has.

        Raises:
            PeerError: another process has failed, or is gone.
        """
        return make()

    def rows(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        """Return all processes' rows of numbers: each one's first, by rank, then all second ones."""
        return [list(row) for row in rows]

    def gather(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """Return everybody's tensor (…), by rank, as (W, …). An exchange must have come right before it."""
        return tensor[None] if into is None else into.copy_(tensor)

    def trade(self, parts: Tensor, into: Tensor) -> None:
        """Give part i of (W, …) to process i, and put those that are given here into another tensor, by rank.

        An exchange must have come right before it.
        """
        into.copy_(parts)

    def overlapping(self, model: nn.Module) -> DistributedDataParallel:
        """Return the model with gradients that are added up over the processes in each backward pass.

        Raises:
            InputError: there is only one.
        """
        raise InputError("there must be several processes for gradients to be added up")

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Put into the tensors what the first process has there."""

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the other processes if the block fails here, so that they do not wait. All must be in one."""
        yield

    @contextmanager
    def unannounced(self) -> Iterator[None]:
        """Tell nobody if the block fails here: it transfers tensors, and is left when this process ends."""
        yield

    def is_spokesman(self) -> bool:
        """Return whether this is the process that says that one is gone: the first that asks."""
        return True

    def differing(self, what: Mapping[str, str]) -> tuple[int, str] | None:
        """Return the first process that has another value than the first one, and of what; None: none has."""
        first = self.tell(lambda: dict(what))
        own = next((i for i, name in enumerate(first) if what.get(name) != first[name]), -1)
        answers = [int(row[0]) for row in self.agree([own])]
        return next(((rank, list(first)[i]) for rank, i in enumerate(answers) if i >= 0), None)


class _Processes(World):
    """A world of several processes, which a group of torch.distributed connects.

    Args:
        group: carries tensors on the CPU, and on the device where the model is.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self._dist = torch.distributed
        self.group = group
        self.rank, self.size = self._dist.get_rank(group), self._dist.get_world_size(group)
        self._wrapped: WeakSet[DistributedDataParallel] = WeakSet()
        self._told: BaseException | None = None  # what the others know already
        self._sent = torch.zeros(1 + _NUMBERS, dtype=torch.float64, device="cpu")
        self._received = torch.zeros((self.size, 1 + _NUMBERS), dtype=torch.float64, device="cpu")

    @override
    def agree(self, numbers: Sequence[float] = ()) -> list[list[float]]:
        return [row[1:] for row in self._exchange(numbers, None)]

    @override
    def tell(self, make: Callable[[], T]) -> T:
        data = json.dumps(make()).encode() if self.is_first else b""
        length = int(self.agree([len(data)])[0][0])
        sent = torch.zeros(length, dtype=torch.uint8, device="cpu")
        if self.is_first:
            sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with _reaching():
            self._dist.broadcast(sent, group_src=0, group=self.group)
        told: T = json.loads(sent.numpy().tobytes())
        return told

    @override
    def rows(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        answers = self.agree([len(rows), len(rows[0]) if rows else 0])
        counts, width = [int(row[0]) for row in answers], max(int(row[1]) for row in answers)
        own = torch.zeros((max(counts), width), dtype=torch.float64, device="cpu")
        if rows:
            own[: len(rows)] = torch.tensor([list(row) for row in rows], dtype=torch.float64, device="cpu")
        found = self.gather(own).tolist()
        return [found[rank][i] for i in range(max(counts)) for rank in range(self.size) if i < counts[rank]]

    @override
    def gather(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        found = tensor.new_empty((self.size, *tensor.shape)) if into is None else into
        with _reaching():
            self._dist.all_gather_single(found.view(-1), tensor.contiguous().view(-1), group=self.group)
        return found

    @override
    def trade(self, parts: Tensor, into: Tensor) -> None:
        with _reaching():
            self._dist.all_to_all_single(into, parts, group=self.group)

    @override
    def overlapping(self, model: nn.Module) -> DistributedDataParallel:
        from torch.nn.parallel import DistributedDataParallel  # noqa: PLC0415 - only where it is used

        with _reaching():
            wrapped = DistributedDataParallel(model, process_group=self.group, forward_sync_buffers=False)
        self._wrapped.add(wrapped)
        return wrapped

    @override
    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        self.agree()
        with _reaching():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                self._dist.broadcast(whole, group_src=0, group=self.group)
                if not self.is_first:
                    tensor.detach().copy_(whole)

    @override
    @contextmanager
    def telling(self) -> Iterator[None]:
        try:
            yield
        except (GeneratorExit, PeerError):  # whoever leaves a loop leaves it everywhere; all know already
            raise
        except BaseException as error:
            if error is self._told:
                raise
            _failed.append(error)
            self._told = error
            told = str(error) if isinstance(error, CharLMError) else f"{type(error).__name__}: {error}"
            with suppress(PeerError, ValueError):  # one that is gone; connections that are closed
                self._exchange((), told)
            raise

    @override
    @contextmanager
    def unannounced(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._told = error  # the others wait in a transfer: they learn of it when this process ends
            if isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_PEERS):
                with _reaching():
                    raise
            raise

    @override
    def is_spokesman(self) -> bool:
        try:  # torchrun's own store outlives its processes
            store = self._dist.distributed_c10d._get_default_store()
            return bool(store.add("charlm/said", 1) == 1)
        except (RuntimeError, ValueError):
            return self.is_first

    def close(self) -> None:
        """Forget the group, of which nothing may be left when it is destroyed."""
        for wrapped in self._wrapped:
            for name in ("reducer", "logger", "process_group"):
                setattr(wrapped, name, None)
        self.group = None

    def _exchange(self, numbers: Sequence[float], failure: str | None) -> list[list[float]]:
        """Gather everybody's numbers, behind a 1 of those that have failed."""
        self._sent.zero_()
        self._sent[: 1 + len(numbers)] = torch.tensor([failure is not None, *numbers], dtype=torch.float64)
        with _reaching():
            self._dist.all_gather_single(self._received.view(-1), self._sent, group=self.group)
        rows = self._received.tolist()
        failed = next((rank for rank, row in enumerate(rows) if row[0]), None)
        if failed is not None:
            text = (failure or "").encode()[:_TEXT].ljust(_TEXT, b"\0")
            said = self.gather(torch.frombuffer(bytearray(text), dtype=torch.uint8))[failed].numpy().tobytes()
            if failure is None:
                reason = said.rstrip(b"\0").decode(errors="ignore")
                error = PeerError(
                    f"process {failed} of {self.size} has failed, so all stop. {reason}", rank=failed
                )
                _failed.append(error)
                raise error
        return rows


@contextmanager
def _reaching() -> Iterator[None]:
    """Turn what torch says of a process that is gone into PeerError."""
    try:
        yield
    except RuntimeError as error:
        _failed.append(error)
        raise PeerError(
            "another process of this training is gone, or has not answered for "
            f"{TIMEOUT.total_seconds():g} seconds. What was saved is intact: start all of them again, with "
            f"--resume or Trainer.resume. ({' '.join(str(error).split())[:200]})"
        ) from error


@contextmanager
def alone() -> Iterator[None]:
    """Let `join` return the world of this process alone inside the block: for trials."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


_failed: list[BaseException] = []
"""What has ended a training of several processes."""
_joined: dict[str, tuple[object, _Processes]] = {}
"""By the kind of collective: the default group at that time, and the world."""


def join(backend: DeviceBackend) -> World:
    """Return the world that this process is in: of all processes of torch.distributed, where it is in use.

    Under torchrun it is initialised here, which waits for all processes.

    Args:
        backend: knows which collectives work on its device.

    Raises:
        PeerError: some process has not come within `TIMEOUT`.
    """
    dist = torch.distributed
    if _alone.get() or not dist.is_available():
        return World()
    kind = backend.collectives
    if not dist.is_initialized():
        if not is_under_torchrun() or os.environ["WORLD_SIZE"] == "1":
            return World()
        with _reaching():
            from torch.distributed.distributed_c10d import PrefixStore  # noqa: PLC0415 - only where it is used
            from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415 - only where it is used

            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
            # torchrun keeps its store when it starts all again: what the dead wrote there must not be read.
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = PrefixStore(f"charlm/{again}", store)
            dist.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        atexit.register(leave)
        _joined.clear()
        _joined[kind] = dist.group.WORLD, _Processes(dist.group.WORLD)
    elif dist.get_world_size() == 1:
        return World()
    known = _joined.get(kind)
    if known is None or known[0] is not dist.group.WORLD:  # the caller's own group keeps its own timeout
        group = dist.new_group(backend=kind, timeout=TIMEOUT)
        known = dist.group.WORLD, _Processes(group)
        _joined[kind] = known
    return known[1]


def leave() -> None:
    """Leave the world, at the end of a program.

    Gloo's threads should be gone before the process ends: with them it aborts now and then. Where another
    process is gone, or has failed, to wait for it might take for ever: the end of this one closes all.
    """
    if _failed:
        return
    for _, world in _joined.values():
        world.close()
    _joined.clear()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
