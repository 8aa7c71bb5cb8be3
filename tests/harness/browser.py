"""A real browser without a window: opens a page, lets a script look around in it, and returns what it saw."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Browser", "find_browser", "look_at", "take_picture"]

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


class Browser:
    """A browser that goes to an address, where keys are pressed and scripts look around.

    It is told so through its pipe for debuggers: https://chromedevtools.github.io/devtools-protocol.

    Args:
        folder: for its profile.
        options: more of its command line.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        browser = find_browser()
        assert browser is not None
        to_it, self._writer = os.pipe()
        self._reader, from_it = os.pipe()
        shell = f'exec 3<&{to_it} 4>&{from_it}; exec "$@"'
        plain = [option for option in _OPTIONS if "virtual-time" not in option]
        self._process = subprocess.Popen(
            [
                *("bash", "-c", shell, "bash", browser, *plain, "--remote-debugging-pipe", *options),
                *(f"--user-data-dir={folder / 'profile'}", "about:blank"),
            ],
            pass_fds=(to_it, from_it),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_it)
        os.close(from_it)
        self._waiting, self._number, self._page = b"", 0, ""
        self.log: list[str] = []
        (target,) = (t for t in self._ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attach = {"targetId": target["targetId"], "flatten": True}
        self._page = self._ask("Target.attachToTarget", **attach)["sessionId"]
        self._ask("Log.enable")
        self._ask("Runtime.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._writer)
        os.close(self._reader)

    def go(self, address: str) -> None:
        """Open a page."""
        self._ask("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def see(self, expression: str) -> Any:
        """Return the value of an expression in JavaScript, or of what it promises."""
        found = self._ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + 60
        while not self.see(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Type a text where the focus is."""
        self._ask("Input.insertText", text=text)

    def press(self, key: str, *, control: bool = False, shift: bool = False) -> None:
        """Press a key, by its name in JavaScript."""
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37}
        press = {"key": key, "modifiers": 2 * control + 8 * shift}
        press["windowsVirtualKeyCode"] = codes.get(key, ord(key[0].upper()))
        texts = {"Enter": "\r", **({} if control or len(key) > 1 else {key: key})}
        self._ask("Input.dispatchKeyEvent", type="keyDown", **press, text=texts.get(key, ""))
        self._ask("Input.dispatchKeyEvent", type="keyUp", **press)

    def look(self, scheme: str, width: int = 1000, height: int = 800) -> bytes:
        """Return what the page looks like, "light" or "dark", as PNG."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._ask("Emulation.setEmulatedMedia", features=[feature])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **size)
        return base64.b64decode(self._ask("Page.captureScreenshot")["data"])

    def _ask(self, method: str, **params: object) -> Any:
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": params}
        if self._page:
            message["sessionId"] = self._page
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._waiting:
                self._waiting += os.read(self._reader, 1 << 20)
            line, _, self._waiting = self._waiting.partition(b"\0")
            answer = json.loads(line)
            if answer.get("method") in {"Log.entryAdded", "Runtime.exceptionThrown"}:
                self.log.append(json.dumps(answer["params"]))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
