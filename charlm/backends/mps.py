"""The MPS backend: the GPU of Apple silicon.

It is tested with fakes where there is no GPU; the docs list the parts that were run on hardware.
"""

from __future__ import annotations

import torch
from typing_extensions import override

from charlm.backends.base import DeviceBackend, MemoryStats, Precision

__all__ = ["MPSBackend"]


class MPSBackend(DeviceBackend):
    """Trains on Apple's GPU in fp32, since its autocast and gradient scaler are not reliable yet."""

    name = "mps"

    def __init__(self) -> None:
        super().__init__("mps")

    @override
    def is_available(self) -> bool:
        return torch.backends.mps.is_available()

    @override
    def supported_precisions(self) -> tuple[Precision, ...]:
        return ("fp32",)

    @override
    def default_generator(self) -> torch.Generator:
        # torch.mps has functions for the state of its generator; they use this one.
        return torch.mps._get_default_mps_generator()

    @override
    def synchronize(self) -> None:
        torch.mps.synchronize()

    @override
    def memory(self) -> MemoryStats:
        allocated = torch.mps.current_allocated_memory()
        return MemoryStats(
            allocated=allocated,
            peak=max(allocated, torch.mps.driver_allocated_memory()),
            total=torch.mps.recommended_max_memory(),
        )
