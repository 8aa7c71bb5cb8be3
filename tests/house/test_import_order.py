"""The wings of the house, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import charlm

PACKAGE = Path(charlm.__file__).parent
ORDER = [
    {"errors", "plain", "config", "randomness", "locks", "modes", "terminal"},
    {"files"},
    {"text"},
    {"backends", "data", "patterns"},
    {"generation"},
    {"native"},
    {"models"},
    {"evaluation"},
    {"runs"},
    {"training"},
    {"lm"},
    {"compression", "interchange", "plotting", "testing"},
    {"cli"},
]
LEVEL = {wing: level for level, wings in enumerate(ORDER) for wing in wings}
NO_TORCH = [
    "charlm",
    "charlm.cli",
    "charlm.cli.__main__",
    "charlm.config",
    "charlm.data.prepare",
    "charlm.errors",
    "charlm.files.atomic",
    "charlm.files.strict_json",
    "charlm.models.config",
    "charlm.patterns.wishes",
    "charlm.plain",
    "charlm.randomness",
    "charlm.text.corpus",
    "charlm.text.inspection",
    "charlm.text.tokenizer",
    "charlm.training.config",
    "charlm.training.schedules",
]


def wing_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> list[str]:
    """Return the charlm modules that a file imports at run time, wherever in it."""
    return _imports(path.read_text(encoding="utf-8"))


@cache
def _imports(source: str) -> list[str]:
    return list(_imported(ast.parse(source)))


def _imported(tree: ast.Module) -> Iterator[str]:
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("charlm"):
            if node.module != "charlm":
                yield node.module
                yield from (f"{node.module}.{a.name}" for a in node.names)  # which may be files of it
            else:  # names of the top itself, such as __version__, belong to no wing
                yield from (f"charlm.{a.name}" for a in node.names if not a.name.startswith("__"))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("charlm."))


def modules() -> list[Path]:
    # The two files at the top only point at others: __init__ lazily, __main__ to the command line.
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or not p.stem.startswith("__"))


def test_imports_go_down_the_house_only() -> None:
    for path in modules():
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imports(path):
            there = wing_of(module)
            assert there in LEVEL, f"{path}: {module} is no wing; import it from its own module"
            allowed = there == here or LEVEL[there] < LEVEL[here] or LEVEL[there] == LEVEL[here] == 0
            assert allowed, f"{path}: {here} must not import {module}"


def circles(wing: str) -> Iterator[list[str]]:
    """Yield the rings of files in a wing that import each other at run time, wherever in them."""
    inside = {
        f"charlm.{wing}.{path.stem}": {
            module for module in imports(path) if module.startswith(f"charlm.{wing}.")
        }
        for path in (PACKAGE / wing).glob("*.py")
        if path.stem != "__init__"
    }
    inside = {module: others & inside.keys() for module, others in inside.items()}

    def walk(module: str, before: list[str]) -> Iterator[list[str]]:
        if module in before:
            yield [*before[before.index(module) :], module]
            return
        for other in sorted(inside[module]):
            yield from walk(other, [*before, module])

    for module in inside:
        yield from walk(module, [])


def test_no_files_of_a_wing_import_each_other_in_a_circle() -> None:
    for wing in sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()):
        assert next(circles(wing), None) is None


def test_a_circle_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "wing").mkdir()
    files = {
        "a": "from charlm.wing.b import x",
        "b": "def late():\n    from charlm.wing import c",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from charlm.wing.a import x",
    }
    for name, source in files.items():
        (tmp_path / "wing" / f"{name}.py").write_text(source, encoding="utf-8")
    assert list(circles("wing")) == []
    (tmp_path / "wing" / "c.py").write_text("from charlm.wing.a import x", encoding="utf-8")
    assert ["charlm.wing.a", "charlm.wing.b", "charlm.wing.c", "charlm.wing.a"] in circles("wing")


def test_every_folder_of_the_package_is_a_known_wing() -> None:
    folders = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix in {"", ".py"}}
    assert folders - {"__pycache__", "__init__", "__main__"} <= LEVEL.keys()


@pytest.mark.slow
def test_the_quiet_modules_import_without_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {NO_TORCH!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
