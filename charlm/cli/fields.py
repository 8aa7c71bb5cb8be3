"""The fields of settings classes for the command line: name, type, choices and help. No torch here.

The help of an option is the docstring below its field, read from the source. The class of the sampling
options needs torch, so its fields are read from the source alone.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import pkgutil
import sys
import types
from dataclasses import dataclass
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["Field", "field_docs", "fields_of", "flag_of", "sampling_fields"]


@dataclass(frozen=True)
class Field:
    """One setting."""

    name: str
    """Name of the field in its class."""
    table: str
    """"model", "training" or "sampling"."""
    kind: type
    """int, float, bool, str or tuple."""
    choices: tuple[str, ...]
    """The possible values of a str."""
    optional: bool
    """Whether "none" means None."""
    doc: str
    """The docstring below the field, in one line."""


def flag_of(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def fields_of(cls: type, table: str) -> dict[str, Field]:
    """Return the fields of a dataclass by name; `table` is their table."""
    fields = {}
    docs, hints = field_docs(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, optional = hints[field.name], False
        if get_origin(hint) in (Union, types.UnionType):  # X | None
            hint, optional = next(a for a in get_args(hint) if a is not type(None)), True
        if get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        origin = get_origin(hint)
        choices = get_args(hint) if origin is Literal else ()
        kind = str if origin is Literal else origin or hint
        fields[field.name] = Field(field.name, table, kind, choices, optional, docs.get(field.name, ""))
    return fields


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a class, in one line; empty if the source is missing."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    except (OSError, TypeError):
        return {}
    return {name: doc for name, (_, doc) in _in_source(tree, cls.__name__).items()}


def sampling_fields() -> dict[str, Field]:
    """Return the fields of `SamplingOptions` by name; torch is imported only if the source is missing."""
    try:
        source = pkgutil.get_data("charlm", "generation/options.py") or b""
    except OSError:
        from charlm.generation.options import SamplingOptions  # noqa: PLC0415 - torch takes seconds

        return fields_of(SamplingOptions, "sampling")
    tree = ast.parse(source)
    literals = {
        node.targets[0].id: tuple(p.value for p in ast.walk(node.value) if isinstance(p, ast.Constant))
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    kinds = {"int": int, "float": float, "bool": bool}
    fields = {}
    for name, (hint, doc) in _in_source(tree, "SamplingOptions").items():
        kind, _, none = hint.partition(" | ")
        choices = tuple(map(str, literals.get(kind, ())))
        fields[name] = Field(name, "sampling", kinds.get(kind, str), choices, bool(none), doc)
    return fields


def _in_source(tree: ast.Module, name: str) -> dict[str, tuple[str, str]]:
    """Return the annotation and the docstring, in one line, of each field of a class."""
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        field.target.id: (ast.unparse(field.annotation), " ".join(doc.value.value.split()))
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }
