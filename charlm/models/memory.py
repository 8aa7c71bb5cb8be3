"""Whether a model's weights fit into the machine's memory, asked before they are allocated.

Without the question a model that is too large takes all memory there is, and the operating system ends the
process, or another one, without a word.
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
    """Raise unless the weights of a model fit into what the machine can give.

    Asked only where weights would come to lie in main memory: under `with torch.device("meta")` any model
    may be built, and a GPU says for itself what it cannot hold. Where the system does not tell its memory,
    everything is let through.

    Args:
        config: of the model that is about to be built.

    Raises:
        NotEnoughMemoryError: they do not fit.

    Example:
        >>> from charlm import GPTConfig
        >>> check_fits(GPTConfig(vocab_size=65))
    """
    probe = torch.empty(0)  # lies where the weights will, and is of their type
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
