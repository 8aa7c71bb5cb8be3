"""The CPU backend.

bf16 is fast on processors with instructions for it (AVX-512 BF16, AMX); on others, torch emulates it slowly.
torch reads the processor's feature flags.
"""

from __future__ import annotations

import os
import shutil
import sys

import torch
from torch import nn
from typing_extensions import override

from charlm.backends import host
from charlm.backends.base import DeviceBackend, MemoryStats, Precision
from charlm.errors import BackendError

__all__ = ["CPUBackend"]


class CPUBackend(DeviceBackend):
    """Trains on the CPU: with bf16 products if it has instructions for them, else in fp32."""

    name = "cpu"

    def __init__(self) -> None:
        super().__init__("cpu")

    @override
    def supported_precisions(self) -> tuple[Precision, ...]:
        features = torch.cpu.get_capabilities()
        has_bf16 = any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
        return ("bf16", "fp32") if has_bf16 else ("fp32", "bf16")

    @override
    def prepare(self, model: nn.Module, *, compile: bool = False) -> nn.Module:
        """Move a model to the CPU, in place, and return it.

        Raises:
            BackendError: `compile` is True, and there is no C++ compiler.
        """
        if compile:
            # torch would look for its compiler in the first step, and raise a very long error.
            compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
            if shutil.which(compiler) is None:
                raise BackendError(
                    f"compile=True needs the C++ compiler {compiler!r}, which is not found. Install it, or "
                    "name another one in the environment variable CXX, or leave compile off"
                )
        _reuse_freed_memory()
        return super().prepare(model, compile=compile)

    @override
    def optimizer_options(self, name: str) -> dict[str, object]:
        return {"fused": True} if name in {"Adam", "AdamW", "SGD", "Adagrad"} else {}

    @override
    def memory(self) -> MemoryStats | None:
        """Return the memory of this process and its machine, or None if the system does not report it.

        `allocated` and `peak` are those of the whole process, not of tensors alone. `total` and `available`
        respect the limits of the control group, which containers and batch systems set.
        """
        used, total = host.process_bytes(), host.total_bytes()
        if used is None or total is None:
            return None
        resident, peak = used
        return MemoryStats(
            allocated=min(resident, total), peak=peak, total=total, available=host.available_bytes()
        )


def _reuse_freed_memory() -> None:
    """Let the activations of a step reuse the memory of the step before, with the C library glibc.

    glibc returns freed blocks above a threshold to the system, and then a step spends an eighth to a fifth of
    its time on getting new pages. The threshold rises to the size of the largest freed block, up to 32 MB. So
    a block of about that size is allocated and freed without being used.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
