"""Two contexts for models: evaluation without dropout, and construction without random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from charlm.locks import ForkLock

__all__ = ["evaluation_mode", "without_draws"]


class _HasModules(Protocol):
    """The part of a module that is needed here."""

    def modules(self) -> Iterator[nn.Module]: ...


_evaluating: WeakKeyDictionary[object, tuple[set[object], list[nn.Module]]] = WeakKeyDictionary()
"""For each model that is being evaluated: its users, and the modules that were in training mode before."""
_lock = ForkLock()


@contextmanager
def evaluation_mode(model: _HasModules) -> Iterator[None]:
    """Switch dropout off inside the block, and restore the flag of each submodule after it.

    If several threads use the model at once, the last one to leave restores the flags. They are restored
    after an interrupt at any place, too.
    """
    me = object()
    try:
        with _lock.lock:
            if model not in _evaluating:
                _evaluating[model] = set(), [module for module in model.modules() if module.training]
            users, training = _evaluating[model]
            users.add(me)
            for module in training:
                module.training = False
        yield
    finally:
        with _lock.lock:
            users, training = _evaluating.get(model, (set(), []))
            users.discard(me)
            if not users:
                for module in training:
                    module.training = True
                _evaluating.pop(model, None)


_DRAWING = {"normal_", "uniform_", "kaiming_uniform_"}  # of torch.nn.init, and of tensors


class without_draws(TorchFunctionMode):  # noqa: N801 - used like a function, as torch.no_grad is
    """Leaves parameters uninitialized where a constructor would fill them with random numbers.

    Filling takes most of the time of building a model; on the meta device, torch would spend a second on
    imports for it. The idea is that of torch.nn.utils.skip_init.
    """

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, unless it is one of `_DRAWING`."""
        named = kwargs or {}
        filled = args[0] if args else named.get("tensor")  # torch.nn.init passes it by name
        if func.__name__ in _DRAWING and isinstance(filled, nn.Parameter):
            return filled
        return func(*args, **named)
