"""The classes of models by `kind`, their name in config.json: charlm's own and those of the caller."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from charlm.errors import InputError

if TYPE_CHECKING:
    from charlm.models.base import LanguageModel

__all__ = ["class_of", "known_kinds", "register"]

_OURS = {kind: f"charlm.models.{kind}" for kind in ("bigram", "gpt", "mixture", "ngram")}
"""The modules that define charlm's kinds; each is imported when its kind is asked for."""

_classes: dict[str, type[LanguageModel]] = {}


def register(kind: str, cls: type[LanguageModel]) -> None:
    """Register a class under its kind. The same class may be registered again, as in a notebook.

    Raises:
        InputError: the name belongs to another class.
    """
    other = class_of(kind) or cls
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise InputError(f"kind {kind!r} belongs to {other.__qualname__}; give {cls.__name__} its own")
    _classes[kind] = cls


def class_of(kind: str) -> type[LanguageModel] | None:
    """Return the class of a kind, or None.

    Example:
        >>> class_of("gpt")
        <class 'charlm.models.gpt.GPT'>
    """
    if kind in _OURS and kind not in _classes:
        importlib.import_module(_OURS[kind])  # registers the class
    return _classes.get(kind)


def known_kinds() -> list[str]:
    """Return all kinds, charlm's first."""
    return list({**_OURS, **_classes})
