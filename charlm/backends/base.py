"""`DeviceBackend`: the seam between charlm and a device.

The base class is complete: with a `torch.device` in hand it works for any device that torch knows, and
a subclass overrides what its hardware does better. A method added here later gets a default too, so
that backends written today keep working. It knows nothing of models beyond `nn.Module`.
The pattern is httpx's Transport: one small class between the library and the world.
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
"""What matrix products run in. Parameters and optimizer state are float32 whichever it is."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MemoryStats:
    """Memory of a device, in bytes."""

    allocated: int
    """In use by tensors now."""
    peak: int
    """The most that was in use since the process started."""
    total: int
    """What the device has."""
    available: int | None = None
    """What could be taken beside all that is in use, by whomever; None: the device does not tell."""

    @property
    def free(self) -> int:
        """What could be taken: `available`, or what is left of the total where that is not known."""
        return self.total - self.allocated if self.available is None else self.available


class DeviceBackend:
    """What charlm asks of a device.

    Args:
        device: the torch device, or its name. None means the CPU.

    Attributes:
        name: what `get_backend` calls it.
        device: where tensors go.

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
        """Return whether this machine can run it. Asking initialises nothing."""
        return True

    def supported_precisions(self) -> tuple[Precision, ...]:
        """Return what the device can train in, the one that "auto" means first."""
        return ("fp32",)

    def precision(self, wanted: str = "auto") -> Precision:
        """Return the precision to train in.

        Args:
            wanted: "auto" (the device's choice), "fp32", "bf16" or "fp16".

        Raises:
            BackendError: the device cannot do it.
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
            model: any module. Its state_dict keys stay as they are.
            compile: also let `torch.compile` work on its forward pass (in place: no `_orig_mod.` keys).
        """
        model.to(self.device)
        if compile:
            model.compile()
        return model

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return tensors on the device; those that are there already as they are.

        Args:
            tensors: of any shapes and types.
        """
        # Not non_blocking: a copy may only run on by itself from pinned memory, see CUDABackend.
        return tuple(tensor.to(self.device) for tensor in tensors)

    def autocast(self, precision: Precision) -> AbstractContextManager[object]:
        """Return a context in which matrix products run in a precision.

        Args:
            precision: what `precision()` returned.
        """
        if precision == "fp32":
            return nullcontext()
        # The cache of re-cast weights holds within one context, so one context spans one forward pass.
        return torch.autocast(self.device.type, dtype=_DTYPES[precision])

    def scaler(self, precision: Precision) -> GradScaler | None:
        """Return the gradient scaler that fp16 needs, or None for another precision.

        Args:
            precision: what `precision()` returned.
        """
        if precision != "fp16":
            return None
        return torch.amp.GradScaler(self.device.type)

    def optimizer_options(self, name: str) -> dict[str, object]:
        """Return the arguments with which an optimizer is fastest here.

        Args:
            name: torch's class name, for example "AdamW".
        """
        return {}

    def default_generator(self) -> torch.Generator:
        """Return the generator that dropout on this device draws from.

        Raises:
            BackendError: torch does not tell it for this kind of device; a subclass must.
        """
        if self.is_host:
            return torch.default_generator
        try:
            generators = getattr(torch.get_device_module(self.device), "default_generators", ())
        except RuntimeError:  # torch knows the device, but has no module for it
            generators = ()
        if (self.device.index or 0) >= len(generators):
            raise BackendError(f"{type(self).__name__} must override default_generator() for {self.device}")
        found: torch.Generator = generators[self.device.index or 0]
        return found

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Seed the device's default generator inside the block, and put its state back after it.

        One thread of the process at a time is inside, so that two trainings draw what each would alone.

        Args:
            seed: an int of at most 64 bits; a CPU's generator uses the lower 32.
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
        """Whether it is the processor that Python runs on, with tensors in main memory."""
        return is_host(self.device)

    @property
    def asynchronous(self) -> bool:
        """Whether the device works on while Python goes on, so that reading a number from it is waiting."""
        return not self.is_host

    @property
    def collectives(self) -> str:
        """How the tensors of several processes meet: what `torch.distributed.init_process_group` calls it.

        It must carry tensors on the CPU, too. Here: what torch has registered for this kind of device.
        """
        if self.is_host:
            return "gloo"
        kind = self.device.type
        return f"cpu:gloo,{kind}:{torch.distributed.get_default_backend_for_device(self.device)}"

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""

    def memory(self) -> MemoryStats | None:
        """Return the device's memory, or None where it does not tell."""
        return None
