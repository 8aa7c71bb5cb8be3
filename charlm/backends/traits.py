"""Properties of a device, for code that has a tensor but no backend."""

from __future__ import annotations

import torch

__all__ = ["has_float64", "is_host"]

_WITHOUT_FLOAT64 = frozenset({"mps"})


def is_host(device: torch.device) -> bool:
    """Return whether the device is the CPU, with tensors in main memory.

    Example:
        >>> is_host(torch.device("cpu")), is_host(torch.device("cuda"))
        (True, False)
    """
    return device.type == "cpu"


def has_float64(device: torch.device) -> bool:
    """Return whether the device supports float64."""
    return device.type not in _WITHOUT_FLOAT64
