"""`evaluation_mode`: a model asked without dropout, and put back as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import nn

from charlm.locks import ForkLock

__all__ = ["evaluation_mode"]


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
        with _lock:
            if model not in _evaluating:
                _evaluating[model] = set(), [module for module in model.modules() if module.training]
            users, training = _evaluating[model]
            users.add(me)
            for module in training:
                module.training = False
        yield
    finally:
        with _lock:
            users, training = _evaluating.get(model, (set(), []))
            users.discard(me)
            if not users:
                for module in training:
                    module.training = True
                _evaluating.pop(model, None)
