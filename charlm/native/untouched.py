"""Checks that a model is as its settings describe it, so that a compiled pass may replace its `forward`.

A part of another class, type or size (an adapter, a quantised layer, a pruned network), a hook, or a replaced
`forward` is a difference. Then the model itself computes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from charlm.modes import without_draws

__all__ = ["first_change", "has_its_own_forward", "hooks_on_all_modules"]

_PLAIN = (bool, int, float, str, tuple, type(None))

_Looks = tuple[type[nn.Module], Mapping[str, Any], Mapping[str, torch.Size], list[str]]
"""Class, plain attributes, shapes of the own parameters, and names of the children."""


def hooks_on_all_modules() -> str | None:
    """Return a reason if there are global hooks on modules, which a compiled pass would not call, or None."""
    hooks = nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return "there are hooks on all modules"
    return None


def first_change(model: nn.Module, config: object) -> str | None:
    """Return the name of the first part that differs from a new model of this class and these settings.

    Args:
        model: a model whose class takes `config`.
        config: frozen settings.

    Returns:
        A name as in `named_modules`, or "the model itself"; None if no part differs.
    """
    expected = _new_looks(type(model), config)  # type: ignore[arg-type]  # a class has a hash
    parts = dict(model.named_modules())  # some may have been added to it, which nothing asks
    patched = {cls for cls, *_ in expected.values() if not has_its_own_forward(cls)}
    for name, looks in expected.items():
        if name not in parts or looks[0] in patched or not _looks_like(parts[name], looks):
            return name or "the model itself"
    return None


def has_its_own_forward(cls: type[nn.Module]) -> bool:
    """Return whether `forward` is the one of the class or a base, not a replacement."""
    wrapped = hasattr(cls.forward, "__wrapped__")  # functools.wraps gives a wrapper the other's module
    return not wrapped and cls.forward.__module__ in {base.__module__ for base in cls.__mro__}


@functools.lru_cache(maxsize=64)
def _new_looks(cls: type[nn.Module], config: object) -> dict[str, _Looks]:
    with torch.device("meta"), without_draws():  # which takes no memory and next to no time
        twin = cls(config)
    return {
        name: (
            type(part),
            {
                key: value
                for key, value in vars(part).items()
                if type(value) in _PLAIN and key != "training" and not key.startswith("_")
            },
            _shapes(part),
            list(part._modules),
        )
        for name, part in twin.named_modules()
    }


def _looks_like(part: nn.Module, looks: _Looks) -> bool:
    cls, values, shapes, children = looks
    own = vars(part)
    return (
        type(part) is cls
        and not part._forward_hooks
        and not part._forward_pre_hooks
        and "forward" not in own
        and all(type(own.get(key, ...)) is type(value) and own[key] == value for key, value in values.items())
        and _shapes(part) == shapes
        and (cls is not nn.ModuleList or list(part._modules) == children)
    )


def _shapes(part: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in part._parameters.items() if p is not None}
