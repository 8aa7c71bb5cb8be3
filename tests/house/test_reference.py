"""The reference has every public name, and every name says what it is by an example that runs.

The examples are doctests, which `--doctest-modules` runs. These need none: protocols, types and other values,
which are not called; errors, which the library makes; and records, the dataclasses that it hands out (those
with a field that must be given, but for a `Config`).
"""

from __future__ import annotations

import dataclasses
import html
import importlib
import inspect
import re
import zlib
from pathlib import Path

import pytest
from house.conftest import ROOT, Site
from house.test_public_api import MODULES
from typing_extensions import is_protocol, is_typeddict

import charlm
from charlm import CharLMError, Config
from charlm.cli.parser import COMMANDS

pytestmark = pytest.mark.slow

PUBLIC = [
    (module, name, getattr(importlib.import_module(module), name))
    for module in MODULES
    for name in importlib.import_module(module).__all__
    if module == "charlm" or name not in charlm.__all__
]


def inventory(site: Site) -> dict[str, str]:
    """Return the page of each name that the reference describes, from what Sphinx writes for other sites."""
    data = (site.folder / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = [line.split(" ") for line in zlib.decompress(data).decode().splitlines()]
    return {name: page.partition("#")[0] for name, role, _, page, *_ in lines if role.startswith("py:")}


def is_record(value: type) -> bool:
    if not dataclasses.is_dataclass(value) or issubclass(value, Config):
        return False
    return any(f.default is f.default_factory is dataclasses.MISSING for f in dataclasses.fields(value))


def needs_example(value: object) -> bool:
    if not inspect.isclass(value):
        return inspect.isfunction(value)
    exempt = is_protocol(value) or is_typeddict(value) or is_record(value) or issubclass(value, CharLMError)
    return not exempt


def docstrings(value: object) -> list[str]:
    """Return the docstring of a function; of a class, also those of its methods."""
    members = vars(value).values() if inspect.isclass(value) else ()
    functions = [getattr(member, "__func__", member) for member in members]
    return [thing.__doc__ or "" for thing in (value, *filter(inspect.isfunction, functions))]


def test_the_reference_has_every_public_name_on_the_page_of_its_module(site: Site) -> None:
    found = inventory(site)
    for module, name, _ in PUBLIC:
        page = module.removeprefix("charlm.")
        assert found.get(f"{module}.{name}") == f"reference/{page}.html", name


def test_every_public_class_and_function_has_an_example() -> None:
    for name, value in [(name, value) for _, name, value in PUBLIC if needs_example(value)]:
        assert any(re.search(r"^ *Example:\n +>>> ", text, re.M) for text in docstrings(value)), name


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    for _, name, value in PUBLIC:
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{name}("), f"{name}: a dataclass without a docstring"


def test_settings_are_described_with_their_defaults_and_limits(site: Site) -> None:
    page = (site.folder / "reference" / "charlm.html").read_text(encoding="utf-8")
    text = " ".join(re.sub("<[^>]*>", "", page).split())
    assert "block_size: int = 256¶ T, the most tokens that the model sees at once." in text
    assert "Must be an int at least 1 and at most 1,048,576." in text
    assert "vocab_size: int¶ V, the number of different ids: tokenizer.vocab_size." in text
    assert "None: 4 C, or 8/3 C with swiglu" in text
    assert "Annotated" not in text
    assert "Range(" not in text


def test_no_signature_shows_a_type_as_python_stores_it(site: Site) -> None:
    for path in (site.folder / "reference").glob("*.html"):
        page = path.read_text(encoding="utf-8")
        for signature in re.findall(r'<dt class="sig sig-object py".*?</dt>', page, re.S):
            text = html.unescape(re.sub("<[^>]*>", "", signature))
            assert not re.search(r"typing\.|Annotated|ForwardRef|ndarray\[|(→|:) '", text), text


def test_the_reference_shows_the_help_of_every_command(site: Site) -> None:
    source = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert re.findall(r"^## charlm (\w+)\n\n```{command-help} \1\n```$", source, re.M) == list(COMMANDS)
    page = (site.folder / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "usage: charlm train FILE... -o RUN [options]" in page
    assert "Optimizer steps of the whole run; the schedule ends there." in page


def test_every_page_of_the_reference_is_in_its_index() -> None:
    folder = ROOT / "docs" / "reference"
    index = Path(folder, "index.md").read_text(encoding="utf-8")
    for path in folder.glob("*.md"):
        if path.name != "index.md":
            assert f"]({path.name})" in index
            assert f"\n{path.stem}\n" in index
