"""A web server on this machine that answers one corpus well and in every wrong way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Serves `content`; the path of a request says how."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = content
        self.stopping = threading.Event()
        self.asked = threading.Event()
        self.requests = 0

    def url(self, path: str) -> str:
        """Return the address of a path."""
        return f"http://127.0.0.1:{self.server_port}/{path}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.requests += 1
        self.server.asked.set()
        answer = getattr(self, "answer_" + self.path.removeprefix("/").partition("/")[0])
        with contextlib.suppress(OSError):  # the client hung up
            answer()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def send(self, data: bytes, length: int | None = None) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    def answer_right(self) -> None:
        self.send(self.server.content, len(self.server.content))

    def answer_unsized(self) -> None:
        self.send(self.server.content)

    def answer_wrong(self) -> None:
        self.send(self.server.content[:-1] + b"?", len(self.server.content))

    def answer_short(self) -> None:
        self.send(self.server.content[:-1], len(self.server.content) - 1)

    def answer_broken(self) -> None:  # promises more than it sends
        self.send(self.server.content[:-1], len(self.server.content))

    def answer_empty(self) -> None:
        self.send(b"", 0)

    def answer_long(self) -> None:
        self.send(self.server.content + b"!", len(self.server.content) + 1)

    def answer_endless(self) -> None:
        self.send(b"")
        while not self.server.stopping.is_set():
            self.wfile.write(bytes(2**16))

    def answer_slow(self) -> None:
        self.send(b"")
        for i in range(len(self.server.content)):
            if self.server.stopping.wait(0.02):
                break
            self.wfile.write(self.server.content[i : i + 1])

    def answer_steady(self) -> None:  # within about a second
        self.send(b"")
        for start in range(0, len(self.server.content), 20_000):
            if self.server.stopping.wait(0.05):
                break
            self.wfile.write(self.server.content[start : start + 20_000])

    def answer_slowheaders(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Header: ")
        while not self.server.stopping.wait(0.02):
            self.wfile.write(b"x")

    def answer_silent(self) -> None:
        self.server.stopping.wait(30)

    def answer_garbage(self) -> None:
        self.wfile.write(b"\x00\x1b[31mthis is no HTTP\r\n\r\n")

    def answer_missing(self) -> None:
        self.send_error(404, "Gone\x1b[31m away")

    def answer_redirect(self) -> None:
        self.send_response(302)
        target = self.path.partition("/redirect/")[2]
        self.send_header("Location", target if ":" in target else self.server.url(target))
        self.end_headers()

    def answer_circle(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.path + "x" if len(self.path) < 60 else "/circle/")
        self.end_headers()


@contextlib.contextmanager
def serving(content: bytes) -> Iterator[FileServer]:
    """Serve until the block ends."""
    server = FileServer(content)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()
