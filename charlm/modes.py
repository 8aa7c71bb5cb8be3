"""`evaluation_mode`: a model asked without dropout, and put back as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["evaluation_mode"]


class _HasModules(Protocol):
    """A module, as far as it is looked at here."""

    def modules(self) -> Iterator[nn.Module]: ...


_evaluating: WeakKeyDictionary[object, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_evaluating_lock = Lock()


@contextmanager
def evaluation_mode(model: _HasModules) -> Iterator[None]:
    """Switch dropout off inside the block; each submodule then gets back the flag that it had.

    The flags belong to the model, so of several threads that use it at once the last one out restores them.
    """
    with _evaluating_lock:
        users, training = _evaluating.get(model, (0, []))
        if users == 0:
            training = [module for module in model.modules() if module.training]
            for module in training:
                module.training = False
        _evaluating[model] = users + 1, training
    try:
        yield
    finally:
        with _evaluating_lock:
            users, training = _evaluating.pop(model)
            if users > 1:
                _evaluating[model] = users - 1, training
            else:
                for module in training:
                    module.training = True
