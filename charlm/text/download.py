"""A checked download: the bytes that were expected, or an error that says what came instead.

What is wanted is known to the last bit (`Download.sha256`), so nothing that a server, a proxy or a login
page answers can pass for it. Knows nothing of texts; where the bytes are kept is the caller's business.
"""

from __future__ import annotations

import hashlib
import http.client
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import IO

from typing_extensions import override

from charlm.errors import CorpusError, quoted

__all__ = ["Download", "fetch"]

_PIECE = 2**16


@dataclass(frozen=True)
class Download:
    """A file of fixed content at a fixed address.

    Attributes:
        name: what messages call it.
        url: where it is.
        size: in bytes.
        sha256: of its content, in hexadecimal.
        timeout_seconds: how long the server may be silent; and after so long the download must have kept at
            least half the pace at which it would be done at the deadline.
        deadline_seconds: how long the whole may take.
    """

    name: str
    url: str
    size: int
    sha256: str
    timeout_seconds: float = 20.0
    deadline_seconds: float = 300.0

    def matches(self, data: bytes | bytearray) -> bool:
        """Return whether these bytes are the wanted ones."""
        return len(data) == self.size and hashlib.sha256(data).hexdigest() == self.sha256


def fetch(wanted: Download) -> bytes:
    """Download a file and check it.

    Raises:
        CorpusError: no answer in time, an error of network or server, or other bytes than wanted.
    """
    outcome: list[bytes | BaseException] = []
    received = bytearray()

    def work() -> None:
        try:
            outcome.append(_received(wanted, received))
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, below
            outcome.append(error)

    # Name resolution, handshakes and headers can all be slow without end, and no socket timeout bounds
    # their sum. So a thread does the work, and is left alone when the time is up.
    thread = threading.Thread(target=work, name=f"charlm download of {wanted.name}", daemon=True)
    began = time.monotonic()
    thread.start()
    while thread.is_alive() and (seconds := time.monotonic() - began) < wanted.deadline_seconds:
        least = wanted.size * seconds / wanted.deadline_seconds / 2
        if seconds >= wanted.timeout_seconds and len(received) < least:
            raise _failed(wanted, f"timed out: {len(received)} bytes came in {seconds:.0f} seconds")
        thread.join(min(wanted.timeout_seconds, wanted.deadline_seconds - seconds))
    if not outcome:
        raise _failed(wanted, f"it took longer than {wanted.deadline_seconds:g} seconds")
    data = outcome[0]
    if isinstance(data, urllib.error.HTTPError):
        data.close()
        raise _failed(wanted, f"the server answered {data.code} {quoted(str(data.reason))}")
    # A ValueError is a bad redirect address.
    if isinstance(data, (OSError, http.client.HTTPException, ValueError)):
        reason = getattr(data, "reason", data)
        raise _failed(wanted, quoted(str(reason))[1:-1], getattr(reason, "errno", None))
    if isinstance(data, BaseException):
        raise data
    if not wanted.matches(data):
        size = f"more than {wanted.size}" if len(data) > wanted.size else str(len(data))
        raise _failed(
            wanted,
            f"{wanted.size} bytes with sha256 {wanted.sha256} are wanted, but {size} bytes with sha256 "
            f"{hashlib.sha256(data).hexdigest()} came; a proxy or a login page may have answered",
        )
    return data


def _received(wanted: Download, data: bytearray) -> bytes:
    """Fill `data`, and return what is wanted of it, or a byte more."""
    end = time.monotonic() + wanted.deadline_seconds
    opener = urllib.request.build_opener(_Redirects)
    with opener.open(wanted.url, timeout=wanted.timeout_seconds) as response:
        # read1 returns what has arrived, where read would wait for the whole piece
        while len(data) <= wanted.size and time.monotonic() < end and (piece := response.read1(_PIECE)):
            data += piece
    return bytes(data[: wanted.size + 1])


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and from one plain http address to another."""

    @override
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in {"https", req.type}:
            message = f"Redirect to {newurl[:100]}, which is not https"
            raise urllib.error.HTTPError(req.full_url, code, message, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _failed(wanted: Download, reason: str, errno: int | None = None) -> CorpusError:
    error = CorpusError(
        f"{wanted.name} could not be downloaded from {wanted.url}: {reason}. Download it by other means and "
        f"pass its path, or put it as {wanted.name}.txt into a folder and set CHARLM_DATA_DIR to that folder"
    )
    error.errno = errno
    return error
