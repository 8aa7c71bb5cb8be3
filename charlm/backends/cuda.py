"""The CUDA backend: NVIDIA GPUs, and AMD GPUs on torch's ROCm build.

It is tested with fakes where there is no GPU; the docs list the parts that were run on hardware.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from typing_extensions import override

from charlm.backends.base import DeviceBackend, MemoryStats, Precision
from charlm.backends.host import is_under_torchrun
from charlm.errors import BackendError

__all__ = ["CUDABackend"]


class CUDABackend(DeviceBackend):
    """Trains on one GPU.

    Args:
        index: number of the GPU; None: torch's current one, or under torchrun that of LOCAL_RANK.
    """

    name = "cuda"

    def __init__(self, index: int | None = None) -> None:
        if index is None and is_under_torchrun():
            index = int(os.environ["LOCAL_RANK"])
        super().__init__("cuda" if index is None else f"cuda:{index}")

    @override
    def is_available(self) -> bool:
        return torch.cuda.is_available() and (self.device.index or 0) < torch.cuda.device_count()

    @override
    def supported_precisions(self) -> tuple[Precision, ...]:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ("bf16", "fp16", "fp32")
        return ("fp16", "fp32")

    @override
    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Only a copy from pinned memory runs during the computation.
        return tuple(
            (tensor.pin_memory() if tensor.device.type == "cpu" else tensor).to(
                self.device, non_blocking=True
            )
            for tensor in tensors
        )

    @override
    def optimizer_options(self, name: str) -> dict[str, object]:
        return {"fused": True} if name in {"Adam", "AdamW", "SGD", "Adagrad"} else {}

    @override
    def default_generator(self) -> torch.Generator:
        torch.cuda.init()  # fills default_generators
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        generators: tuple[torch.Generator, ...] = torch.cuda.default_generators
        if index >= len(generators):
            raise BackendError(f"cuda:{index} does not exist: this machine has {len(generators)} GPUs")
        return generators[index]

    @override
    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    @override
    def memory(self) -> MemoryStats:
        free, total = torch.cuda.mem_get_info(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        return MemoryStats(
            allocated=allocated,
            peak=torch.cuda.max_memory_allocated(self.device),
            total=total,
            # The driver counts the memory that torch reserves for later tensors as used.
            available=free + torch.cuda.memory_reserved(self.device) - allocated,
        )
