"""Ways to hold a model for a while: asked without dropout, or built without its random numbers."""

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
    """A module, as far as it is looked at here."""

    def modules(self) -> Iterator[nn.Module]: ...


_evaluating: WeakKeyDictionary[object, tuple[set[object], list[nn.Module]]] = WeakKeyDictionary()
"""Of each model that is being evaluated: who does, and the modules that were training before."""
_lock = ForkLock()


@contextmanager
def evaluation_mode(model: _HasModules) -> Iterator[None]:
    """Switch dropout off inside the block; each submodule then gets back the flag that it had.

    The flags belong to the model, so of several threads that use it at once the last one out restores them.
    An interrupt at any place leaves none of them switched off.
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
    """Leaves parameters as they were allocated where a constructor would fill them with random numbers.

    That is most of the time which a model takes to build; on the meta device, torch would import a second's
    worth of modules for it. The idea is torch.nn.utils.skip_init's.
    """

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, unless it is one of the three."""
        named = kwargs or {}
        filled = args[0] if args else named.get("tensor")  # torch.nn.init passes it by name
        if func.__name__ in _DRAWING and isinstance(filled, nn.Parameter):
            return filled
        return func(*args, **named)
