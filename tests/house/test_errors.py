"""The errors: the tree is as drawn, everything pickles, and no message carries a control character."""

from __future__ import annotations

import builtins
import copy
import errno
import pickle
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import charlm.errors
from charlm.errors import (
    CharLMError,
    CheckpointWriteError,
    ConfigError,
    FileFormatError,
    InvalidTextError,
    NonFiniteError,
    NotEnoughMemoryError,
    TrainingInterrupted,
    UnknownCharacterError,
    quoted,
)

CLASSES: dict[str, type[CharLMError]] = {
    name: found for name in charlm.errors.__all__ if isinstance(found := getattr(charlm.errors, name), type)
}

EXAMPLES: list[tuple[CharLMError, dict[str, object]]] = [
    (ConfigError("bad", problems=["a", "b"]), {"problems": ("a", "b")}),
    (
        UnknownCharacterError("bad", characters="é€", position=7, line=2, column=3, count=4),
        {"characters": ("é", "€"), "position": 7, "line": 2, "column": 3, "count": 4},
    ),
    (InvalidTextError("bad", offset=12), {"offset": 12}),
    (FileFormatError("bad", path="a/b.json"), {"path": "a/b.json"}),
    (CheckpointWriteError("bad", errno=errno.ENOSPC), {"errno": errno.ENOSPC}),
    (CheckpointWriteError("bad"), {"errno": None}),
    (NonFiniteError("bad", step=3, parameter="lm_head.weight"), {"step": 3, "parameter": "lm_head.weight"}),
    (
        NotEnoughMemoryError("bad", needed_bytes=9, available_bytes=5, batch_size=2),
        {"needed_bytes": 9, "available_bytes": 5, "batch_size": 2},
    ),
    (TrainingInterrupted("bad", step=9, checkpoint="run"), {"step": 9, "checkpoint": "run"}),
]


def drawn_tree() -> dict[str, tuple[str | None, tuple[str, ...]]]:
    """Read the tree from the module's docstring: name -> (parent, builtins)."""
    tree: dict[str, tuple[str | None, tuple[str, ...]]] = {}
    path: list[str] = []
    for line in (charlm.errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│├└─ ]*)([A-Z]\w+)(?: \(([\w, ]+)\))?(?:\s{2,}|$)", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        del path[depth:]
        own = tuple(found[3].split(", ")) if found[3] else ()
        tree[found[2]] = (path[-1] if path else None, own)
        path.append(found[2])
    return tree


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    tree = drawn_tree()
    assert set(tree) == set(CLASSES)
    for name, (parent, own) in tree.items():
        cls = CLASSES[name]
        bases = cls.__bases__
        if parent is None:
            assert bases == (Exception,)
            continue
        assert bases[0] is CLASSES[parent], name
        inherited = {base for base in bases[0].__mro__ if base.__module__ == "builtins"}
        added = {base.__name__ for base in bases[1:] if base not in inherited}
        assert added == {base for base in own if getattr(builtins, base) not in inherited}, name
        assert all(issubclass(cls, getattr(builtins, base)) for base in own), name


def test_the_public_names_are_every_error_and_nothing_else() -> None:
    defined = {
        name
        for name, value in vars(charlm.errors).items()
        if isinstance(value, type) and value.__module__ == "charlm.errors"
    }
    assert set(charlm.errors.__all__) == defined
    assert list(charlm.errors.__all__) == sorted(charlm.errors.__all__)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES.keys())
def test_every_error_pickles_copies_and_shows_its_message(cls: type[CharLMError]) -> None:
    error = cls("what must be, what was found")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is cls
        assert str(again) == again.message == "what must be, what was found"
        assert again.args == error.args
        assert vars(again) == vars(error)
    assert repr(error) == f"{cls.__name__}('what must be, what was found')"
    assert cls.__doc__


@pytest.mark.parametrize(("error", "fields"), EXAMPLES, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_error_keeps_its_fields(
    error: CharLMError, fields: dict[str, object], protocol: int
) -> None:
    again = pickle.loads(pickle.dumps(error, protocol))
    assert {name: getattr(again, name) for name in fields} == fields
    assert {name: getattr(error, name) for name in fields} == fields


def test_a_note_and_an_errno_set_later_travel_too() -> None:
    error = charlm.errors.CorpusError("no such corpus")
    error.errno = errno.ENOENT
    error.add_note("looked in two places")
    again = pickle.loads(pickle.dumps(error))
    assert again.errno == errno.ENOENT
    assert again.__notes__ == ["looked in two places"]


@pytest.mark.parametrize("builtin", [ValueError, OSError, RuntimeError, ArithmeticError, MemoryError])
def test_people_who_catch_the_builtin_catch_ours(builtin: type[Exception]) -> None:
    ours = [cls for cls in CLASSES.values() if issubclass(cls, builtin)]
    assert ours
    for cls in ours:
        with pytest.raises(builtin, match="message"):
            raise cls("a message")


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=260))
def test_quoted_text_is_printable_and_tells_what_it_was(text: str) -> None:
    shown = quoted(text)
    assert shown.isprintable()
    if len(text) <= 200:
        assert eval(shown) == text  # it is a literal of Python's
    else:
        assert eval(shown) == text[:199] + "…"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "'plain'"),
        ("", "''"),
        ("it's", r"'it\'s'"),
        ("a\\b", r"'a\\b'"),
        ("\x1b[31m\n\x00", r"'\x1b[31m\n\x00'"),
        ("\u202etxt.exe", r"'\u202etxt.exe'"),
        ("\ud800", r"'\ud800'"),
        ("naïve €", "'naïve €'"),
        ("x" * 200, "'" + "x" * 200 + "'"),
        ("x" * 201, "'" + "x" * 199 + "…'"),
    ],
)
def test_quoted_examples(text: str, shown: str) -> None:
    assert quoted(text) == shown


def test_the_module_needs_nothing_but_the_standard_library() -> None:
    import ast
    import inspect

    for node in ast.walk(ast.parse(inspect.getsource(charlm.errors))):
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] in sys.stdlib_module_names
        elif isinstance(node, ast.Import):
            assert all(alias.name in sys.stdlib_module_names for alias in node.names)
