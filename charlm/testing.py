"""For tests of code that uses charlm: a generated corpus, a backend that records its calls, a backend check.

The test suite of a plug-in calls `check_backend`; charlm's own suite calls it for each backend.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from typing_extensions import override

from charlm.backends.base import DeviceBackend, MemoryStats, Precision
from charlm.backends.cpu import CPUBackend
from charlm.data.blocks import BlockDataset
from charlm.errors import BackendError
from charlm.models.gpt import GPT
from charlm.training.config import TrainerConfig
from charlm.training.trainer import Trainer

__all__ = ["RecordingBackend", "check_backend", "tiny_corpus"]

_WORDS = (
    *("the", "a", "my", "your", "king", "queen", "sword", "crown", "shall", "must", "will", "love", "hate"),
    *("seek", "find", "and", "or", "but", "not", "jump", "fox", "lazy", "dog", "vow", "quick"),
    *("once", "upon"),
)


def tiny_corpus(characters: int = 4_000, *, seed: int = 1337) -> str:
    r"""Return a text of lines of a few English words, always the same for one seed.

    A small model learns its structure within seconds. It is free of copyright.

    Args:
        characters: N, the length.
        seed: of the random choice of words.

    Example:
        >>> len(tiny_corpus(100)), tiny_corpus(100) == tiny_corpus(100)
        (100, True)
    """
    draw = random.Random(seed)  # noqa: S311 - a text, not a secret
    lines: list[str] = []
    length = 0
    while length < characters:
        line = " ".join(draw.choices(_WORDS, k=draw.randint(3, 8))).capitalize() + draw.choice(".,!?") + "\n"
        lines.append(line)
        length += len(line)
    return "".join(lines)[:characters]


class RecordingBackend(CPUBackend):
    """The CPU backend, which also records the calls of its methods.

    Attributes:
        calls: names of the methods called, in order; "seeded 5" and "seeded end" for a block of `seeded`.

    Example:
        >>> backend = RecordingBackend()
        >>> _ = backend.to_device(torch.zeros(1))
        >>> backend.calls
        ['to_device']
    """

    name = "recording"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    @override
    def precision(self, wanted: str = "auto") -> Precision:
        self.calls.append(f"precision {wanted}")
        return super().precision(wanted)

    @override
    def prepare(self, model: nn.Module, *, compile: bool = False) -> nn.Module:
        self.calls.append("prepare")
        return super().prepare(model, compile=compile)

    @override
    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.calls.append("to_device")
        return super().to_device(*tensors)

    @override
    def autocast(self, precision: Precision) -> AbstractContextManager[object]:
        self.calls.append(f"autocast {precision}")
        return super().autocast(precision)

    @override
    def optimizer_options(self, name: str) -> dict[str, object]:
        self.calls.append(f"optimizer_options {name}")
        return super().optimizer_options(name)

    @override
    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        self.calls.append(f"seeded {seed}")
        with super().seeded(seed):
            yield
        self.calls.append("seeded end")

    @override
    def synchronize(self) -> None:
        self.calls.append("synchronize")
        super().synchronize()


def check_backend(backend: DeviceBackend) -> None:
    """Check by use that a backend has the properties that training relies on.

    Args:
        backend: available on this machine.

    Raises:
        BackendError: lists every property that is missing.

    Example:
        >>> check_backend(CPUBackend())
    """
    problems: list[str] = []
    for check in (
        _check_precisions,
        _check_placement,
        _check_model,
        _check_seeding,
        _check_memory,
        _check_training,
    ):
        try:
            problems += check(backend)
        except Exception as error:  # noqa: BLE001 - a foreign backend may raise anything; it is reported
            problems.append(f"{check.__name__.removeprefix('_check_')}: {type(error).__name__}: {error}")
    if problems:
        raise BackendError(f"{backend!r} breaks {len(problems)} promises: {'; '.join(problems)}")


def _check_precisions(backend: DeviceBackend) -> Iterator[str]:
    if not backend.is_available():
        yield "is_available() must be True to be checked"
    supported = backend.supported_precisions()
    if "fp32" not in supported:
        yield "supported_precisions() must include 'fp32'"
    if backend.precision("auto") not in supported:
        yield "precision('auto') must be one of supported_precisions()"
    for precision in supported:
        with backend.autocast(precision):
            a = torch.ones(4, 4, device=backend.device)
            product = a @ a
        if not torch.allclose(product.float().cpu(), torch.full((4, 4), 4.0)):
            yield f"a matrix product under autocast({precision!r}) is wrong"
        if (backend.scaler(precision) is None) != (precision != "fp16"):
            yield f"scaler({precision!r}) must exist for fp16 only"


def _check_placement(backend: DeviceBackend) -> Iterator[str]:
    original = torch.arange(12).view(3, 4)
    (moved,) = backend.to_device(original)
    if moved.device.type != backend.device.type:
        yield f"to_device must put tensors on {backend.device}, got {moved.device}"
    backend.synchronize()
    if not torch.equal(moved.cpu(), original):
        yield "to_device must not change values"
    if len(backend.to_device(original, original)) != 2:
        yield "to_device must return as many tensors as it gets"


def _check_model(backend: DeviceBackend) -> Iterator[str]:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    keys = list(model.state_dict())
    prepared = backend.prepare(model)
    if prepared is not model:
        yield "prepare must work in place and return the model that it got"
    if list(prepared.state_dict()) != keys:
        yield "prepare must not change the names in state_dict"
    if any(p.device.type != backend.device.type for p in prepared.parameters()):
        yield f"prepare must move the parameters to {backend.device}"
    torch.optim.AdamW(prepared.parameters(), **backend.optimizer_options("AdamW"))  # type: ignore[arg-type]


def _check_seeding(backend: DeviceBackend) -> Iterator[str]:
    def draw() -> Tensor:
        return torch.rand(8, device=backend.device).cpu()

    with backend.seeded(3):
        first = draw()
    with backend.seeded(3):
        again = draw()
    if not torch.equal(first, again):
        yield "seeded(n) must make random numbers on the device repeatable"
    with backend.seeded(4):
        expected = draw()
        with backend.seeded(5):
            draw()
        after = draw()
    with backend.seeded(4):
        if not torch.equal(expected, draw()) or not torch.equal(after, draw()):
            yield "seeded must put the generator's state back at the end of its block"


def _check_memory(backend: DeviceBackend) -> Iterator[str]:
    stats = backend.memory()
    if stats is not None and not (isinstance(stats, MemoryStats) and 0 <= stats.allocated <= stats.total):
        yield f"memory() must be None or MemoryStats with 0 <= allocated <= total, got {stats!r}"


def _check_training(backend: DeviceBackend) -> Iterator[str]:
    """Train a few steps there and on the CPU, in fp32, and compare."""
    ids = torch.tensor([ord(c) % 32 for c in tiny_corpus(400)])
    config = TrainerConfig(
        max_steps=5, batch_size=4, optimizer="adamw", learning_rate=1e-3, precision="fp32", warmup_steps=0
    )
    losses = []
    for place in (CPUBackend(), backend):
        with CPUBackend().seeded(0):
            model = GPT.from_config(
                "lecture", vocab_size=32, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0
            )
        trainer = Trainer(model, BlockDataset(ids, 8), config, device=place)
        losses.append([record.loss for record in trainer.steps()])
    if not torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3):
        yield f"five steps of training must give the losses of the CPU, {losses[0]}, got {losses[1]}"
