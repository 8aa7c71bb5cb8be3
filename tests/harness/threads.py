"""Worlds whose processes are threads of this one: what they tell one another goes through a list.

Only `charlm.backends.world` knows how real processes do it, so all that stands above can be tried without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

from torch import Tensor
from typing_extensions import override

from charlm.backends.world import World
from charlm.errors import PeerError

__all__ = ["in_world", "outcomes"]

T = TypeVar("T")


class _Meeting:
    """Where all threads of a world put down what they have, and take what the others have put down."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.table: list[Any] = [None] * size

    def of_all(self, rank: int, own: object) -> list[Any]:
        self.table[rank] = own
        self.barrier.wait()
        found = list(self.table)
        self.barrier.wait()
        return found


class _Threads(World):
    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting

    @override
    def agree(self, numbers: Sequence[float] = ()) -> list[list[float]]:
        return self._exchange(None, [float(number) for number in numbers])

    @override
    def tell(self, make: Callable[[], T]) -> T:
        value = make() if self.is_first else None
        self.agree()
        told: T = self._meeting.of_all(self.rank, value)[0]
        return told

    @override
    def rows(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        self.agree()
        found = self._meeting.of_all(self.rank, rows)
        most = max(len(rows) for rows in found)
        return [list(rows[i]) for i in range(most) for rows in found if i < len(rows)]

    @override
    def gather(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        found = self._meeting.of_all(self.rank, tensor.clone())
        into = tensor.new_empty((self.size, *tensor.shape)) if into is None else into
        for row, part in zip(into, found, strict=True):
            row.copy_(part)
        return into

    @override
    def trade(self, parts: Tensor, into: Tensor) -> None:
        for row, given in zip(into, self._meeting.of_all(self.rank, parts.clone()), strict=True):
            row.copy_(given[self.rank])

    @override
    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        self.agree()
        first = self._meeting.of_all(self.rank, [tensor.detach().clone() for tensor in tensors])[0]
        for tensor, whole in zip(tensors, first, strict=True):
            tensor.detach().copy_(whole)

    @override
    @contextmanager
    def telling(self) -> Iterator[None]:
        try:
            yield
        except (GeneratorExit, PeerError, threading.BrokenBarrierError):
            raise
        except BaseException as error:
            self._exchange(str(error), [])
            raise

    def _exchange(self, failure: str | None, numbers: list[float]) -> list[list[float]]:
        found = self._meeting.of_all(self.rank, (failure, numbers))
        for rank, (said, _) in enumerate(found):
            if said is not None and failure is None:
                raise PeerError(f"process {rank} has failed. {said}", rank=rank)
        return [numbers for _, numbers in found]


def in_world(size: int, work: Callable[[World], T]) -> list[T]:
    """Return what each thread of a world comes to; the first error of any is raised.

    `Trainer`s that are made inside are in the world.
    """
    found = outcomes(size, work)
    for value in found:
        if isinstance(value, BaseException):
            raise value
    return [value for value in found if not isinstance(value, BaseException)]


def outcomes(size: int, work: Callable[[World], T]) -> list[T | BaseException]:
    """Return what each thread of a world comes to: what the work returns, or the error that it raises."""
    meeting, found = _Meeting(size), dict[int, T | BaseException]()

    def run(world: World) -> None:
        try:
            found[world.rank] = work(world)
        except BaseException as error:  # noqa: BLE001 - it is what came of it
            found[world.rank] = error

    # The first one stays in this thread: it locks the run, and tests that interrupt a training at any place
    # may have left a lock of this thread's.
    first, *others = worlds = [_Threads(rank, size, meeting) for rank in range(size)]
    threads = [threading.Thread(target=run, args=(world,)) for world in others]
    worlds_of = dict(zip([threading.current_thread(), *threads], worlds, strict=True))

    def joined(backend: object) -> World:
        return worlds_of.get(threading.current_thread()) or World()

    with mock.patch("charlm.training.trainer.join", joined):
        for thread in threads:
            thread.start()
        run(first)
        for thread in threads:
            thread.join()
    return [found[rank] for rank in range(size)]
