"""Which class a saved model's `kind` names: ours, and those that a caller has defined."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from charlm.errors import InputError

if TYPE_CHECKING:
    from charlm.models.base import LanguageModel

__all__ = ["class_of", "known_kinds", "register"]

_OURS = {kind: f"charlm.models.{kind}" for kind in ("bigram", "gpt", "mixture", "ngram")}
"""Where our kinds are defined: imported when one is asked for."""

_classes: dict[str, type[LanguageModel]] = {}


def register(kind: str, cls: type[LanguageModel]) -> None:
    """Let `kind` name a class. The same class may be defined again, as in a notebook.

    Raises:
        InputError: the name belongs to another class.
    """
    other = class_of(kind) or cls
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise InputError(f"kind {kind!r} belongs to {other.__qualname__}; give {cls.__name__} its own")
    _classes[kind] = cls


def class_of(kind: str) -> type[LanguageModel] | None:
    """Return the class that a kind names; None if there is none.

    Example:
        >>> class_of("gpt")
        <class 'charlm.models.gpt.GPT'>
    """
    if kind in _OURS and kind not in _classes:
        importlib.import_module(_OURS[kind])  # which registers it
    return _classes.get(kind)


def known_kinds() -> list[str]:
    """Return all names, ours first."""
    return list({**_OURS, **_classes})
