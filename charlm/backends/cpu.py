"""The CPU backend.

bf16 pays on processors that multiply in it (AVX-512 BF16, AMX); elsewhere torch emulates it slowly.
Which of the two this machine is, torch tells from the processor's own feature flags.
"""

from __future__ import annotations

import torch
from typing_extensions import override

from charlm.backends.base import DeviceBackend, Precision

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
    def optimizer_options(self, name: str) -> dict[str, object]:
        return {"fused": True} if name in {"Adam", "AdamW", "SGD", "Adagrad"} else {}
