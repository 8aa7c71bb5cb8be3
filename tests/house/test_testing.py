"""charlm.testing: the tools that it gives to other people's tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from charlm import BigramLM, BlockDataset, CharTokenizer, DeviceBackend, Trainer, TrainerConfig
from charlm.backends.base import MemoryStats, Precision
from charlm.backends.cpu import CPUBackend
from charlm.errors import BackendError
from charlm.testing import RecordingBackend, check_backend, tiny_corpus


@pytest.mark.parametrize("backend", [DeviceBackend("cpu"), CPUBackend(), RecordingBackend()], ids=repr)
def test_backends_of_this_library_keep_their_promises(backend: DeviceBackend) -> None:
    check_backend(backend)


class Forgetful(CPUBackend):
    """Seeds, and does not put the state back."""

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        torch.manual_seed(seed)
        yield


class Wrapping(CPUBackend):
    """Wraps the model, which renames its parameters."""

    def prepare(self, model: nn.Module, *, compile: bool = False) -> nn.Module:
        return nn.Sequential(model)


class Rounding(CPUBackend):
    """Changes what it moves."""

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor // 2 for tensor in tensors)


class Failing(CPUBackend):
    """Raises from where nobody expects it."""

    def synchronize(self) -> None:
        raise KeyError("no device")


class Absent(CPUBackend):
    """Is not there, and offers what nobody else has."""

    def is_available(self) -> bool:
        return False

    def supported_precisions(self) -> tuple[Precision, ...]:
        return ("bf16",)

    def precision(self, wanted: str = "auto") -> Precision:
        return "fp32"


class Unscaled(CPUBackend):
    """Gives every precision a scaler, and multiplies wrongly."""

    def scaler(self, precision: Precision) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu")

    @contextmanager
    def autocast(self, precision: Precision) -> Iterator[None]:
        ones, torch.ones = torch.ones, torch.zeros  # a device that loses what it gets
        try:
            yield
        finally:
            torch.ones = ones


class Elsewhere(CPUBackend):
    """Says that it is another device than the one where things end up."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("meta")

    def prepare(self, model: nn.Module, *, compile: bool = False) -> nn.Module:
        return model

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:1]


class Drifting(CPUBackend):
    """Gives other random numbers for the same seed, and odd figures of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def memory(self) -> MemoryStats:
        return MemoryStats(allocated=2, peak=2, total=1)

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        self.count += 1
        with super().seeded(seed + self.count):
            yield


class Halving(CPUBackend):
    """Trains, but on other characters."""

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t if t.shape == (3, 4) else t // 2 for t in tensors)


@pytest.mark.parametrize(
    ("backend", "complaint"),
    [
        (Forgetful(), "seeded must put the generator's state back"),
        (Wrapping(), "prepare must work in place"),
        (Rounding(), "to_device must not change values"),
        (Wrapping(), "prepare must not change the names"),
        (Failing(), "KeyError"),
        (Absent(), "is_available"),
        (Absent(), "must include 'fp32'"),
        (Absent(), "must be one of supported_precisions"),
        (Unscaled(), "scaler"),
        (Unscaled(), "a matrix product under autocast"),
        (Elsewhere(), "prepare must move the parameters to meta"),
        (Elsewhere(), "to_device must put tensors on meta"),
        (Elsewhere(), "to_device must return as many"),
        (Drifting(), "repeatable"),
        (Drifting(), "MemoryStats with 0 <= allocated <= total"),
        (Halving(), "must give the losses of the CPU"),
    ],
)
def test_a_backend_that_breaks_a_promise_is_told_which(backend: DeviceBackend, complaint: str) -> None:
    with pytest.raises(BackendError, match=complaint):
        check_backend(backend)


def test_the_recording_backend_shows_what_a_step_asks_of_a_device() -> None:
    backend = RecordingBackend()
    text = tiny_corpus(300)
    tokenizer = CharTokenizer.from_text(text)
    data = BlockDataset.from_text(text, tokenizer, block_size=8)
    config = TrainerConfig(max_steps=1, warmup_steps=0, precision="bf16")
    Trainer(BigramLM(tokenizer.vocab_size), data, config, device=backend).fit()
    called = [call.split()[0] if call != "seeded end" else call for call in backend.calls]
    assert called == [
        "precision",
        "prepare",
        "precision",
        "optimizer_options",
        "to_device",
        "seeded",
        "autocast",
        "seeded end",
    ]


def test_tiny_corpus_has_the_length_and_seed_asked_for() -> None:
    assert len(tiny_corpus(1)) == 1
    assert tiny_corpus(500, seed=1) != tiny_corpus(500, seed=2)
    assert tiny_corpus(500) == tiny_corpus(1_000)[:500]
