"""`charlm serve`: a page for this machine alone, on which a person and a model write a text by turns.

The page, serve.html, holds the text and its past, and loads nothing. Each request brings the whole text, and
the model's state goes over to it by what both begin with. Requests without the address's token, from pages of
another origin, or beyond the limits below are refused.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hmac
import html
import json
import math
import re
import secrets
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from typing_extensions import override

from charlm.cli.output import Console, UsageError, emit
from charlm.cli.session import Session, options_of, refusal_of
from charlm.cli.signals import Signals
from charlm.errors import CharLMError
from charlm.files import strict_json
from charlm.lm import load

__all__ = ["run"]

_ADDRESS = "127.0.0.1"
_CHARACTERS, _BYTES = 20_000, 250_000  # of a text; of a request's body, such a text with all of it escaped
_NEW = 2_000  # characters that are written at once
_SECONDS = 60  # for reading, and for writing
_SLOW = 10  # seconds until a request must be there, and until one no longer waits for another's end
_CONNECTIONS = 16  # at once
_CANDIDATES = 8
_FLUSH_SECONDS = 0.05
_NAME = "the request"


def run(args: argparse.Namespace, console: Console, signals: Signals, began: float) -> int:
    """Serve the page until Ctrl-C."""
    if not 0 <= args.port <= 65_535:
        raise UsageError(f"--port must be from 0 to 65535, got {args.port}")
    try:
        server = _Server((_ADDRESS, args.port), _Handler)
    except OSError as error:
        why = f"{error.strerror}; --port 0 takes a free one"
        raise CharLMError(f"cannot listen on port {args.port}: {why}") from error
    with server:
        server.console = console
        lm = load(args.run, device=args.device, mixture=args.mixture, weights=args.weights)
        seed = secrets.randbits(32) if args.seed is None else args.seed
        server.session = Session(lm, "", options_of(args, lm.tokenizer, seed))
        begin = {"temperature": args.temperature, "seed": seed, "characters": _CHARACTERS, "most": _NEW}
        name = Path(args.run).resolve().name.encode("utf-8", "backslashreplace").decode()
        server.fields = {"TITLE": html.escape(name), "BEGIN": json.dumps(begin)}
        emit(f"http://{_ADDRESS}:{server.server_port}/{server.token}/\n")
        console.say("a page for browsers on this machine; Ctrl-C ends it")
        try:
            server.serve_forever(poll_interval=0.25)
        finally:
            server.ending = True  # what is being written ends with its next character
            server.model.acquire(timeout=_SLOW)
    return 0


class _Refusal(Exception):  # noqa: N818 - it is an answer
    """What a request gets instead of what it asks for: a code of HTTP, and a message."""


class _Server(ThreadingHTTPServer):
    """A few connections at once, and one use of the model."""

    daemon_threads = True
    request_queue_size = 128
    console: Console
    session: Session
    fields: dict[str, str]

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.token, self.ending, self.model = secrets.token_urlsafe(), False, threading.Lock()
        self.open: dict[socket.socket, float] = {}  # until when the request must be there
        self._turned_away: list[tuple[float, socket.socket]] = []
        super().__init__(address, handler)

    @override
    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the network for a name
        self.server_port = self.server_address[1]

    @override
    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self.open) < _CONNECTIONS:
            self.open[request] = time.monotonic() + _SLOW
            super().process_request(request, client_address)
            return
        request.setblocking(False)
        with contextlib.suppress(OSError):
            request.sendall(_answer(503, "too many connections at once; ask again\n"))
            request.shutdown(socket.SHUT_WR)
        self._turned_away.append((time.monotonic() + 1, request))  # closed now, it might lose its answer

    @override
    def shutdown_request(self, request: Any) -> None:
        self.open.pop(request, None)
        super().shutdown_request(request)

    @override
    def service_actions(self) -> None:
        for request, end in self.open.copy().items():  # which others change meanwhile
            if end < time.monotonic():
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RD)
        while self._turned_away and self._turned_away[0][0] < time.monotonic():
            self._turned_away.pop(0)[1].close()

    @override
    def server_close(self) -> None:
        super().server_close()
        for _, request in self._turned_away:
            request.close()

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(error := sys.exception(), OSError):  # which says that the client is gone
            self.console.complain(f"error: {type(error).__name__}: {error}")


class _Handler(BaseHTTPRequestHandler):
    """One request; then the connection ends."""

    server: _Server
    timeout = _SLOW  # of each read and write

    def do_GET(self) -> None:
        self._do({"": self._page})

    def do_POST(self) -> None:
        self._do({"read": self._read, "write": self._write})

    def _do(self, known: dict[str, Callable[[], None]]) -> None:
        here = [f"{name}:{self.server.server_port}" for name in (_ADDRESS, "localhost")]
        token, _, name = self.path.removeprefix("/").partition("/")
        try:
            if self.headers.get("Host") not in here:
                raise _Refusal(403, f"Host must be {here[0]}")
            if self.headers.get("Origin", f"http://{here[0]}").removeprefix("http://") not in here:
                raise _Refusal(403, "a page of another origin asks")
            if not hmac.compare_digest(token.encode(), self.server.token.encode()):
                raise _Refusal(403, "the address lacks the token that charlm serve has printed")
            if name not in known:
                raise _Refusal(404, "there is nothing here")
            known[name]()
        except _Refusal as refusal:
            self.send_error(*refusal.args)
        except CharLMError as error:
            self.send_error(400, refusal_of(error))

    def _page(self) -> None:
        fields = {**self.server.fields, "NONCE": secrets.token_urlsafe()}
        page = resources.files("charlm.cli").joinpath("serve.html").read_text(encoding="utf-8")
        page = re.sub("%([A-Z]+)%", lambda found: fields[found[1]], page)
        self.wfile.write(_answer(200, page, "text/html", f"'nonce-{fields['NONCE']}'"))

    def _read(self) -> None:
        with self._moved(self._values("text", "temperature", "seed")) as session:
            values = {"bits": _scored(session, 0)[1], "candidates": session.candidates(_CANDIDATES)}
        self.wfile.write(_answer(200, json.dumps(values), "application/json"))

    def _write(self) -> None:
        values = self._values("text", "temperature", "seed", "count")
        if not 1 <= (count := strict_json.take(values, "count", int, path=_NAME)) <= _NEW:
            raise _Refusal(400, f"count must be from 1 to {_NEW}, got {count}")
        with self._moved(values) as session:
            self.wfile.write(_answer(200, "", "application/x-ndjson"))
            sent, due, end, said = 0, 0.0, time.monotonic() + _SECONDS, ""  # all of the text is sent anew
            try:
                with contextlib.closing(session.go_on(count)) as pieces:
                    for _ in pieces:
                        if (now := time.monotonic()) >= due:
                            sent, due = self._send_from(session, sent), now + _FLUSH_SECONDS
                        if now > end or self.server.ending:
                            said = "the server ends" if self.server.ending else f"{_SECONDS} seconds are over"
                            break
            except CharLMError as error:
                said = str(error)
            self._send_from(session, sent, end=said)

    def _send_from(self, session: Session, begin: int, **more: str) -> int:
        text, bits, end = _scored(session, begin)
        self.wfile.write(json.dumps({"text": text, "bits": bits, **more}).encode() + b"\n")
        return end

    def _values(self, *names: str) -> dict[str, object]:
        """Return the fields of the request's body."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or "Transfer-Encoding" in self.headers:
            raise _Refusal(411, "Content-Length must say how many bytes come")
        if int(length) > _BYTES:
            raise _Refusal(413, f"a request may have {_BYTES:,} bytes, got {int(length):,}")
        if self.headers.get_content_type() != "application/json":
            raise _Refusal(415, "the request must be application/json")
        if len(data := self.rfile.read(int(length))) < int(length):
            raise _Refusal(400, "the request ends before its Content-Length")
        self.server.open[self.connection] = math.inf
        values = strict_json.loads(data, path=_NAME)
        if values.keys() - names:
            raise _Refusal(400, f"the fields must be {', '.join(names)}")
        return values

    @contextlib.contextmanager
    def _moved(self, values: dict[str, object]) -> Iterator[Session]:
        """Have the model to oneself, with the text and the options that are asked for."""
        text = strict_json.take(values, "text", str, path=_NAME)
        temperature = strict_json.take(values, "temperature", float, path=_NAME)
        seed = strict_json.take(values, "seed", int, path=_NAME)
        if len(text) > _CHARACTERS:
            raise _Refusal(413, f"the text may have {_CHARACTERS:,} characters, got {len(text):,}")
        if not self.server.model.acquire(timeout=_SLOW):
            raise _Refusal(503, "the model is busy with another request; ask again")
        try:
            session, end = self.server.session, time.monotonic() + _SECONDS
            session.options = dataclasses.replace(session.options, temperature=temperature, seed=seed)
            session.move_to(text)
            while session.score_some():
                if time.monotonic() > end or self.server.ending:
                    raise _Refusal(503, f"to read it took over {_SECONDS} seconds; ask again to go on")
            yield session
        finally:
            self.server.model.release()

    @override
    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        if self.server.open.get(self.connection, math.inf) < time.monotonic():
            code, message = 408, f"a request must be there within {_SLOW} seconds"
        said = message or HTTPStatus(code).phrase
        self.wfile.write(_answer(405 if code == 501 else code, f"{said}\n"))

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _answer(code: int, text: str, kind: str = "text/plain", source: str = "'none'") -> bytes:
    """Return an answer, or the begin of one that goes on until the connection ends."""
    policy = f"default-src 'none'; script-src {source}; style-src {source}; connect-src 'self'; "
    policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    head = f"HTTP/1.0 {code} {'OK' if code == 200 else 'Refused'}\r\nContent-Type: {kind}; charset=utf-8\r\n"
    head += f"Content-Security-Policy: {policy}\r\nX-Content-Type-Options: nosniff\r\n"
    head += "Referrer-Policy: no-referrer\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    return f"{head}{text}".encode("utf-8", "backslashreplace")


def _scored(session: Session, begin: int) -> tuple[str, list[float], int]:
    """Return what `Session.scored` does, with bits as short as the colours need them; none is infinite."""
    text, bits, end = session.scored(begin)
    return text, [round(min(99.0, b), 1) for b in bits], end
