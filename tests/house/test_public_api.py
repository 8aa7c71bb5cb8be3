"""The public names and their signatures. A change here is a change for users: announce it first."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import charlm

PINNED = Path(__file__).with_name("public_api.txt")
MODULES = [
    "charlm",
    "charlm.compression",
    "charlm.errors",
    "charlm.evaluation",
    "charlm.generation",
    "charlm.interchange",
    "charlm.plotting",
    "charlm.testing",
    "charlm.training",
]


def described(name: str, value: object) -> list[str]:
    """Return one line for a function or a class and each of its public methods."""
    if inspect.isclass(value):
        lines = [f"class {name}"]
        if value.__module__.startswith("charlm") and not issubclass(value, Exception):
            for member in sorted(vars(value)):
                raw = inspect.getattr_static(value, member)
                function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
                if hasattr(function, "hooked"):  # torch puts its own around an inherited `Optimizer.step`
                    continue
                if inspect.isfunction(function) and (not member.startswith("_") or member == "__init__"):
                    lines.append(f"  {name}.{member}{inspect.signature(function)}")
                elif isinstance(raw, property) and not member.startswith("_"):
                    lines.append(f"  {name}.{member}: property")
        return lines
    if inspect.isfunction(value):
        return [f"{name}{inspect.signature(value)}"]
    return [f"{name}: {type(value).__name__}"]


def current() -> str:
    lines = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        lines.append(f"# {module_name}")
        for name in sorted(module.__all__):
            lines += described(name, getattr(module, name))
    return "\n".join(lines) + "\n"


def test_public_names_and_signatures_are_as_pinned() -> None:
    # After a change that is meant: python tests/house/test_public_api.py > tests/house/public_api.txt
    assert current() == PINNED.read_text(encoding="utf-8")


def test_all_is_sorted_complete_and_small() -> None:
    # Sorted as ruff sorts __all__: constants, then classes, then functions.
    by_case = sorted(charlm.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert charlm.__all__ == by_case
    assert set(charlm.__all__) == set(charlm._HOMES)
    assert len(charlm.__all__) <= 21
    assert set(charlm.__all__) <= set(dir(charlm))


@pytest.mark.slow
def test_every_public_module_is_an_attribute_that_loads_when_it_is_used() -> None:
    modules = [name.removeprefix("charlm.") for name in MODULES[1:]]
    assert set(modules) == set(charlm._MODULES) <= set(dir(charlm))
    # Each in a process of its own, which has torch already and nothing else of charlm.
    script = (
        "import os, sys, charlm; assert 'torch' not in sys.modules; import torch\n"
        "for name in sys.argv[1:]:\n"
        "    sys.stdout.flush()\n"
        "    if os.fork() == 0:\n"
        "        print(getattr(charlm, name).__name__)\n"
        "        break\n"
        "    os.wait()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *modules], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == [f"charlm.{name}" for name in modules]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Gpt'"):
        _ = charlm.Gpt  # type: ignore[attr-defined]  # so says the type checker, too


@pytest.mark.parametrize(
    ("owner", "former", "now"),
    [
        ("charlm.training", "Evaluation", "EvalRecord"),
        ("charlm.generation", "PlainState", "PredictionState"),
        ("charlm.training.trainer.Trainer", "stop", "finish"),
        ("charlm.training.trainer.Trainer", "request_stop", "interrupt"),
    ],
)
def test_a_former_name_is_answered_with_the_present_one(owner: str, former: str, now: str) -> None:
    found = pkgutil.resolve_name(owner)
    holder = object.__new__(found) if isinstance(found, type) else found
    assert hasattr(holder, now)
    with pytest.raises(AttributeError, match=f"no attribute '{former}': it is called {now}"):
        getattr(holder, former)
    with pytest.raises(AttributeError, match=r"no attribute 'anything'$"):
        _ = holder.anything


if __name__ == "__main__":
    print(current(), end="")
