"""`DeviceBackend`: the interface between charlm and a device.

The base class is complete: it works for any device that torch knows, and a subclass overrides what its
hardware does better. Each later method will have a default, too, so that today's backends keep working. It
knows of models only that they are `nn.Module`. The pattern is httpx's Transport.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from charlm.backends.traits import is_host
from charlm.errors import BackendError, InputError
from charlm.locks import GENERATORS

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

__all__ = ["DeviceBackend", "MemoryStats", "Precision"]

Precision = Literal["fp32", "bf16", "fp16"]
"""Type of matrix products. Parameters and optimizer state are always float32."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MemoryStats:
    """Memory of a device, in bytes."""

    allocated: int
    """Present use by tensors."""
    peak: int
    """Largest use since the process started."""
    total: int
    """Memory of the device."""
    available: int | None = None
    """Memory that is not in use by any program; None: the device does not report it."""

    @property
    def free(self) -> int:
        """Memory that can be allocated: `available` if it is known, else `total` minus `allocated`."""
        return self.total - self.allocated if self.available is None else self.available


class DeviceBackend:
    """A device, as charlm uses it.

    Args:
        device: the torch device, or its name. None: the CPU.

    Attributes:
        name: its name for `get_backend`.
        device: the torch device.

    Example:
        >>> import torch
        >>> backend = DeviceBackend("cpu")
        >>> (batch,) = backend.to_device(torch.zeros(2, 3))
        >>> batch.device
        device(type='cpu')
    """

    name: str = "cpu"
    device: torch.device

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = torch.device(device or "cpu")
        if type(self).name == "cpu" and self.device.type != "cpu":
            self.name = str(self.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.device)!r})"

    def is_available(self) -> bool:
        """Return whether this machine has the device; nothing is initialised."""
        return True

    def supported_precisions(self) -> tuple[Precision, ...]:
        """Return the precisions that the device can train in; "auto" is the first one."""
        return ("fp32",)

    def precision(self, wanted: str = "auto") -> Precision:
        """Return the precision to train in.

        Args:
            wanted: "auto" (the device's choice), "fp32", "bf16" or "fp16".

        Raises:
            BackendError: the device does not support it.
            InputError: there is no such precision.
        """
        supported = self.supported_precisions()
        if wanted == "auto":
            return supported[0]
        if wanted not in _DTYPES:
            raise InputError(f"precision must be 'auto', 'fp32', 'bf16' or 'fp16', got {wanted!r}")
        for precision in supported:
            if precision == wanted:
                return precision
        raise BackendError(f"{self.name} cannot train in {wanted}; it offers {', '.join(supported)}")

    def prepare(self, model: nn.Module, *, compile: bool = False) -> nn.Module:
        """Move a model to the device, in place, and return it.

        Args:
            model: any module. Its state_dict keys do not change.
            compile: also compile its forward pass with `torch.compile`, in place (no `_orig_mod.` keys).
        """
        model.to(self.device)
        if compile:
            model.compile()
        return model

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return tensors on the device; tensors that are already there are returned unchanged.

        Args:
            tensors: of any shapes and types.
        """
        # Not non_blocking, which needs pinned memory; see CUDABackend.
        return tuple(tensor.to(self.device) for tensor in tensors)

    def autocast(self, precision: Precision) -> AbstractContextManager[object]:
        """Return a context in which matrix products run in a precision.

        Args:
            precision: from `precision()`.
        """
        if precision == "fp32":
            return nullcontext()
        # autocast caches converted weights within a context, so each forward pass has its own context.
        return torch.autocast(self.device.type, dtype=_DTYPES[precision])

    def scaler(self, precision: Precision) -> GradScaler | None:
        """Return the gradient scaler that fp16 needs, or None for another precision.

        Args:
            precision: from `precision()`.
        """
        if precision != "fp16":
            return None
        return torch.amp.GradScaler(self.device.type)

    def optimizer_options(self, name: str) -> dict[str, object]:
        """Return the arguments that make an optimizer fastest on this device.

        Args:
            name: torch's class name, for example "AdamW".
        """
        return {}

    def default_generator(self) -> torch.Generator:
        """Return the generator of dropout on this device.

        Raises:
            BackendError: torch does not know it for this kind of device; then a subclass must override this.
        """
        if self.is_host:
            return torch.default_generator
        try:
            generators = getattr(torch.get_device_module(self.device), "default_generators", ())
        except RuntimeError:  # torch knows the device, but has no module for it
            generators = ()
        if (self.device.index or 0) >= len(generators):
            raise BackendError(f"{type(self).__name__} must override default_generator() for {self.device}")
        generator: torch.Generator = generators[self.device.index or 0]
        return generator

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Seed the device's default generator inside the block, and restore its state afterwards.

        Only one thread at a time is inside, so that two trainings in one process draw the same as alone.

        Args:
            seed: an int of at most 64 bits; the generator of a CPU uses the lower 32.
        """
        generator = self.default_generator()
        with GENERATORS.lock:
            before = generator.get_state()
            generator.manual_seed(seed)
            try:
                yield
            finally:
                generator.set_state(before)

    @property
    def is_host(self) -> bool:
        """Whether the device is the CPU, with tensors in main memory."""
        return is_host(self.device)

    @property
    def asynchronous(self) -> bool:
        """Whether the device works in the background, so that reading a number from it waits."""
        return not self.is_host

    @property
    def collectives(self) -> str:
        """The backend of `torch.distributed.init_process_group` for several processes.

        It must also transfer tensors on the CPU. The default is the one that torch has for this kind of
        device.
        """
        if self.is_host:
            return "gloo"
        kind = self.device.type
        return f"cpu:gloo,{kind}:{torch.distributed.get_default_backend_for_device(self.device)}"

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""

    def memory(self) -> MemoryStats | None:
        """Return the device's memory, or None if it is unknown."""
        return None
