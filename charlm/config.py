"""`Config`: the base of the settings classes.

A config is a frozen dataclass with keyword-only fields. Its constructor checks all fields and reports every
bad one. Numbers of other types, such as numpy's, become Python's own (`charlm.plain`). Nothing else is cast:
2.0 is no int. The bounds of a field are in its annotation (`Annotated[int, Range(1, 1000)]`). Its meaning is
in the docstring below it, which is also the help of the command line. This module knows nothing of models,
training or torch.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

from charlm.errors import ConfigError, nearest, quoted, shown
from charlm.plain import as_bool, as_float, as_int, as_text

__all__ = ["Config", "Range"]

_MOST_UNKNOWN = 4  # unknown fields named in a message, since a file can hold thousands


@dataclass(frozen=True)
class Range:
    """Bounds of a number: `minimum <= x <= maximum`, and `above < x < below` where the end is excluded."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = (
            ("at least", self.minimum),
            ("above", self.above),
            ("at most", self.maximum),
            ("below", self.below),
        )
        return " and ".join(f"{word} {bound:.15g}" for word, bound in bounds if bound is not None)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of frozen, keyword-only settings that check themselves.

    Subclasses are dataclasses of the same kind (`@dataclass(frozen=True, kw_only=True)`) whose fields
    are bool, int, float, str, a Literal, another config, a tuple of these, or one of them or None.

    Raises:
        ConfigError: from the constructor, `from_dict` and `replace`; lists every bad field.
    """

    _other_names: ClassVar[Mapping[str, str]] = {}
    """Fields by the names that other libraries give them, for the hints of messages."""

    def __new__(cls, **fields: Any) -> Self:
        """Check the fields before the dataclass's own constructor."""
        problems = _problems(cls, fields, whole=True)
        if problems:
            raise _config_error(cls, [*problems, *_missing(cls, fields)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        problems = []
        for name, hint in _hints(type(self)).items():
            given = getattr(self, name)
            value, problem = _checked(hint, given)
            if problem is None:
                object.__setattr__(self, name, value)
            else:  # only a default can still be wrong here
                problems.append(f"{name} must be {problem}, got {shown(given)}")
        if problems:
            raise _config_error(type(self), problems)

    @classmethod
    def _conflicts(cls, right: Mapping[str, Any]) -> Iterator[str]:
        """Yield a sentence for each pair of fields that exclude each other. Subclasses override it.

        Args:
            right: the fields with a valid value; others may be wrong or missing.
        """
        yield from ()

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Make a config from a mapping, for example one read from JSON or TOML.

        Args:
            values: fields by name; a list stands for a tuple. Missing fields have their defaults.

        Raises:
            ConfigError: lists unknown names (with the most similar known one), missing fields and bad values.

        Example:
            >>> from charlm import GPTConfig
            >>> GPTConfig.from_dict({"vocab_size": 65, "n_layers": 4})
            Traceback (most recent call last):
                ...
            charlm.errors.ConfigError: GPTConfig: unknown field 'n_layers'; did you mean 'n_layer'?
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__}: the fields must be a mapping, got {type(values).__name__}")
        problems = [*_problems(cls, values, whole=True), *_missing(cls, values)]
        if problems:
            raise _config_error(cls, problems)
        return cls(**values)

    @classmethod
    def check(cls, values: Mapping[str, object]) -> list[str]:
        """Return a sentence for each unknown name, bad value and pair of fields that exclude each other.

        Missing fields are not reported.

        Args:
            values: fields by name.

        Example:
            >>> from charlm import GPTConfig
            >>> GPTConfig.check({"n_layer": 0})
            ['n_layer must be an int at least 1 and at most 256, got 0']
        """
        return _problems(cls, values, whole=False)

    def to_dict(self) -> dict[str, Any]:
        """Return every field, in order, as values of JSON (tuples as lists)."""
        return {name: _plain(getattr(self, name)) for name in _hints(type(self))}

    def replace(self, **changes: object) -> Self:
        """Return a copy with some fields changed. It is checked like a new one.

        Args:
            changes: fields by name.

        Raises:
            ConfigError: lists every bad field.
        """
        return type(self).from_dict({**self.to_dict(), **changes})


_known_hints: WeakKeyDictionary[type[Config], dict[str, Any]] = WeakKeyDictionary()


def _hints(cls: type[Config]) -> dict[str, Any]:
    """Return the type of each field, computed once, since it takes a millisecond. Do not change the dict."""
    if cls not in _known_hints:
        hints = get_type_hints(cls, include_extras=True)
        _known_hints[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return _known_hints[cls]


def _config_error(cls: type[Config], problems: Sequence[str]) -> ConfigError:
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    return ConfigError(f"{cls.__name__}: {count}{'; '.join(problems)}", problems=problems)


def _unknown_fields(cls: type[Config], values: Mapping[str, object]) -> Iterator[str]:
    fields = _hints(cls)
    unknown = [name for name in values if name not in fields]
    for name in unknown[:_MOST_UNKNOWN]:
        near = cls._other_names.get(name) or nearest(str(name), fields)
        hint = f"; did you mean {near!r}?" if near else f"; the fields are {', '.join(fields)}"
        yield f"unknown field {quoted(str(name), 40)}{hint}"
    if len(unknown) > _MOST_UNKNOWN:
        yield f"{len(unknown) - _MOST_UNKNOWN} more unknown fields"


def _problems(cls: type[Config], values: Mapping[str, object], *, whole: bool) -> list[str]:
    """Return all problems of some fields; with `whole`, the defaults are checked, too."""
    bad: list[str] = []
    right: dict[str, Any] = {}
    looked_at = {**_defaults(cls), **values} if whole else values
    for name, hint in _hints(cls).items():
        if name in looked_at:
            kept, problem = _checked(hint, looked_at[name])
            if problem is None:
                right[name] = kept
            elif name in values:
                bad.append(f"{name} must be {problem}, got {shown(values[name])}")
    return [*_unknown_fields(cls, values), *bad, *cls._conflicts(right)]


def _missing(cls: type[Config], values: Mapping[str, object]) -> list[str]:
    there = _defaults(cls).keys() | values.keys()
    return [f"{name} is missing" for name in _hints(cls) if name not in there]


def _defaults(cls: type[Config]) -> dict[str, object]:
    fields = dataclasses.fields(cls)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def _checked(hint: Any, value: Any) -> tuple[Any, str | None]:
    """Return the plain value of a field, and None or a description of a valid value."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kept, problem = _checked(args[0], value)
        bounds = next(a for a in args[1:] if isinstance(a, Range))
        if problem is not None or kept not in bounds:
            return value, f"{_described(args[0])} {bounds}"
        return kept, None
    if origin in (Union, types.UnionType):  # X | None is the only union in use
        if value is None:
            return None, None
        kept, problem = _checked(next(a for a in args if a is not type(None)), value)
        return kept, None if problem is None else f"{problem}, or None"
    if origin is Literal:
        text = as_text(value)
        return text, None if text in args else "one of " + ", ".join(repr(a) for a in args)
    if origin is tuple:
        if args[-1] is ... and isinstance(value, (tuple, list)):
            args = args[:1] * len(value)
        if isinstance(value, (tuple, list)) and len(value) == len(args):
            parts = [_checked(a, v) for a, v in zip(args, value, strict=True)]
            if all(problem is None for _, problem in parts):
                return tuple(kept for kept, _ in parts), None
        return value, f"({', '.join('...' if a is ... else _checked(a, ...)[1] or '' for a in args)})"
    if issubclass(hint, Config):
        return value, None if isinstance(value, hint) else f"a {hint.__name__}"
    kept = _PLAIN[hint](value)
    fits = kept is not None and (hint is not float or math.isfinite(kept))
    return kept, None if fits else _described(hint)


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value.to_dict() if isinstance(value, Config) else value


_PLAIN: Mapping[type, Callable[[object], Any]] = {bool: as_bool, int: as_int, float: as_float, str: as_text}


def _described(hint: type) -> str:
    return {int: "an int", float: "a finite number", bool: "True or False", str: "a string"}[hint]
