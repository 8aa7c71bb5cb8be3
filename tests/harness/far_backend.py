"""A device that works on while Python goes on, played by the CPU."""

from __future__ import annotations

from typing_extensions import override

from charlm.backends.cpu import CPUBackend

__all__ = ["FarBackend"]


class FarBackend(CPUBackend):
    """The CPU, claiming to work on its own."""

    @property
    @override
    def asynchronous(self) -> bool:
        return True
