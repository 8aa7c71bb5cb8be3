"""charlm.testing: the tools that it gives to other people's tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from charlm import BigramLM, BlockDataset, CharTokenizer, DeviceBackend, Trainer, TrainerConfig
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


@pytest.mark.parametrize(
    ("backend", "complaint"),
    [
        (Forgetful(), "seeded must put the generator's state back"),
        (Wrapping(), "prepare must work in place"),
        (Rounding(), "to_device must not change values"),
        (Failing(), "KeyError"),
    ],
    ids=["forgetful", "wrapping", "rounding", "failing"],
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
