"""A device backend from outside the package: the CPU in float32 that counts what crosses to the device.

    python examples/own_backend.py

A package of your own makes a backend known to every charlm program by an entry point:

    [project.entry-points."charlm.backends"]
    counting = "my_package:CountingBackend"
"""

import torch

from charlm import (
    BigramLM,
    BlockDataset,
    CharTokenizer,
    DeviceBackend,
    Trainer,
    TrainerConfig,
    register_backend,
)
from charlm.testing import check_backend, tiny_corpus


class CountingBackend(DeviceBackend):
    """Everything that is not overridden has a default that works for any torch device."""

    name = "counting"

    def __init__(self) -> None:
        super().__init__("cpu")
        self.bytes_moved = 0

    def to_device(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.bytes_moved += sum(tensor.nbytes for tensor in tensors)
        return super().to_device(*tensors)


def main() -> None:
    register_backend("counting", CountingBackend)
    check_backend(CountingBackend())  # keeps every promise that training relies on
    text = tiny_corpus(2_000)
    tokenizer = CharTokenizer.from_text(text)
    train = BlockDataset.from_text(text, tokenizer, block_size=8)
    trainer = Trainer(BigramLM(tokenizer.vocab_size), train, TrainerConfig(max_steps=100), device="counting")
    result = trainer.fit()
    backend = trainer.backend
    moved = backend.bytes_moved if isinstance(backend, CountingBackend) else 0
    print(f"{result.steps} steps moved {moved:,} bytes to {backend.device}")


if __name__ == "__main__":
    main()
