"""A real browser without a window: opens a page, lets a script look around in it, and returns what it saw."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["find_browser", "look_at", "take_picture"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--window-size=1000,800", "--virtual-time-budget=60000"),
)


def find_browser() -> str | None:
    """Return the path of a Chromium, if there is one."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


def look_at(page: str, script: str, folder: Path, *, before: str = "") -> Any:
    """Open a page of `surprisal_page`, run a script when it is ready, and return what that returns.

    Args:
        page: its HTML.
        script: the body of an asynchronous JavaScript function.
        folder: an empty directory.
        before: JavaScript that runs before the page's own.
    """
    ready = (
        "!document.getElementById('plain') || /cannot/.test(document.getElementById('legend').textContent)"
    )
    runner = (
        "<script>const wait = setInterval(() => {"
        f"if (!({ready})) return; clearInterval(wait);"
        "(async () => {" + script + "})().catch(String).then((seen) => {"
        "document.documentElement.dataset.seen = JSON.stringify(seen); }); }, 20)</script></body>"
    )
    page = page.replace("<body>", f"<body><script>{before}</script>", 1)
    head, _, tail = page.rpartition("</body>")
    (folder / "page.html").write_text(head + runner + tail, encoding="utf-8", newline="")
    browser = find_browser()
    assert browser is not None
    done = subprocess.run(
        [
            browser,
            *_OPTIONS,
            "--dump-dom",
            f"--user-data-dir={folder / 'profile'}",
            (folder / "page.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    match = re.search(r'<html[^>]* data-seen="([^"]*)"', done.stdout)
    assert match is not None, done.stderr[-2000:]
    return json.loads(html.unescape(match[1]))


def take_picture(page: str, folder: Path) -> bytes:
    """Open a page, and return what it looks like, as PNG."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    browser = find_browser()
    assert browser is not None
    subprocess.run(
        [
            *(browser, *_OPTIONS, f"--screenshot={folder / 'page.png'}"),
            *(f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return (folder / "page.png").read_bytes()
