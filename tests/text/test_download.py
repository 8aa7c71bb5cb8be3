"""The corpus that is downloaded: the cache folder holds the checked file, or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPMessage
from io import BytesIO
from pathlib import Path

import pytest
from harness.file_server import FileServer, serving

import charlm
from charlm.errors import CorpusError
from charlm.text import corpus, download
from charlm.text.corpus import load_corpus
from charlm.text.download import Download, fetch

pytestmark = pytest.mark.slow

CONTENT = "To be, or not to be’\r\n".encode().ljust(44, b"!") * 10_000  # 440,000 bytes


@pytest.fixture(scope="module")
def server() -> Iterator[FileServer]:
    with serving(CONTENT) as running:
        yield running


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, no data folder, and no proxy."""
    monkeypatch.delenv("CHARLM_DATA_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("CHARLM_CACHE_DIR", str(tmp_path / "new" / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "new" / "cache"


def wanted_from(url: str, *, timeout_seconds: float = 5.0, deadline_seconds: float = 20.0) -> Download:
    return Download(
        "tinyshakespeare",
        url,
        len(CONTENT),
        hashlib.sha256(CONTENT).hexdigest(),
        timeout_seconds,
        deadline_seconds,
    )


def use(monkeypatch: pytest.MonkeyPatch, wanted: Download) -> None:
    monkeypatch.setitem(corpus._DOWNLOADS, "tinyshakespeare", wanted)


def held(cache: Path) -> list[str]:
    return sorted(file.name for file in cache.iterdir()) if cache.exists() else []


def test_a_corpus_is_downloaded_once_and_kept(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("right", "unsized", "redirect/right"):
        use(monkeypatch, wanted_from(server.url(path)))
        assert load_corpus("tinyshakespeare") == CONTENT.decode()
        assert held(cache) == ["tinyshakespeare.txt"]
        before = server.requests
        assert load_corpus("tinyshakespeare") == CONTENT.decode()
        assert server.requests == before
        (cache / "tinyshakespeare.txt").unlink()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("wrong", "but 440000 bytes with sha256 "),
        ("short", "but 439999 bytes with sha256 "),
        ("broken", "but 439999 bytes with sha256 "),
        ("empty", "but 0 bytes with sha256 e3b0c442"),
        ("long", "but more than 440000 bytes with sha256 "),
        ("endless", "but more than 440000 bytes with sha256 "),
        ("missing", r"the server answered 404 'Gone\x1b[31m away'"),
        ("garbage", "this is no HTTP"),
        ("circle/", "the server answered 302 "),
        ("redirect/ftp://127.0.0.1/x", "answered 302 'Redirect to ftp://127.0.0.1/x, which is not https'"),
        ("redirect/file:///etc/passwd", "the server answered 302 "),
        ("redirect/http://127.0.0.1:port/", "nonnumeric port"),
        (f"redirect/http://{'a' * 70}/", "label"),  # no name in the DNS is so long
        ("redirect/missing", "the server answered 404 "),
    ],
)
def test_a_download_that_goes_wrong_leaves_nothing(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch, path: str, reason: str
) -> None:
    use(monkeypatch, wanted_from(server.url(path)))
    with pytest.raises(CorpusError) as caught:
        load_corpus("tinyshakespeare")
    message = str(caught.value)
    assert message.startswith(f"tinyshakespeare could not be downloaded from {server.url(path)}: ")
    assert reason in message
    assert message.endswith("as tinyshakespeare.txt into a folder and set CHARLM_DATA_DIR to that folder")
    assert message.isprintable()
    assert held(cache) == []


@pytest.mark.parametrize("path", ["slow", "slowheaders", "silent", "redirect/slowheaders"])
def test_a_slow_download_ends_at_its_deadline(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    use(monkeypatch, wanted_from(server.url(path), deadline_seconds=0.5))
    start = time.perf_counter()
    with pytest.raises(CorpusError, match=r"it took longer than 0\.5 seconds"):
        load_corpus("tinyshakespeare")
    assert time.perf_counter() - start < 60
    assert held(cache) == []


@pytest.mark.parametrize("path", ["slow", "slowheaders"])
def test_a_download_that_would_not_be_done_at_its_deadline_ends_soon(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    use(monkeypatch, wanted_from(server.url(path), timeout_seconds=0.5, deadline_seconds=300))
    start = time.perf_counter()
    with pytest.raises(CorpusError, match=r"timed out: \d+ bytes came in \d+ seconds\. Download it by"):
        load_corpus("tinyshakespeare")
    assert time.perf_counter() - start < 60
    assert held(cache) == []


def test_a_slow_download_that_will_be_done_in_time_goes_on(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, wanted_from(server.url("steady"), timeout_seconds=0.2, deadline_seconds=4))
    assert load_corpus("tinyshakespeare") == CONTENT.decode()


def test_a_silent_server_is_left_after_the_timeout(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, wanted_from(server.url("silent"), timeout_seconds=0.2))
    with pytest.raises(CorpusError, match="timed out"):
        load_corpus("tinyshakespeare")
    assert held(cache) == []


def test_without_a_network_the_system_s_reason_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nobody listens
        use(monkeypatch, wanted_from(f"http://127.0.0.1:{unused.getsockname()[1]}/right"))
        with pytest.raises(CorpusError, match="Connection refused") as caught:
            load_corpus("tinyshakespeare")
    assert caught.value.errno == errno.ECONNREFUSED
    assert (
        "".join(traceback.format_exception(caught.value)).count("Traceback") == 1
    )  # none of what lies below
    assert held(cache) == []


def test_an_error_that_is_not_the_network_s_is_not_hidden(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_PIECE", None)
    with pytest.raises(TypeError):
        fetch(wanted_from(server.url("right")))


@pytest.mark.parametrize(
    ("start", "target", "followed"),
    [
        ("https://a.example/x", "https://b.example/y", True),
        ("https://a.example/x", "http://a.example/y", False),
        ("https://a.example/x", "ftp://a.example/y", False),
        ("http://127.0.0.1/x", "http://127.0.0.1/y", True),
        ("http://127.0.0.1/x", "https://b.example/y", True),
    ],
)
def test_a_redirect_never_leaves_https(start: str, target: str, followed: bool) -> None:
    request = urllib.request.Request(start)
    handler = download._Redirects()
    with BytesIO() as body:
        if followed:
            onward = handler.redirect_request(request, body, 302, "Found", HTTPMessage(), target)
            assert onward is not None
            assert onward.full_url == target
        else:
            with pytest.raises(urllib.error.HTTPError, match="which is not https") as caught:
                handler.redirect_request(request, body, 302, "Found", HTTPMessage(), target)
            caught.value.close()


# The cache


def test_a_damaged_cache_is_replaced(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, wanted_from(server.url("right")))
    cache.mkdir(parents=True)
    file = cache / "tinyshakespeare.txt"
    for damaged in (b"", CONTENT[:-1], CONTENT[:-1] + b"?", CONTENT + b"!"):
        file.write_bytes(damaged)
        assert load_corpus("tinyshakespeare") == CONTENT.decode()
        assert file.read_bytes() == CONTENT
    file.unlink()
    file.symlink_to(cache / "elsewhere")
    assert load_corpus("tinyshakespeare") == CONTENT.decode()
    assert held(cache) == ["tinyshakespeare.txt"]
    use(monkeypatch, wanted_from(server.url("missing")))
    assert load_corpus("tinyshakespeare") == CONTENT.decode()  # a good one is not asked for again


def test_a_cache_that_cannot_be_written_costs_a_warning_and_not_the_text(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, wanted_from(server.url("right")))
    cache.parent.write_bytes(b"a file where a folder should be")
    with pytest.warns(RuntimeWarning, match=r"not kept: .*cannot be written: .*set CHARLM_CACHE_DIR"):
        assert load_corpus("tinyshakespeare") == CONTENT.decode()


LOAD = """
import sys
from charlm.text import corpus
from charlm.text.download import Download
url, size, sha256 = sys.argv[1:]
corpus._DOWNLOADS["tinyshakespeare"] = Download("tinyshakespeare", url, int(size), sha256, 20.0, 60.0)
print(len(corpus.load_corpus("tinyshakespeare")))
"""


def start_loading(url: str) -> subprocess.Popen[str]:
    arguments = [url, str(len(CONTENT)), hashlib.sha256(CONTENT).hexdigest()]
    environment = {**os.environ, "PYTHONPATH": str(Path(charlm.__file__).parent.parent)}
    command = [sys.executable, "-c", LOAD, *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_sixteen_at_once_all_get_the_corpus(server: FileServer, cache: Path) -> None:
    processes = [start_loading(server.url("right")) for _ in range(16)]
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert (process.returncode, output) == (0, f"{len(CONTENT.decode())}\n"), errors
    assert held(cache) == ["tinyshakespeare.txt"]
    assert (cache / "tinyshakespeare.txt").read_bytes() == CONTENT


def test_a_killed_download_leaves_nothing(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.asked.clear()
    process = start_loading(server.url("slow"))
    assert server.asked.wait(60)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert held(cache) == []
    use(monkeypatch, wanted_from(server.url("right")))
    assert load_corpus("tinyshakespeare") == CONTENT.decode()


# Folders


def test_the_data_folder_is_read_and_checked(
    server: FileServer, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, wanted_from(server.url("right")))
    before = server.requests
    monkeypatch.setenv("CHARLM_DATA_DIR", str(tmp_path))
    with pytest.raises(
        CorpusError, match=r"tinyshakespeare\.txt' \(CHARLM_DATA_DIR is set\) cannot be read"
    ) as caught:
        load_corpus("tinyshakespeare")
    assert caught.value.errno == errno.ENOENT
    file = tmp_path / "tinyshakespeare.txt"
    file.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(CorpusError, match="got other content; put the file from http://127"):
        load_corpus("tinyshakespeare")
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")  # a folder of the user's own may be made of links
    assert load_corpus("tinyshakespeare") == CONTENT.decode()
    assert (server.requests, held(cache)) == (before, [])
