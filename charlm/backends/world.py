"""`World`: the processes that train together, and their communication.

A training in one process has a world of one. Larger worlds are started by torchrun, or by a program that has
initialised torch.distributed; without either, `join` imports nothing. This module knows numbers and tensors,
and no training.

A process that fails reports it in the next exchange of numbers, so that no other process waits for it.
Therefore an exchange precedes every transfer of tensors. A process that is gone closes its connections. No
process waits for another one longer than `TIMEOUT`.
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
"""The longest time that a process waits for another: longer than a save or a callback should take."""

_NUMBERS, _TEXT = 6, 1_024  # of an exchange: the most numbers, and the bytes of an error message
_OF_PEERS = ("gloo", "peer", "NCCL")  # words in torch's errors about other processes

_alone: ContextVar[bool] = ContextVar("charlm_alone", default=False)


class World:
    """The world of one process.

    Attributes:
        rank: number of this process, from 0.
        size: W, the number of processes.

    Example:
        >>> world = World()
        >>> world.is_first, world.agree([3.0]), world.tell(lambda: "all")
        (True, [[3.0]], 'all')
    """

    rank: int = 0
    size: int = 1

    def __deepcopy__(self, memo: object) -> World:
        """Return the same world, which a copy of a trainer shares."""
        return self

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, samples and shows progress."""
        return self.rank == 0

    def agree(self, numbers: Sequence[float] = ()) -> list[list[float]]:
        """Send at most six numbers to all processes, and return those of every process, by rank.

        Raises:
            PeerError: another process has failed, or is gone.
        """
        return [list(numbers)]

    def tell(self, make: Callable[[], T]) -> T:
        """Return the value of the first process in all processes.

        Args:
            make: called in the first process alone; returns a value of JSON.

        Raises:
            PeerError: another process has failed, or is gone.
        """
        return make()

    def rows(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        """Return the rows of all processes: the first of each, by rank, then all second ones, and so on."""
        return [list(row) for row in rows]

    def gather(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """Return the tensors (…) of all processes as (W, …), by rank. An exchange must precede it."""
        return tensor[None] if into is None else into.copy_(tensor)

    def trade(self, parts: Tensor, into: Tensor) -> None:
        """Send part i of (W, …) to process i, and write the received parts into another tensor, by rank.

        An exchange must precede it.
        """
        into.copy_(parts)

    def overlapping(self, model: nn.Module) -> DistributedDataParallel:
        """Return the model wrapped so that each backward pass sums gradients over the processes.

        Raises:
            InputError: there is only one process.
        """
        raise InputError("there must be several processes for gradients to be added up")

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Copy the values of the first process into these tensors."""

    @contextmanager
    def telling(self) -> Iterator[None]:
        """If the block fails, tell the other processes, so that they do not wait. All must be in a block."""
        yield

    @contextmanager
    def unannounced(self) -> Iterator[None]:
        """Tell no process if the block fails: it transfers tensors, and ends when this process ends."""
        yield

    def is_spokesman(self) -> bool:
        """Return whether this process reports that another one is gone: the first process that asks does."""
        return True

    def differing(self, what: Mapping[str, str]) -> tuple[int, str] | None:
        """Return the first process that differs from process 0, and the name of the value, or None."""
        first = self.tell(lambda: dict(what))
        own = next((i for i, name in enumerate(first) if what.get(name) != first[name]), -1)
        answers = [int(row[0]) for row in self.agree([own])]
        return next(((rank, list(first)[i]) for rank, i in enumerate(answers) if i >= 0), None)


class _Processes(World):
    """A world of several processes, connected by a group of torch.distributed.

    Args:
        group: transfers tensors on the CPU and on the model's device.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self._dist = torch.distributed
        self.group = group
        self.rank, self.size = self._dist.get_rank(group), self._dist.get_world_size(group)
        self._wrapped: WeakSet[DistributedDataParallel] = WeakSet()
        self._told: BaseException | None = None  # the error that the others know
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
        message: T = json.loads(sent.numpy().tobytes())
        return message

    @override
    def rows(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        answers = self.agree([len(rows), len(rows[0]) if rows else 0])
        counts, width = [int(row[0]) for row in answers], max(int(row[1]) for row in answers)
        own = torch.zeros((max(counts), width), dtype=torch.float64, device="cpu")
        if rows:
            own[: len(rows)] = torch.tensor([list(row) for row in rows], dtype=torch.float64, device="cpu")
        every = self.gather(own).tolist()
        return [every[rank][i] for i in range(max(counts)) for rank in range(self.size) if i < counts[rank]]

    @override
    def gather(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        every = tensor.new_empty((self.size, *tensor.shape)) if into is None else into
        with _reaching():
            self._dist.all_gather_single(every.view(-1), tensor.contiguous().view(-1), group=self.group)
        return every

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
        except (GeneratorExit, PeerError):  # all processes leave a loop, or know the error already
            raise
        except BaseException as error:
            if error is self._told:
                raise
            _failed.append(error)
            self._told = error
            message = str(error) if isinstance(error, CharLMError) else f"{type(error).__name__}: {error}"
            with suppress(PeerError, ValueError):  # a process is gone, or connections are closed
                self._exchange((), message)
            raise

    @override
    @contextmanager
    def unannounced(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._told = error  # the others wait in a transfer until this process ends
            if isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_PEERS):
                with _reaching():
                    raise
            raise

    @override
    def is_spokesman(self) -> bool:
        try:  # the store of torchrun outlives its processes
            store = self._dist.distributed_c10d._get_default_store()
            return bool(store.add("charlm/said", 1) == 1)
        except (RuntimeError, ValueError):
            return self.is_first

    def close(self) -> None:
        """Drop all references to the group before it is destroyed."""
        for wrapped in self._wrapped:
            for name in ("reducer", "logger", "process_group"):
                setattr(wrapped, name, None)
        self.group = None

    def _exchange(self, numbers: Sequence[float], failure: str | None) -> list[list[float]]:
        """Gather the numbers of all processes; a row begins with 1 if its process has failed."""
        self._sent.zero_()
        self._sent[: 1 + len(numbers)] = torch.tensor([failure is not None, *numbers], dtype=torch.float64)
        with _reaching():
            self._dist.all_gather_single(self._received.view(-1), self._sent, group=self.group)
        rows = self._received.tolist()
        failed = next((rank for rank, row in enumerate(rows) if row[0]), None)
        if failed is not None:
            text = (failure or "").encode()[:_TEXT].ljust(_TEXT, b"\0")
            texts = self.gather(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            if failure is None:
                reason = texts[failed].numpy().tobytes().rstrip(b"\0").decode(errors="ignore")
                error = PeerError(
                    f"process {failed} of {self.size} has failed, so all stop. {reason}", rank=failed
                )
                _failed.append(error)
                raise error
        return rows


@contextmanager
def _reaching() -> Iterator[None]:
    """Turn torch's error about a process that is gone into PeerError."""
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
    """Let `join` return the world of this process alone inside the block, for trials."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


_failed: list[BaseException] = []
"""The errors that ended trainings of several processes."""
_joined: dict[str, tuple[object, _Processes]] = {}
"""By the kind of collective: the default group at that time, and the world."""


def join(backend: DeviceBackend) -> World:
    """Return the world of this process: all processes of torch.distributed, if it is in use.

    Under torchrun, torch.distributed is initialised here, which waits for all processes.

    Args:
        backend: names the collectives of its device.

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
            # A restart by torchrun keeps the store, but the values of the dead processes must not be read.
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = PrefixStore(f"charlm/{again}", store)
            dist.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        atexit.register(leave)
        _joined.clear()
        _joined[kind] = dist.group.WORLD, _Processes(dist.group.WORLD)
    elif dist.get_world_size() == 1:
        return World()
    joined = _joined.get(kind)
    if joined is None or joined[0] is not dist.group.WORLD:  # the caller's own group keeps its own timeout
        group = dist.new_group(backend=kind, timeout=TIMEOUT)
        joined = dist.group.WORLD, _Processes(group)
        _joined[kind] = joined
    return joined[1]


def leave() -> None:
    """Leave the world, at the end of a program.

    Gloo's threads must end before the process, which may abort otherwise. If another process is gone or has
    failed, waiting for it might take for ever, so nothing is done: the end of this process closes everything.
    """
    if _failed:
        return
    for _, world in _joined.values():
        world.close()
    _joined.clear()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
