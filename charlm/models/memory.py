"""Checks that a model's weights fit into the machine's memory before they are allocated.

Without this check, a model that is too large takes all memory, and the operating system kills this or another
process without a message.
"""

from __future__ import annotations

import torch
from torch import Tensor

from charlm.backends.cpu import CPUBackend
from charlm.backends.traits import is_host
from charlm.errors import NotEnoughMemoryError
from charlm.models.config import ModelConfig

__all__ = ["check_fits", "in_units"]


def check_fits(config: ModelConfig) -> None:
    """Raise unless the weights of a model fit into the available memory.

    Only weights in main memory are checked. Under `with torch.device("meta")` any model may be built, and a
    GPU reports by itself what it cannot hold. If the system does not report its memory, every model passes.

    Args:
        config: of the model that will be built.

    Raises:
        NotEnoughMemoryError: they do not fit.

    Example:
        >>> from charlm import GPTConfig
        >>> check_fits(GPTConfig(vocab_size=65))
    """
    probe = torch.empty(0)  # on the device and of the type of the weights
    if type(probe) is not Tensor or not is_host(probe.device):
        return
    memory = CPUBackend().memory()
    needed = probe.element_size() * config.num_parameters()
    if memory is not None and needed > memory.free:
        reduce = "n_embd or n_layer" if hasattr(config, "n_embd") else "vocab_size"
        raise NotEnoughMemoryError(
            f"the model's {config.num_parameters():,} parameters must fit into the memory that is available, "
            f"{in_units(memory.free)}, but take {in_units(needed)}. Reduce {reduce}.",
            needed_bytes=needed,
            available_bytes=memory.free,
        )


def in_units(size: int) -> str:
    """Return a number of bytes as people write it.

    Example:
        >>> in_units(900), in_units(1_500_000), in_units(2**40)
        ('900 B', '1.5 MB', '1.1 TB')
    """
    value, units = float(size), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
