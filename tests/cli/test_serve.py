"""`charlm serve`: the page's requests, hostile ones, many at once, and the page itself in a real browser."""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.browser import Browser, find_browser
from harness.command import TINY, Command, environment, start, text_file

import charlm
from charlm import BigramLM, BlockDataset, ByteTokenizer, CharLM, CharTokenizer, NGramLM
from charlm.cli import serve
from charlm.cli.__main__ import main
from charlm.cli.output import Console
from charlm.cli.parser import parse
from charlm.cli.session import Session
from charlm.cli.signals import Signals

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    assert main(["train", str(text_file(folder)), "-o", str(folder / "run"), *TINY, "-q"]) == 0
    return folder / "run"


class Served:
    """The command in a thread, and its client."""

    def __init__(self, run: Path, patch: pytest.MonkeyPatch, *flags: str) -> None:
        servers: list[serve._Server] = []
        begin = serve._Server.__init__

        def beginning(server: serve._Server, *args: Any) -> None:
            begin(server, *args)
            servers.append(server)

        patch.setattr(serve._Server, "__init__", beginning)
        args = parse(["serve", str(run), "--seed", "5", "-t", "1", *flags])
        command = (args, Console(quiet=True), Signals(), 0.0)
        self._thread = threading.Thread(target=serve.run, args=command, daemon=True)
        self._thread.start()
        while not servers or not hasattr(servers[0], "fields"):
            assert self._thread.is_alive()
            time.sleep(0.01)
        (self.server,) = servers
        self.port = self.server.server_port
        self.host = f"127.0.0.1:{self.port}"

    def end(self) -> None:
        self.server.shutdown()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def send(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send bytes as they are, and return code, headers and body of the answer."""
        with self.connect() as client:
            client.sendall(data)
            return answer_of(client)

    def request(
        self, name: str = "read", body: bytes | None = None, method: str = "POST", **headers: str | None
    ) -> bytes:
        """Return the bytes of a request; headers have _ for -, and None leaves one out."""
        values = {"text": "", "temperature": 1, "seed": 5}
        data = json.dumps(values).encode() if body is None else body
        data = b"" if method == "GET" else data
        fields: dict[str, str | None] = {"Host": self.host, "Origin": f"http://{self.host}"}
        fields |= {"Content_Type": "application/json", "Content_Length": str(len(data)), **headers}
        lines = [f"{k.replace('_', '-')}: {v}" for k, v in fields.items() if v is not None]
        path = f"/{self.server.token}/{name}" if not name.startswith("/") else name
        return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode() + data

    def ask(self, name: str, **values: object) -> Any:
        """Return the values of an answer; of a writing all its lines."""
        body = json.dumps({"text": "", "temperature": 1, "seed": 5, **values}).encode()
        code, _, data = self.send(self.request(name, body))
        assert code == 200, data
        return json.loads(data) if name == "read" else [json.loads(line) for line in data.splitlines()]

    def refuses(self, request: bytes) -> tuple[int, str]:
        """Return what a request is answered, after which all must be as it was."""
        before = self.server.session.text
        code, headers, body = self.send(request)
        assert headers["content-type"] == "text/plain; charset=utf-8"
        assert self.server.session.text == before
        assert self.ask("read", text="green")["bits"]
        return code, body.decode()


def answer_of(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    data = b""
    while piece := client.recv(65536):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    match = re.fullmatch(r"HTTP/1.0 (\d+) \w+", first)
    assert match is not None, data
    return int(match[1]), dict(line.lower().split(": ", 1) for line in lines), body


@pytest.fixture
def served(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    one = Served(run, monkeypatch)
    yield one
    one.end()


def test_a_text_is_read_and_written_as_the_library_does_it(served: Served, run: Path) -> None:
    lm = charlm.load(run)
    text = "10 green bottles, hanging"
    found = served.ask("read", text=text)
    np.testing.assert_allclose(found["bits"], -lm.log_probs(text) / math.log(2), atol=0.051)
    assert len(found["candidates"]) == 8
    for candidate, share in found["candidates"]:
        assert share == pytest.approx(math.exp(lm.rank([candidate], prompt="\n" + text)[0][1]), rel=1e-4)
    *parts, last = served.ask("write", text=text, count=150, temperature=0.7, seed=9)
    written = "".join(part["text"] for part in [*parts, last])
    assert written == lm.generate("\n" + text, 150, temperature=0.7, seed=9)[1:]
    bits = [b for part in [*parts, last] for b in part["bits"]]
    np.testing.assert_allclose(bits, -lm.log_probs(written) / math.log(2), atol=0.051)
    assert last["end"] == ""
    assert served.ask("read", text=written[:40])["bits"] == bits[:40]
    assert served.ask("write", count=30)[-1]["end"] == ""
    assert served.server.session.text == lm.generate("", 30, temperature=1, seed=5)


def test_the_page_loads_nothing_and_only_its_own_script_runs(served: Served) -> None:
    code, headers, body = served.send(served.request("", method="GET", Origin=None))
    assert (code, headers["content-type"]) == (200, "text/html; charset=utf-8")
    page = body.decode()
    assert not re.search(r"https?:|src=|href=|@import|url\(|%[A-Z]+%", page)
    (nonce,) = set(re.findall(r'nonce="([^"]+)"', page))
    policy = headers["content-security-policy"]
    assert policy.startswith(f"default-src 'none'; script-src 'nonce-{nonce.lower()}'; style-src ")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers
    assert served.server.token not in page
    other = served.send(served.request("", method="GET"))[2].decode()
    assert f'nonce="{nonce}"' not in other
    assert json.loads(page.split('nonce="' + nonce + '">')[2].split("<")[0]) == {
        "temperature": 1.0,
        "seed": 5,
        "characters": 20_000,
        "most": 2_000,
    }


def test_it_listens_on_the_loopback_address_alone(served: Served) -> None:
    assert served.server.server_address[0] == "127.0.0.1"
    assert len(served.server.token) >= 43


VALUES = {"text": "green", "temperature": 1, "seed": 5}


def changed(**values: object) -> bytes:
    return json.dumps({**VALUES, **values}).encode()


HOSTILE: dict[str, tuple[Callable[[Served], bytes], int, str]] = {
    "no token": (lambda s: s.request("/read"), 403, "lacks the token"),
    "a wrong token": (lambda s: s.request(f"/{'x' * 43}/read"), 403, "lacks the token"),
    "half a token": (lambda s: s.request(f"/{s.server.token[:-1]}/read"), 403, "lacks the token"),
    "a token in another alphabet": (lambda s: s.request("/\xe9\xff/read"), 403, "lacks the token"),
    "no host": (lambda s: s.request(Host=None), 403, "Host must be 127.0.0.1:"),
    "a foreign host": (lambda s: s.request(Host=f"evil.example:{s.port}"), 403, "Host must be"),
    "another port": (lambda s: s.request(Host="127.0.0.1:80"), 403, "Host must be"),
    "a foreign origin": (lambda s: s.request(Origin="http://evil.example"), 403, "another origin"),
    "a secure origin": (lambda s: s.request(Origin=f"https://{s.host}"), 403, "another origin"),
    "no origin at all": (lambda s: s.request(Origin="null"), 403, "another origin"),
    "another place": (lambda s: s.request("model.safetensors"), 404, "nothing here"),
    "a path upwards": (lambda s: s.request("../../etc/passwd", method="GET"), 404, "nothing here"),
    "the wrong verb": (lambda s: s.request("write", method="GET"), 404, "nothing here"),
    "a page that is posted": (lambda s: s.request(""), 404, "nothing here"),
    "DELETE": (lambda s: s.request(method="DELETE"), 405, "Unsupported method"),
    "OPTIONS": (lambda s: s.request(method="OPTIONS"), 405, "Unsupported method"),
    "HEAD": (lambda s: s.request("", method="HEAD"), 405, "Unsupported method"),
    "no HTTP": (lambda s: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400, "Bad request"),
    "HTTP/9": (lambda s: b"GET / HTTP/9.1\r\n\r\n", 505, "Invalid HTTP version"),
    "a long line": (lambda s: b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414, "Too Long"),
    "a long header": (lambda s: s.request(X="x" * 70_000), 431, "Line too long"),
    "many headers": (lambda s: s.request(X="x\r\n" + "X: x\r\n" * 100), 431, "Too many headers"),
    "no length": (lambda s: s.request(Content_Length=None), 411, "how many bytes"),
    "a negative length": (lambda s: s.request(Content_Length="-1"), 411, "how many bytes"),
    "a length with a sign": (lambda s: s.request(Content_Length="+5"), 411, "how many bytes"),
    "a huge length": (lambda s: s.request(Content_Length="9" * 30), 411, "how many bytes"),
    "chunks": (lambda s: s.request(Transfer_Encoding="chunked"), 411, "how many bytes"),
    "too many bytes": (lambda s: s.request(body=b"{" + b" " * 250_000 + b"}"), 413, "may have 250,000 bytes"),
    "a form": (lambda s: s.request(Content_Type="text/plain"), 415, "must be application/json"),
    "no UTF-8": (lambda s: s.request(body=b'{"text": "\xff"}'), 400, "must be UTF-8"),
    "UTF-16": (lambda s: s.request(body='{"text": ""}'.encode("utf-16")), 400, "must be JSON in UTF-8"),
    "no JSON": (lambda s: s.request(body=b'{"text": '), 400, "the request"),
    "a list": (lambda s: s.request(body=b"[]"), 400, "must hold a JSON object"),
    "NaN": (lambda s: s.request(body=b'{"text": "", "temperature": NaN, "seed": 1}'), 400, "NaN"),
    "a field twice": (lambda s: s.request(body=b'{"text": "", "text": "a"}'), 400, "no duplicate keys"),
    "deep": (lambda s: s.request(body=b'{"text":' + b"[" * 99_999 + b"}"), 400, "the request"),
    "a lone surrogate": (lambda s: s.request(body=b'{"text": "\\ud800"}'), 400, "surrogate"),
    "an unknown field": (lambda s: s.request(body=changed(top_k=3)), 400, "the fields must be text, "),
    "a missing field": (lambda s: s.request(body=b'{"text": "a"}'), 400, "in 'temperature', got no such"),
    "a number for a text": (lambda s: s.request(body=changed(text=5)), 400, "a string in 'text'"),
    "true for a seed": (lambda s: s.request(body=changed(seed=True)), 400, "an integer in 'seed'"),
    "a wide seed": (lambda s: s.request(body=changed(seed=10**19)), 400, "at most 19 digits"),
    "a negative temperature": (lambda s: s.request(body=changed(temperature=-1)), 400, "temperature must"),
    "a cold temperature": (lambda s: s.request(body=changed(temperature=1e-9)), 400, "temperature must"),
    "an unknown character": (lambda s: s.request(body=changed(text="€")), 400, "not known to the model"),
    "a long text": (lambda s: s.request(body=changed(text="e" * 20_001)), 413, "may have 20,000 characters"),
    "no count": (lambda s: s.request("write", changed()), 400, "in 'count', got no such"),
    "a count of none": (lambda s: s.request("write", changed(count=0)), 400, "from 1 to 2000, got 0"),
    "a high count": (lambda s: s.request("write", changed(count=2001)), 400, "from 1 to 2000, got 2001"),
    "half a count": (lambda s: s.request("write", changed(count=1.5)), 400, "an integer in 'count'"),
}


@pytest.fixture(scope="module")
def lasting(run: Path) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        one = Served(run, patch)
    yield one
    one.end()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_request_that_is_not_the_pages_is_refused_and_changes_nothing(lasting: Served, name: str) -> None:
    made, code, message = HOSTILE[name]
    got, said = lasting.refuses(made(lasting))
    assert (got, message in said) == (code, True), said
    assert said.count("\n") == 1
    assert len(said) < 300


def test_a_longest_text_of_the_widest_characters_fits_into_a_request(served: Served) -> None:
    body = changed(text="😀" * 20_000)
    assert len(body) < 250_000
    assert served.refuses(served.request(body=body))[1].startswith("not known to the model")


@pytest.mark.parametrize("cut", [1, 20, 150, -5])
def test_half_a_request_harms_nobody(served: Served, cut: int) -> None:
    with served.connect() as client:
        client.sendall(served.request(body=changed())[:cut])
    with served.connect() as client:
        client.sendall(served.request(body=changed())[:cut])
        client.shutdown(socket.SHUT_WR)
        data = b"".join(iter(lambda: client.recv(65536), b""))
        assert not data or re.match(rb"HTTP/1.0 4\d\d Refused\r\n", data)
    assert served.ask("read", text="green")["bits"]


def test_a_slow_client_is_told_so_and_holds_no_place(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_SLOW", 0.5)
    request = served.request(body=changed())
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(served.connect()) for _ in range(serve._CONNECTIONS)]
        for client, length in zip(silent, [0, 10, 80, *[len(request) - 1] * 13], strict=True):
            client.sendall(request[:length])
        with contextlib.suppress(OSError):
            for byte in request[80:]:  # who sends something now and then is no quicker
                silent[2].sendall(bytes([byte]))
                time.sleep(0.02)
        for client in silent[1:2] + silent[3:]:
            code, _, body = answer_of(client)
            assert (code, body) == (408, b"a request must be there within 0.5 seconds\n")
        monkeypatch.setattr(serve, "_SLOW", 30)
        assert served.ask("read", text="green")["bits"]


def test_of_a_hundred_connections_at_once_each_is_answered(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_SLOW", 60)
    request = served.request(body=changed())
    together = threading.Barrier(100)

    def one(number: int) -> tuple[int, bytes]:
        with served.connect() as client:
            together.wait(30)
            client.sendall(request)
            code, _, body = answer_of(client)
            return code, body

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(one, range(100)))
    codes = [code for code, _ in answers]
    assert codes.count(200) >= serve._CONNECTIONS
    assert set(codes) == {200, 503}
    for code, body in answers:
        assert code == 200 or body == b"too many connections at once; ask again\n"
    time.sleep(0.1)
    assert served.ask("read", text="green")["bits"]
    assert threading.active_count() < 100


def test_of_two_requests_in_one_connection_the_first_is_answered(served: Served) -> None:
    request = served.request(body=changed())
    with served.connect() as client:
        client.sendall(request + request)
        with contextlib.suppress(ConnectionResetError):
            data = b"".join(iter(lambda: client.recv(65536), b""))
            assert data.count(b"HTTP/1.0 ") == 1
    assert served.ask("read", text="green")["bits"]


def test_a_client_that_leaves_ends_its_writing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(serve, "_NEW", 10**9)
    with served.connect() as client:
        client.sendall(served.request("write", changed(count=10**9)))
        assert client.recv(100)
    assert served.ask("read", text="green")["bits"]


def test_the_end_of_the_server_is_that_of_the_writing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(run, monkeypatch)
    monkeypatch.setattr(serve, "_NEW", 10**9)
    with served.connect() as client:
        client.sendall(served.request("write", changed(count=10**9)))
        assert client.recv(100)
        begin = time.monotonic()
        served.end()
        data = b"".join(iter(lambda: client.recv(65536), b""))
    assert json.loads(data.splitlines()[-1])["end"] == "the server ends"
    assert time.monotonic() - begin < 30  # of the 60 that it might have


def test_a_busy_model_is_said_to_be_busy(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_SLOW", 2)
    with served.server.model:
        code, said = served.send(served.request(body=changed()))[::2]
    assert (code, said) == (503, b"the model is busy with another request; ask again\n")


def test_time_is_limited_for_reading_and_for_writing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_SECONDS", 0)
    last = served.ask("write", text="green", count=2000)[-1]
    assert last["end"] == "0 seconds are over"
    assert len(served.server.session.text) < len("green") + 10
    code, said = served.send(served.request(body=changed(text="green" * 200)))[::2]
    assert (code, said) == (503, b"to read it took over 0 seconds; ask again to go on\n")
    monkeypatch.setattr(serve, "_SECONDS", 60)
    assert len(served.ask("read", text="green" * 200)["bits"]) == 1000


def test_many_may_ask_at_once_each_of_its_own_text(served: Served, run: Path) -> None:
    lm = charlm.load(run)
    texts = [f"{i} green bottles, hanging on the wall\n"[: 10 + i] for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        for text, found in zip(
            texts, pool.map(lambda text: served.ask("read", text=text), texts), strict=True
        ):
            np.testing.assert_allclose(found["bits"], -lm.log_probs(text) / math.log(2), atol=0.051)


def test_a_model_without_finite_numbers_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BigramLM(256)
    torch.nn.init.constant_(next(model.parameters()), math.inf)
    CharLM(model, ByteTokenizer()).save(tmp_path / "model")
    served = Served(tmp_path / "model", monkeypatch)
    assert served.ask("read", text="né") == {"bits": [99.0, 99.0], "candidates": []}
    (last,) = served.ask("write", text="né", count=5)
    assert last["text"] == "né"
    assert "no token can be drawn" in last["end"]
    served.end()


def test_an_error_of_the_servers_own_is_complained_of(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Session, "candidates", lambda *_: 1 / 0)
        with served.connect() as client:
            client.sendall(served.request(body=changed()))
            assert client.recv(100) == b""
    assert "charlm: error: ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert served.ask("read", text="green")["bits"]


def test_ports_that_cannot_be_are_refused(
    served: Served, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command(capsys)
    assert command("serve", run, "--port", str(served.port)) == 1
    assert command.err == (
        f"charlm: error: cannot listen on port {served.port}: Address already in use; "
        "--port 0 takes a free one\n"
    )
    for port in ("-1", "65536"):
        assert command("serve", "nowhere", "--port", port) == 2
        assert f"--port must be from 0 to 65535, got {port}" in command.err
    assert command("serve", "nowhere") == 1


@contextlib.contextmanager
def serving(run: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start the command as a process of its own, and yield it with its address."""
    process = start("serve", str(run), "--seed", "5", *flags, env=environment())
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().decode().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_ctrl_c_ends_it_also_while_it_writes(run: Path) -> None:
    with serving(run) as (process, address):
        match = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]{43})/", address)
        assert match is not None
        body = changed(count=2000)
        head = f"POST /{match[2]}/write HTTP/1.1\r\nHost: 127.0.0.1:{match[1]}\r\n"
        head += f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(match[1]))) as client:
            client.sendall(head.encode() + body)
            assert client.recv(100)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert err == b"a page for browsers on this machine; Ctrl-C ends it\n"


VALUE = "document.getElementById('text').value"
CANDIDATE = "document.querySelector('#next button:not([hidden])')"


@pytest.mark.slow
@needs_browser
def test_a_person_writes_with_the_model_by_keyboard(run: Path, tmp_path: Path) -> None:
    lm = charlm.load(run)
    with serving(run, "-t", "1") as (_, address), Browser(tmp_path) as browser:
        browser.go(address)
        browser.wait(f"{CANDIDATE} !== null")
        assert browser.see("document.activeElement.id") == "text"
        browser.type("10 green bott")
        browser.wait("document.querySelectorAll('#shown i').length > 3")
        bits = -lm.log_probs("10 green bott") / math.log(2)
        levels = [sum(round(b, 1) >= least for least in (0.5, 1, 2, 3, 4, 6, 8, 12)) for b in bits]
        cells = browser.see(
            "[...document.querySelectorAll('#shown i')].map((i) => [i.className, i.textContent.length])"
        )
        assert [name for name, count in cells for _ in range(count)] == [f"l{level}" for level in levels]
        browser.press("Tab")
        first = browser.see("document.activeElement.value")
        assert first == lm.rank([first], prompt="10 green bott")[0][0]
        assert browser.see("document.activeElement.querySelector('b').textContent").replace("␣", " ")
        browser.press("Enter")
        browser.wait(f"{VALUE} === '10 green bott' + {json.dumps(first)}")
        browser.wait("document.getElementById('next').ariaBusy === 'false'")
        second = browser.see("document.querySelectorAll('#next button')[1].value")
        browser.press("2")
        browser.wait(f"{VALUE} === '10 green bott' + {json.dumps(first + second)}")
        browser.press("z", control=True)
        browser.press("z", control=True)
        browser.wait(f"{VALUE} === '10 green bott'")
        browser.press("z", control=True, shift=True)
        browser.wait(f"{VALUE} === '10 green bott' + {json.dumps(first)}")
        browser.press("Escape")
        browser.press("z", control=True)
        browser.see("document.getElementById('count').value = 40")
        browser.press("Enter", control=True)
        written = lm.generate("\n10 green bott", 40, temperature=1, seed=5)[1:]
        browser.wait(f"{VALUE} === {json.dumps(written)}")
        browser.wait("document.getElementById('stop').disabled")
        browser.see("document.getElementById('again').click()")
        again = lm.generate("\n10 green bott", 40, temperature=1, seed=6)[1:]
        browser.wait(f"{VALUE} === {json.dumps(again)}")
        browser.type("€")
        browser.wait("document.getElementById('said').textContent.startsWith('not known to the model')")
        browser.press("z", control=True)
        light, dark = browser.look("light"), browser.look("dark")
        assert light != dark
        assert len(browser.log) == 1, browser.log  # the refusal
        assert "400 (Refused)" in browser.log[0]


@pytest.mark.slow
@needs_browser
def test_stop_ends_the_writing_and_what_a_model_writes_is_never_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = Session.go_on

    def slowly(session: Session, count: int) -> Iterator[str]:
        with contextlib.closing(go_on(session, count)) as pieces:
            for piece in pieces:
                time.sleep(0.02)
                yield piece

    monkeypatch.setattr(Session, "go_on", slowly)
    evil = "<img src=x onerror='document.title=1'></i><b>bold</b>&amp;\x1b[2J\u202e\n" * 20
    tokenizer = CharTokenizer.from_text(evil)
    data = BlockDataset.from_text(evil, tokenizer, 8)
    name = "<b>&amp;%BEGIN%"
    CharLM(NGramLM(tokenizer.vocab_size, 6).fit(data), tokenizer).save(tmp_path / name)
    served = Served(tmp_path / name, monkeypatch)
    with Browser(tmp_path) as browser:
        browser.go(f"http://{served.host}/{served.server.token}/")
        assert browser.see("document.querySelector('h1').textContent") == name
        browser.see("document.getElementById('count').value = 2000")
        browser.press("Enter", control=True)
        browser.wait(f"{VALUE}.length > 100")
        browser.press("Escape")
        browser.wait("document.getElementById('stop').disabled")
        assert "<img src=x" in browser.see(VALUE)
        assert browser.see("document.querySelectorAll('#shown img, #shown b, #next img').length") == 0
        assert browser.see("document.title") == name
        length = browser.see(f"{VALUE}.length")
        assert length < 1500
        browser.wait(f"{CANDIDATE} !== null")
        assert browser.see(f"{VALUE}.length") == length
        assert not browser.log
    served.end()
