"""The documentation site: no warning, no link that leads nowhere, nothing loaded from elsewhere."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from house.conftest import ROOT, Site
from typing_extensions import override

pytestmark = pytest.mark.slow

LOADED = {"audio", "embed", "iframe", "img", "input", "object", "script", "source", "track", "video"}
LOADED_BY_LINK = {"icon", "manifest", "modulepreload", "preconnect", "preload", "stylesheet"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.styles = ""
        self._in_style = False
        self.feed(path.read_text(encoding="utf-8"))

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places.add(given.get("id", ""))
        self.styles += given.get("style", "")
        self._in_style = tag == "style"
        loads = tag in LOADED or (tag == "link" and LOADED_BY_LINK & set(given.get("rel", "").split()))
        targets = [given[name] for name in ("href", "src", "data", "poster") if name in given]
        targets += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        (self.loads if loads else self.links).extend(targets)

    @override
    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.styles += data

    @override
    def handle_endtag(self, tag: str) -> None:
        self._in_style = False


@cache
def parsed(path: Path) -> Page:
    return Page(path)


def is_foreign(target: str) -> bool:
    address = urlsplit(target)
    return bool(address.netloc) or address.scheme not in {"", "data"}


def dead_links(folder: Path) -> list[str]:
    """Return every link and image of the pages in a folder that has no file, or no such place in it."""
    dead = []
    for path in sorted(folder.rglob("*.html")):
        page = parsed(path)
        for target in (*page.links, *page.loads):
            address = urlsplit(target)
            if address.scheme or address.netloc:
                continue
            file = (path.parent / unquote(address.path)).resolve() if address.path else path
            place = unquote(address.fragment)
            if not file.is_file() or (place and file.suffix == ".html" and place not in parsed(file).places):
                dead.append(f"{path.relative_to(folder)}: {target}")
    return dead


def foreign_loads(folder: Path) -> list[str]:
    """Return what the pages in a folder, and their styles, would load from elsewhere."""
    foreign = []
    for path in sorted(folder.rglob("*.html")):
        page = parsed(path)
        wanted = [*page.loads, *style_loads(page.styles)]
        foreign += [f"{path.relative_to(folder)}: {target}" for target in wanted if is_foreign(target)]
    for path in sorted(folder.rglob("*.css")):
        wanted = style_loads(path.read_text(encoding="utf-8"))
        foreign += [f"{path.relative_to(folder)}: {target}" for target in wanted if is_foreign(target)]
    return foreign


def style_loads(style: str) -> list[str]:
    pattern = r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)"""
    return [first or second for first, second in re.findall(pattern, style)]


def test_the_site_builds_without_a_warning(site: Site) -> None:
    assert site.messages == ""
    assert site.returncode == 0


def test_every_page_of_docs_is_on_the_site(site: Site) -> None:
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 20
    assert not [page for page in pages if not (site.folder / page.with_suffix(".html")).is_file()]


def test_no_link_or_image_of_the_site_is_dead(site: Site) -> None:
    assert sum(len(parsed(path).links) for path in site.folder.rglob("*.html")) > 1_000
    assert dead_links(site.folder) == []


def test_no_page_of_the_site_loads_anything_from_elsewhere(site: Site) -> None:
    assert sum(len(parsed(path).loads) for path in site.folder.rglob("*.html")) > 100
    assert foreign_loads(site.folder) == []


def test_files_of_the_repository_that_a_page_links_to_are_shown(site: Site) -> None:
    source = (site.folder / "sources" / "charlm" / "training" / "recipes.py.html").read_text(encoding="utf-8")
    assert "Recipes for training each preset, and the choice" in source
    benchmarks = parsed(site.folder / "sources" / "tests" / "benchmarks.html")
    assert "benchmarks/generate.py.html" in benchmarks.links


def test_links_to_other_sites_are_https() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(
            r"\]\(([a-z]+:[^)]*)\)|<([a-z]+:[^>]*)>|^\[[^]]+\]: +(\S+:\S*)", prose, re.M
        ):
            address = urlsplit("".join(target))
            assert address.scheme == "https", f"{path.name}: {target}"
            assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", address.netloc), f"{path.name}: {target}"


def test_the_checks_of_this_file_see_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text('<h1 id="top">x</h1>', encoding="utf-8")
    (tmp_path / "page.html").write_text(
        """
        <a href="there.html#top">good</a> <a href="https://example.org">good</a>
        <a href="there.html#end">no such place</a> <a href="#here">nor here</a> <img src="missing.png">
        <script src="//cdn.example/x.js"></script> <link rel="next" href="there.html">
        <link rel="stylesheet" href="http://example.org/x.css">
        <style>@import 'https://example.org/y.css'; b { background: url(https://example.org/b.png) }</style>
        """,
        encoding="utf-8",
    )
    assert dead_links(tmp_path) == [
        "page.html: there.html#end",
        "page.html: #here",
        "page.html: missing.png",
    ]
    assert foreign_loads(tmp_path) == [
        "page.html: //cdn.example/x.js",
        "page.html: http://example.org/x.css",
        "page.html: https://example.org/y.css",
        "page.html: https://example.org/b.png",
    ]
