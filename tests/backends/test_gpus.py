"""The logic of CUDA and MPS, by fakes: what they ask of torch, and what they make of the answers."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from harness.tiny_models import tiny_config, tiny_gpt
from torch import Tensor

from charlm.backends.base import MemoryStats
from charlm.backends.cuda import CUDABackend
from charlm.backends.mps import MPSBackend
from charlm.errors import BackendError


@pytest.mark.parametrize(
    ("available", "count", "index", "expected"),
    [
        (False, 0, None, False),
        (True, 1, None, True),
        (True, 1, 0, True),
        (True, 1, 1, False),
        (True, 2, 1, True),
        (False, 2, 1, False),
    ],
)
def test_cuda_is_available_if_its_index_exists(
    monkeypatch: pytest.MonkeyPatch, available: bool, count: int, index: int | None, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert CUDABackend(index).is_available() is expected


@pytest.mark.parametrize("native", [True, False])
def test_cuda_trains_in_bf16_where_the_gpu_has_it_natively(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    backend = CUDABackend()
    assert backend.precision("auto") == ("bf16" if native else "fp16")
    assert backend.precision("fp16") == "fp16"
    if not native:
        with pytest.raises(BackendError, match="cuda cannot train in bf16; it offers fp16, fp32"):
            backend.precision("bf16")


def test_the_real_is_bf16_supported_takes_the_argument_we_pass() -> None:
    import inspect

    assert "including_emulation" in inspect.signature(torch.cuda.is_bf16_supported).parameters


def test_cuda_copies_from_pinned_memory_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        calls.append(("pin", tensor.device.type))
        return tensor

    def to(tensor: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        calls.append((str(device), non_blocking))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    CUDABackend(1).to_device(torch.zeros(2), torch.zeros(2, device="meta"))
    assert calls == [("pin", "cpu"), ("cuda:1", True), ("cuda:1", True)]


@pytest.mark.parametrize(("index", "chosen"), [(None, 1), (0, 0), (1, 1)])
def test_cuda_seeds_the_generator_of_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, index: int | None, chosen: int
) -> None:
    generators = (torch.Generator(), torch.Generator())
    states = [generator.get_state() for generator in generators]
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    backend = CUDABackend(index)
    assert backend.default_generator() is generators[chosen]
    with backend.seeded(5):
        assert generators[chosen].initial_seed() == 5
    for generator, state in zip(generators, states, strict=True):
        assert torch.equal(generator.get_state(), state)
    with pytest.raises(BackendError, match="cuda:2 does not exist: this machine has 2 GPUs"):
        CUDABackend(2).default_generator()


def test_cuda_tells_its_memory_and_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 80))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 25)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    memory = CUDABackend().memory()
    assert memory == MemoryStats(allocated=20, peak=30, total=80, available=15)
    assert memory.free == 15
    CUDABackend(1).synchronize()
    assert waited == [torch.device("cuda:1")]


def test_mps_trains_in_fp32_alone() -> None:
    backend = MPSBackend()
    assert backend.precision("auto") == "fp32"
    with pytest.raises(BackendError, match="mps cannot train in bf16; it offers fp32"):
        backend.precision("bf16")
    assert backend.optimizer_options("AdamW") == {}


def test_mps_tells_its_memory_waits_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator()
    waited: list[bool] = []
    fake = SimpleNamespace(
        current_allocated_memory=lambda: 20,
        driver_allocated_memory=lambda: 30,
        recommended_max_memory=lambda: 80,
        synchronize=lambda: waited.append(True),
        _get_default_mps_generator=lambda: generator,
    )
    assert all(hasattr(torch.mps, name) for name in vars(fake))
    monkeypatch.setattr(torch, "mps", fake)
    backend = MPSBackend()
    memory = backend.memory()
    assert memory == MemoryStats(allocated=20, peak=30, total=80)
    assert memory.free == 60
    backend.synchronize()
    assert waited == [True]
    state = generator.get_state()
    with backend.seeded(5):
        assert generator.initial_seed() == 5
    assert torch.equal(generator.get_state(), state)


def test_what_goes_to_apples_gpu_holds_no_float64() -> None:
    for preset in ("lecture", "gpt2", "cpu-1min"):
        model = tiny_gpt(tiny_config(preset))
        assert torch.float64 not in {t.dtype for t in itertools.chain(model.parameters(), model.buffers())}
