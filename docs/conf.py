"""The documentation site, of which no page needs a network: `sphinx-build -W -b html docs OUT`.

Pages are Markdown, and read well where they lie: links are plain relative ones. Below the settings is what
Sphinx does not do by itself: pages for the files of the repository that a page links to, the help of the
command line, and docstrings as this library writes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import importlib
import inspect
import io
import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import numpy as np
from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from sphinx_autodoc_typehints import process_signature
from typing_extensions import is_protocol

sys.path.insert(0, str(Path(__file__).parent))
import notebooks  # a file beside this one

import charlm
from charlm.cli.parser import parse
from charlm.config import Config
from charlm.data.documents import Documents
from charlm.evaluation import Surprisal
from charlm.models.config import BigramConfig, GPTConfig, ModelConfig, NGramConfig
from charlm.training import RunHistory
from charlm.training.config import TrainerConfig

ROOT = Path(__file__).parents[1]

project = "charlm"
author = "The charlm authors"
release = version = charlm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx.ext.linkcode",
]
myst_heading_anchors = 4
default_role = "py:obj"  # `Name` in a docstring is a link where there is something of that name
smartquotes_action = "D"  # dashes alone: "error" is a string here

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # a method that only does what its base says is described there
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
toc_object_entries_show_parents = "hide"

# Types stand where the parameters are explained; in a signature they would hide its shape.
always_use_bars_union = True
typehints_document_rtype = False
typehints_use_signature_return = True

html_theme = "furo"
html_title = f"charlm {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_dark_style = "github-dark"  # the default underlines names as if they were links

suppress_warnings = ["config.cache"]  # a function among the settings, `typehints_formatter`, cannot be kept
# sphinx-autodoc-typehints 3.6 uses what Sphinx 10 will have no more; nobody who builds the pages can help it.
warnings.filterwarnings("ignore", message=".*set_application", category=DeprecationWarning)


# Files of the repository


SHOWN_AS = {"README.md": "index", "examples": "examples"}
"""What of the repository has a page of its own."""


def linked_file(docname: str, target: str) -> str | None:
    """Return the path, from the root, of a file or folder outside docs/; None for anything else."""
    path = Path(os.path.normpath(ROOT / "docs" / Path(docname).parent / target))
    for found in (path, path.with_name(f"{path.name}.md")):  # MyST cuts the ending off
        if found.exists() and ROOT in found.parents and ROOT / "docs" not in found.parents:
            return found.relative_to(ROOT).as_posix()
    return None


def page_of(file: str) -> str:
    """Return the name of the page that shows a file."""
    return SHOWN_AS.get(file, f"sources/{file}")


def link_files(app: Sphinx, doctree: nodes.document) -> None:
    """Let links to files outside docs/ lead to the pages that `file_pages` makes."""
    docname = app.env.docname
    for kind in (addnodes.download_reference, addnodes.pending_xref):
        for node in list(doctree.findall(kind)):
            file = linked_file(docname, node["reftarget"]) if node.get("reftype") == "myst" else None
            if file is not None:
                uri = app.builder.get_relative_uri(docname, page_of(file))
                node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Return where the source of a class or a function is shown, as the pages in reference/ name it."""
    try:
        value = functools.reduce(
            getattr, info["fullname"].split("."), importlib.import_module(info["module"])
        )
    except AttributeError:  # of instances
        return None
    value = getattr(value, "fget", getattr(value, "func", value))
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return None
    value = inspect.unwrap(value)
    file = Path(inspect.getfile(value)).relative_to(ROOT).as_posix()
    return f"../{page_of(file)}.html#L-{inspect.getsourcelines(value)[1]}"


def file_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, str], str]]:
    """Yield a page for each file that is linked to, and for each file in a folder that is."""
    linked = {
        match[1]
        for docname in app.env.found_docs
        for link in app.env.get_doctree(docname).findall(nodes.reference)
        if (match := re.match(r"(?:\.\./)*sources/([^#]*)\.html", link.get("refuri", "")))
    }
    for folder in [ROOT / file for file in linked if (ROOT / file).is_dir()]:
        linked |= {path.relative_to(ROOT).as_posix() for path in folder.glob("*.*")}
    for file in sorted(linked):
        if (ROOT / file).is_dir():
            names = sorted(path.name for path in (ROOT / file).glob("*.*"))
            here = Path(file).name
            body = "".join(f'<li><a href="{here}/{name}.html">{html.escape(name)}</a></li>' for name in names)
            body = f"<ul>{body}</ul>"
        else:
            text = (ROOT / file).read_text(encoding="utf-8")
            body = app.builder.highlighter.highlight_block(
                text, language_of(file), force=True, lineanchors="L"
            )
        yield page_of(file), {"title": file, "body": f"<h1>{html.escape(file)}</h1>{body}"}, "page.html"


def language_of(file: str) -> str:
    """Return the name by which Pygments knows the language of a file."""
    try:
        return str(get_lexer_for_filename(file).aliases[0])
    except ClassNotFound:
        return "text"


# Notebooks


def link_notebook(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object
) -> None:
    """Put a link to the notebook of a page below its title, where there is one."""
    if f"{pagename}.md" in notebooks.PAGES:
        file = f"{pagename.rpartition('/')[2]}.ipynb"
        link = f'<p class="notebook"><a href="{file}" download>This page as a notebook</a></p>'
        context["body"] = context["body"].replace("</h1>", f"</h1>{link}", 1)


def write_notebooks(app: Sphinx, exception: Exception | None) -> None:
    """Write the notebooks beside their pages."""
    if exception is None and app.builder.format == "html":
        notebooks.write_notebooks(Path(app.outdir))


# The command line


class CommandHelp(SphinxDirective):
    """What `charlm COMMAND --help` prints; without an argument, `charlm --help`."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return it as it stands."""
        written = io.StringIO()
        with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
            parse([*self.arguments, "--help"])
        return [nodes.literal_block(written.getvalue(), written.getvalue(), language="none")]


os.environ["COLUMNS"] = "90"  # argparse breaks lines there


# Docstrings


def limits_of(config: type[Config]) -> dict[str, str]:
    """Return a sentence for each field that has bounds: what it must be."""
    hints = get_type_hints(config, include_extras=True)
    limits = {}
    for field in dataclasses.fields(config):
        if "Range" in repr(hints[field.name]):
            (problem,) = config.check({field.name: ...})  # "n_layer must be an int at least 1 ..., got ..."
            wanted = problem.removeprefix(field.name).partition(", got ")[0].strip()
            wanted = re.sub(r"\d{5,}", lambda number: f"{int(number[0]):,}", wanted)
            limits[field.name] = f"{wanted[0].upper()}{wanted[1:]}."
    return limits


SETTINGS = {
    "charlm": (GPTConfig, TrainerConfig),
    "charlm.models.config": (ModelConfig, BigramConfig, NGramConfig),
}
LIMITS = {
    f"{module}.{config.__name__}.{field}": limit
    for module, configs in SETTINGS.items()
    for config in configs
    for field, limit in limits_of(config).items()
}
for _config in itertools.chain(*SETTINGS.values()):  # int is shown as int: its bounds have their sentence
    _hints = get_type_hints(_config)
    _config.__annotations__ = {field: _hints[field] for field in _config.__annotations__}


class NDArray:
    """How the type of an array is shown in a record: the type of its numbers is said in words."""

    __module__ = "numpy.typing"


for _record in (RunHistory, Surprisal, Documents):
    _hints = get_type_hints(_record)
    _record.__annotations__ = {
        field: NDArray if get_origin(hint) is np.ndarray else hint for field, hint in _hints.items()
    }

KEPT: dict[str, list[str]] = {}


def keep_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Complete the docstring of a value, and keep it from Napoleon, to which "None: no limit" is a type."""
    if what == "data" and name.startswith("charlm."):
        lines[:] = data_docstring(name) or lines
        if isinstance(obj, Mapping):
            lines += ["", *table(columns_of(obj))]
    if name in LIMITS:
        lines[:] = [*lines[:-1], LIMITS[name], ""]
    if what in {"attribute", "data", "property"}:
        KEPT[name] = lines.copy()


def restore_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Put back what `keep_docstring` kept."""
    lines[:] = KEPT.pop(name, lines)


def data_docstring(name: str) -> list[str]:
    """Return the docstring of a value or a type, from the module that it was imported from."""
    module, _, short = name.rpartition(".")
    for home in [module, *(m for m in sorted(sys.modules) if m.startswith(f"{module}."))]:
        docs = ModuleAnalyzer.for_module(home)
        docs.analyze()
        if ("", short) in docs.attr_docs:
            return docs.attr_docs["", short]
    return []


def columns_of(
    values: Mapping[str, Mapping[str, object]] | Mapping[str, TrainerConfig],
) -> dict[str, dict[str, object]]:
    """Return the fields of presets; of recipes those in which one of them differs from the defaults."""
    fields = {name: v.to_dict() if isinstance(v, TrainerConfig) else dict(v) for name, v in values.items()}
    if all(isinstance(v, TrainerConfig) for v in values.values()):
        defaults = TrainerConfig().to_dict()
        changed = [key for key in defaults if any(f[key] != defaults[key] for f in fields.values())]
        fields = {name: {key: f[key] for key in changed} for name, f in fields.items()}
    return fields


def table(columns: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """Yield the lines of a table with a column for each key, and a row for each key inside."""
    yield from (".. list-table::", "   :header-rows: 1", "   :stub-columns: 1", "")
    yield "   * -"
    yield from (f"     - {column}" for column in columns)
    for row in dict.fromkeys(key for values in columns.values() for key in values):
        yield f"   * - {row}"
        yield from (f"     - {values.get(row, '')}" for values in columns.values())


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: object, arguments: str | None, returns: str | None
) -> tuple[str, None] | None:
    """Leave out what the text below a signature says better."""
    arguments, _ = process_signature(app, what, name, obj, options, arguments, returns) or (arguments, None)
    if arguments is None:
        return None
    if what in {"class", "exception"}:
        arguments = arguments.removesuffix(" -> None")
        if dataclasses.is_dataclass(obj):  # the fields follow, each with its default
            arguments = "(**fields)" if all(field.kw_only for field in dataclasses.fields(obj)) else ""
        if is_protocol(obj):
            arguments = ""
    return re.sub(r"ndarray\[.*\]\]", "NDArray", arguments), None


def typehints_formatter(annotation: object, config: object = None) -> str | None:
    """Return how a parameter's type is written; None: as usual, and in a signature.

    The type of an array's numbers is said in words.
    """
    return "``NDArray``" if config and get_origin(annotation) is np.ndarray else None


def link_public_name(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Resolve `Trainer.fit` on any page: a public name needs no module before it."""
    if node.get("refdomain") != "py" or node["reftarget"].partition(".")[0] not in charlm.__all__:
        return None
    python, target = env.get_domain("py"), f"charlm.{node['reftarget']}"
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


def setup(app: Sphinx) -> dict[str, object]:
    """Connect all this to Sphinx."""
    app.add_directive("command-help", CommandHelp)
    app.connect("doctree-read", link_files, priority=100)
    app.connect("html-collect-pages", file_pages)
    app.connect("autodoc-process-docstring", keep_docstring, priority=100)
    app.connect("autodoc-process-docstring", restore_docstring, priority=900)
    app.connect("autodoc-process-signature", shorten_signature, priority=100)
    app.connect("missing-reference", link_public_name)
    app.connect("html-page-context", link_notebook)
    app.connect("build-finished", write_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
