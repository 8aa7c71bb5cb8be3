"""Pages as notebooks: `python docs/notebooks.py OUT` writes those of the lecture, and of the guide to them.

A Python block becomes a cell to run, with what the page says it prints below it; commands become
`!charlm ...`; everything between is text. The site has each as a file beside its page.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in [*DOCS.glob("lecture/[0-9]*.md"), DOCS / "guides" / "notebooks.md"]
)
"""What there is a notebook of."""

_FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$\n?", re.M | re.S)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]*)\)")


def notebook_of(page: str) -> dict[str, object]:
    """Return the notebook of a page, as nbformat 4.5 has it.

    Args:
        page: its path from docs/, such as "lecture/05-bigram.md".
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    cells: list[dict[str, object]] = []
    for kind, content in _pieces(text):
        here: dict[str, object] = {"id": f"cell-{len(cells)}", "metadata": {}}
        if kind == "text" and cells and cells[-1]["cell_type"] == "code":
            cells[-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": content}]
        elif kind in {"python", "console"}:
            source = content if kind == "python" else _commands(content)
            code = {"cell_type": "code", "execution_count": None, "outputs": []}
            cells.append({**code, **here, "source": source.rstrip("\n")})
        else:
            fenced = content if kind == "markdown" else f"```{kind}\n{content}```"
            if words := _linked(fenced, page).strip():
                cells.append({"cell_type": "markdown", **here, "source": words})
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Yield the language and content of each block, and the Markdown between them; remarks are left out."""
    text = re.sub(r"^<!--.*?-->\n", "", text, flags=re.M | re.S)
    at = 0
    for match in _FENCE.finditer(text):
        if between := text[at : match.start()].strip():
            yield "markdown", between
        yield match[2], match[3]
        at = match.end()
    yield "markdown", text[at:]


def _commands(content: str) -> str:
    lines = (line for line in content.splitlines() if line.startswith(("$ ", "> ")))
    return "\n".join(f"!{line[2:]}" if line.startswith("$ ") else line[2:] for line in lines)


def _linked(text: str, page: str) -> str:
    """Let links lead to the other notebooks, or to the network; of others the words alone stay."""

    def changed(match: re.Match[str]) -> str:
        words, target = match.groups()
        if target.startswith(("https:", "http:")):
            return match[0]
        file, _, _ = target.partition("#")
        known = (DOCS / page).parent.joinpath(file).resolve()
        if known.is_relative_to(DOCS) and known.relative_to(DOCS).as_posix() in PAGES:
            return f"[{words}]({Path(file).with_suffix('.ipynb').as_posix()})"
        return words

    return _LINK.sub(changed, text)


def write_notebooks(folder: Path) -> None:
    """Write all notebooks, in the folders of their pages."""
    for page in PAGES:
        path = (folder / page).with_suffix(".ipynb")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(notebook_of(page), ensure_ascii=False, indent=1)
        path.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_notebooks(Path(sys.argv[1]))
