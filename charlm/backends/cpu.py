"""The CPU backend.

bf16 pays on processors that multiply in it (AVX-512 BF16, AMX); elsewhere torch emulates it slowly.
Which of the two this machine is, torch tells from the processor's own feature flags.
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
    """Trains on the processor: bf16 products where it has instructions for them, else fp32."""

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
            BackendError: it is to be compiled, and there is no C++ compiler.
        """
        if compile:
            # What torch calls. It would find out in the first step, and raise an error of many screens.
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
        """Return the memory of this process and its machine; None where the system does not tell.

        `allocated` and `peak` are of the whole process, not of tensors alone. `total` and `available` heed
        the limits of the control group, as containers and batch systems set them.
        """
        used, total = host.process_bytes(), host.total_bytes()
        if used is None or total is None:
            return None
        resident, peak = used
        return MemoryStats(
            allocated=min(resident, total), peak=peak, total=total, available=host.available_bytes()
        )


def _reuse_freed_memory() -> None:
    """Let the memory of one step's activations serve the next, where the C library is glibc.

    glibc gives blocks above a threshold back to the system as soon as they are freed, and a step then waits
    for its pages again, an eighth to a fifth of its time. The threshold rises by itself, to the largest block
    that has been freed, up to 32 MB; so one of about that size is taken and freed, untouched.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
