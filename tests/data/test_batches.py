"""Batches on a device: the same as on the CPU, and only their starts travel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from charlm.backends.base import DeviceBackend, MemoryStats
from charlm.data.batches import DeviceBatches, HostBatches, batches_on
from charlm.data.blocks import BlockDataset
from charlm.errors import InputError
from charlm.testing import RecordingBackend


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([2, 255, 256, 32_768, 65_535, 65_536, 2**31, 2**32 - 1]),
    st.integers(3, 40),
    st.integers(1, 12),
    st.integers(1, 9),
    st.sampled_from([DeviceBatches, HostBatches]),
)
def test_batches_on_a_device_are_those_of_the_dataset(
    highest: int, N: int, T: int, B: int, kind: type[DeviceBatches | HostBatches]
) -> None:
    ids = np.random.default_rng(N).integers(0, highest + 1, N)
    ids[0] = highest
    data = BlockDataset(ids, min(T, N - 1))
    batches = kind(data, DeviceBackend("cpu"))
    starts = torch.arange(len(data)).flip(0)
    expected = [data.sample_batch(B, generator=seeded(N)), data.blocks_at(starts), *data.blocks(B)]
    found = [batches.sample(B, seeded(N)), batches.at(starts), *batches.blocks(B)]
    assert len(found) == len(expected)
    for pair, wanted in zip(found, expected, strict=True):
        for tensor, other in zip(pair, wanted, strict=True):
            assert tensor.dtype == torch.int64
            assert torch.equal(tensor, other)
            assert tensor.is_contiguous()


def test_who_changes_a_batch_changes_neither_its_targets_nor_the_text() -> None:
    batches = DeviceBatches(BlockDataset(torch.arange(20), 4), DeviceBackend("cpu"))
    x, y = batches.sample(3, seeded(1))
    kept = y.clone()
    x.fill_(99)
    assert torch.equal(y, kept)
    for x, _ in batches.blocks(2):
        x.fill_(99)
    again = batches.sample(3, seeded(1))
    assert torch.equal(again[1], kept)


class Travels(TorchDispatchMode):
    """Writes down the size of every tensor that goes from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own has no annotations
        self.bytes: list[int] = []

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [a for a in args if isinstance(a, Tensor)]
        if isinstance(out, Tensor) and out.is_meta:
            self.bytes += [t.nbytes for t in inputs if t.device.type == "cpu" and t.dim() > 0]
        return out


@pytest.mark.parametrize(("highest", "size"), [(200, 1), (60_000, 2), (70_000, 4)])
def test_the_text_travels_once_and_of_each_batch_the_starts_alone(highest: int, size: int) -> None:
    N, T, B = 5000, 64, 8
    data = BlockDataset(torch.arange(N) * highest // (N - 1), T)
    assert data.ids.element_size() == size
    with Travels() as travels:
        batches = batches_on(data, DeviceBackend("meta"))
    assert isinstance(batches, DeviceBatches)
    assert travels.bytes == [data.ids.nbytes]
    with Travels() as travels:
        for _ in range(3):
            x, y = batches.sample(B)
            assert x.is_meta
            assert x.shape == y.shape == (B, T)
    assert travels.bytes == 3 * [8 * B]
    with Travels() as travels:
        assert sum(y.numel() for _, y in batches.blocks(B)) == N - 1
    assert travels.bytes == []


class Small(DeviceBackend):
    """A device with a memory of a few bytes."""

    name = "small"

    def __init__(self, stats: MemoryStats | None) -> None:
        super().__init__("meta")
        self.stats = stats

    @override
    def memory(self) -> MemoryStats | None:
        return self.stats


@pytest.mark.parametrize(
    ("stats", "kind"),
    [
        (MemoryStats(allocated=0, peak=0, total=8 * 1000), DeviceBatches),
        (MemoryStats(allocated=1, peak=1, total=8 * 1000), HostBatches),
        (MemoryStats(allocated=0, peak=0, total=10**9, available=7999), HostBatches),
        (None, DeviceBatches),
    ],
)
def test_a_text_stays_on_the_cpu_where_it_would_take_too_much_of_the_device(
    stats: MemoryStats | None, kind: type[DeviceBatches | HostBatches]
) -> None:
    batches = batches_on(BlockDataset(torch.zeros(1000, dtype=torch.uint8), 10), Small(stats))
    assert type(batches) is kind
    x, y = batches.sample(2)
    assert x.is_meta
    assert y.shape == (2, 10)
    assert [x.shape for x, _ in batches.blocks(60)] == [(60, 10), (39, 10), (1, 9)]


def test_a_device_that_does_not_tell_its_memory_gets_texts_of_up_to_64_mib() -> None:
    for N, kind in ((2**26, DeviceBatches), (2**26 + 1, HostBatches)):
        data = BlockDataset(torch.zeros(N, dtype=torch.uint8), 10)
        assert type(batches_on(data, Small(None))) is kind


def test_on_the_cpu_a_batch_is_made_there_and_the_backend_asked_for_it() -> None:
    backend = RecordingBackend()
    batches = batches_on(BlockDataset(torch.arange(20), 4), backend)
    assert isinstance(batches, HostBatches)
    batches.sample(2)
    assert backend.calls == ["to_device"]


def test_a_dataset_that_draws_in_its_own_way_is_asked_for_each_batch() -> None:
    class First(BlockDataset):
        @override
        def sample_batch(
            self, batch_size: int, *, generator: torch.Generator | None = None
        ) -> tuple[Tensor, Tensor]:
            x, y = self[0]
            return x.expand(batch_size, -1), y.expand(batch_size, -1)

    batches = batches_on(First(torch.arange(20), 4), DeviceBackend("meta"))
    assert isinstance(batches, HostBatches)


@pytest.mark.parametrize("kind", [DeviceBatches, HostBatches])
def test_sizes_must_be_positive_ints(kind: type[DeviceBatches | HostBatches]) -> None:
    batches = kind(BlockDataset(torch.arange(20), 4), DeviceBackend("cpu"))
    for bad in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="batch_size must be an int, 1 or more, got "):
            batches.sample(bad)  # type: ignore[arg-type]  # the point of the test
        with pytest.raises(InputError, match="batch_size must be an int, 1 or more, got "):
            next(batches.blocks(bad))  # type: ignore[arg-type]  # the point of the test
