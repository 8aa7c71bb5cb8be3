"""A checked download: it returns the expected bytes or raises an error that describes the answer.

The sha256 of the file is known beforehand, so the answer of a proxy or a login page cannot pass for it. This
module knows nothing of texts; the caller stores the bytes.
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
        name: its name in messages.
        url: its address.
        size: its size in bytes.
        sha256: the hash of its content, in hexadecimal.
        timeout_seconds: the longest silence of the server. From then on, the download must also go at least
            half as fast as the deadline demands.
        deadline_seconds: the longest time of the whole download.
    """

    name: str
    url: str
    size: int
    sha256: str
    timeout_seconds: float = 20.0
    deadline_seconds: float = 300.0

    def matches(self, data: bytes | bytearray) -> bool:
        """Return whether these bytes are the expected ones."""
        return len(data) == self.size and hashlib.sha256(data).hexdigest() == self.sha256


def fetch(download: Download) -> bytes:
    """Download a file and check it.

    Raises:
        CorpusError: the time is up, the network or server failed, or other bytes came than expected.
    """
    outcome: list[bytes | BaseException] = []
    received = bytearray()

    def work() -> None:
        try:
            outcome.append(_received(download, received))
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, below
            outcome.append(error)

    # Name resolution, handshakes and headers can each take very long, and no socket timeout bounds their
    # sum. So a thread does the work, and is abandoned when the time is up.
    thread = threading.Thread(target=work, name=f"charlm download of {download.name}", daemon=True)
    began = time.monotonic()
    thread.start()
    while thread.is_alive() and (seconds := time.monotonic() - began) < download.deadline_seconds:
        least = download.size * seconds / download.deadline_seconds / 2
        if seconds >= download.timeout_seconds and len(received) < least:
            raise _failed(download, f"timed out: {len(received)} bytes came in {seconds:.0f} seconds")
        thread.join(min(download.timeout_seconds, download.deadline_seconds - seconds))
    if not outcome:
        raise _failed(download, f"it took longer than {download.deadline_seconds:g} seconds")
    data = outcome[0]
    if isinstance(data, urllib.error.HTTPError):
        data.close()
        raise _failed(download, f"the server answered {data.code} {quoted(str(data.reason))}")
    # A ValueError is a bad redirect address.
    if isinstance(data, (OSError, http.client.HTTPException, ValueError)):
        reason = getattr(data, "reason", data)
        raise _failed(download, quoted(str(reason))[1:-1], getattr(reason, "errno", None))
    if isinstance(data, BaseException):
        raise data
    if not download.matches(data):
        size = f"more than {download.size}" if len(data) > download.size else str(len(data))
        raise _failed(
            download,
            f"{download.size} bytes with sha256 {download.sha256} are wanted, but {size} bytes with sha256 "
            f"{hashlib.sha256(data).hexdigest()} came; a proxy or a login page may have answered",
        )
    return data


def _received(download: Download, data: bytearray) -> bytes:
    """Fill `data` as bytes arrive, and return at most one byte more than expected."""
    end = time.monotonic() + download.deadline_seconds
    opener = urllib.request.build_opener(_Redirects)
    with opener.open(download.url, timeout=download.timeout_seconds) as response:
        # read1 returns the bytes that have arrived; read would wait for a whole piece
        while len(data) <= download.size and time.monotonic() < end and (piece := response.read1(_PIECE)):
            data += piece
    return bytes(data[: download.size + 1])


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


def _failed(download: Download, reason: str, errno: int | None = None) -> CorpusError:
    error = CorpusError(
        f"{download.name} could not be downloaded from {download.url}: {reason}. Download it by other means "
        f"and pass its path, or put it as {download.name}.txt into a folder and set CHARLM_DATA_DIR to that "
        "folder"
    )
    error.errno = errno
    return error
