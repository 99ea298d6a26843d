"""One try to bring a file from one address into a `Part`: HTTP(S) by the standard library, or a file of this machine.

Each failure is told apart by what helps: to try again (`Failed`), another address (`Refused`), or neither (`Stopped`).
"""

from __future__ import annotations

import base64
import errno
import http.client
import re
import shutil
import socket
import ssl
import string
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from prunet_zoo.version import __version__
from prunet_zoo.zoo.partial import Origin, Part

CHUNK = 1 << 18  # bytes
LARGEST = 4 << 30  # bytes; no weights are that large, and a stream without a length must end somewhere
AGAIN = (408, 425, 429, 500, 502, 503, 504)
OFFLINE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
Meter = Callable[[int, "int | None"], None]  # bytes there, bytes in all


class Failed(Exception):
    """Another try may help. ``wait`` is how long the server asks to wait, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Refused(Exception):
    """This address does not give the file."""


class Stopped(Exception):
    """No address can help: the disk is full or cannot be written."""


@dataclass(frozen=True)
class Want:
    """What is known of the file in advance. ``reserve``: bytes that the disk must hold besides."""

    sha256: str | None = None
    reserve: int = 0


def receive(url: str, part: Part, want: Want, timeout: float, meter: Meter) -> int:
    """Bring the rest of the file at ``url`` (http, https, file, or a path) into ``part``.

    Returns:
        The byte from which it went on; 0 where all bytes are of this try.

    Raises:
        Failed, Refused, Stopped: what arrived until then is kept, where it can be continued.
    """
    try:
        scheme = urlsplit(url).scheme
    except ValueError as error:
        raise Refused(f"is no address: {error}") from None
    if scheme in ("http", "https"):
        return _receive_http(url, part, want, timeout, meter)
    _receive_local(_local_path(url), part, want, meter)
    return 0


def shown(url: str) -> str:
    """The address without a user's name and password."""
    try:
        parts = urlsplit(url)
    except ValueError:  # not an address; `receive` says so
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else url


def _receive_http(url: str, part: Part, want: Want, timeout: float, meter: Meter) -> int:
    start = part.continues(shown(url))
    origin = part.origin
    if start and origin is not None and origin.total == start:
        return start  # complete: the process ended before it could use it
    with _open(url, start, origin, timeout, part) as response:
        length = response.length  # of this body, before the first read takes off from it; None: not told
        first = _first_bytes(response)
        if response.status == 206 and start and origin is not None:
            total = _check_continuation(response, length, start, origin, part)
            _check_size(total, want, part, start)
        elif response.status == 200:
            start, total = 0, length
            _check_size(total, want, part, 0)
            etag, date = response.headers["ETag"], response.headers["Last-Modified"]
            with _disk(part):
                part.begin(Origin(url=shown(url), etag=etag, last_modified=date, total=total))
        else:
            raise Refused(f"unexpected answer {response.status} {response.reason}")
        _append(response, part, total, meter, first)
    if total is not None and part.size < total:
        raise Failed(f"the connection ended after {part.size:,} of {total:,} bytes")
    return start


def _open(url: str, start: int, origin: Origin | None, timeout: float, part: Part) -> Any:
    """Ask for the bytes from ``start``; returns the response."""
    try:
        return _opener().open(_request(url, start, origin), timeout=timeout)
    except HTTPError as error:
        with error:
            raise _judge_status(error, part) from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of a host's or header's form
        raise _judge_error(error) from None


def _request(url: str, start: int, origin: Origin | None) -> urllib.request.Request:
    headers = {"User-Agent": f"prunet_zoo/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"}
    if start and origin is not None and origin.validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": origin.validator}
    parts = urlsplit(url)
    path, query = (quote(text, safe=string.punctuation) for text in (parts.path, parts.query))  # blanks, umlauts
    request = urllib.request.Request(shown(urlunsplit(parts._replace(path=path, query=query))), headers=headers)
    if parts.username is not None:  # not sent on to where the server redirects
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    return request


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to http: nothing else vouches for the bytes."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme not in ("http", "https") or (req.type == "https" and scheme == "http"):
            raise Refused(f"redirects from {req.type} to {scheme} ({shown(newurl)}), which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Built for each request: proxies are those of the environment now. No ftp, no data URLs."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _SafeRedirects(),
    ):
        opener.add_handler(handler)
    return opener


def _first_bytes(response: Any) -> bytes:
    """The first bytes that arrive. A page instead of the file, or a compressed one, must not even replace the part."""
    kind, coding = response.headers.get_content_type(), response.headers["Content-Encoding"]
    if coding not in (None, "", "identity"):
        raise Refused(f"sends the file in the encoding {coding!r}, which was not asked for")
    first = _from_net(response)
    if kind in ("text/html", "application/xhtml+xml") or re.match(rb"\s*<(!doctype|html)", first, re.IGNORECASE):
        raise Refused("answers with a web page, not with the file (does this network ask for a log-in first?)")
    return first


def _check_continuation(response: Any, length: int | None, start: int, origin: Origin, part: Part) -> int:
    """Length of the whole file; `Failed`, with the part discarded, where these are not its missing bytes."""
    text = response.headers["Content-Range"] or ""
    found = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", text.strip())
    first, last = (int(found[1]), int(found[2])) if found else (-1, -1)
    total = int(found[3]) if found and found[3] != "*" else origin.total
    etag = response.headers["ETag"]
    fits = (
        first == start
        and total is not None
        and start <= last < total
        and total == (total if origin.total is None else origin.total)
        and length in (None, last - first + 1)
        and (etag is None or origin.etag is None or etag == origin.etag)
    )
    if not fits or total is None:
        part.discard()
        raise Failed(f"asked for the bytes from {start:,}, the server sent others ({text or 'without a range'})")
    return total


def _check_size(total: int | None, want: Want, part: Part, start: int) -> None:
    if total is None:
        return
    if total > LARGEST:
        raise Refused(f"offers {total:,} bytes; no weights are larger than {LARGEST:,}")
    freed = part.size if not start else 0  # what is there makes room
    free, need = shutil.disk_usage(part.path.parent).free + freed, total - start + want.reserve
    if need > free:
        raise Stopped(
            f"{need / 1e6:,.1f} MB are needed in {part.path.parent}, {free / 1e6:,.1f} MB are free; "
            "free some space or name another folder by $PRUNET_HOME"
        )


def _append(source: Any, part: Part, total: int | None, meter: Meter, first: bytes = b"") -> None:
    """Copy ``first`` and the rest of ``source`` to the end of the part, at most up to ``total`` bytes (where known)."""
    done = part.size
    meter(done, total)
    with _disk(part), part.open() as file:
        while True:
            chunk = first or _from_net(source)
            first = b""
            if not chunk:
                return
            if done + len(chunk) > (LARGEST if total is None else total):
                part.discard()
                raise Refused(f"sends more than {LARGEST if total is None else total:,} bytes")
            view = memoryview(chunk)
            while view:  # an unbuffered write may be short
                view = view[file.write(view) :]
            done += len(chunk)
            meter(done, total)


def _from_net(source: Any) -> bytes:
    """The next bytes; errors of their source are `Failed`, so that they are not taken for those of the disk."""
    try:
        data: bytes = source.read1(CHUNK)  # what has arrived, not a full chunk: a reset would lose it
    except (OSError, http.client.HTTPException) as error:
        raise _judge_error(error, begun=True) from None
    return data


@contextmanager
def _disk(part: Part) -> Iterator[None]:
    """Turns an error of the disk into `Stopped`."""
    try:
        yield
    except OSError as error:
        raise Stopped(disk_message(error, part)) from error


def disk_message(error: OSError, part: Part) -> str:
    """What to tell about an error while writing the part."""
    there = part.size
    kept = f"; the {there:,} bytes that arrived stay there, the next download goes on from them" if there else ""
    advice = "Free some space or name another folder by $PRUNET_HOME"
    return f"cannot write {part.path}: {error.strerror or error}{kept}. {advice}"


def _judge_status(error: HTTPError, part: Part) -> Failed | Refused:
    text = f"{error.code} {error.reason}"
    if error.code == 416:
        part.discard()
        return Failed(f"{text}: it has no bytes after those that are here; beginning anew")
    if error.code in AGAIN:
        return Failed(text, _retry_after(error.headers["Retry-After"]))
    return Refused(text)


def _retry_after(text: str | None) -> float | None:
    """Seconds from now, of a number or an HTTP date; None where there is neither."""
    if not text:
        return None
    if re.fullmatch(r"[0-9]{1,9}", text.strip()):
        return float(text)
    try:
        until = parsedate_to_datetime(text).astimezone(timezone.utc)
    except (TypeError, ValueError, OverflowError):  # the last: of the year 9999
        return None
    return max(0.0, (until - datetime.now(timezone.utc)).total_seconds())


def _judge_error(error: Exception, begun: bool = False) -> Failed | Refused:
    """Sort an error of the network. Without a network before the first byte, trying again would only cost time."""
    if isinstance(error, URLError) and isinstance(error.reason, str):  # of urllib itself: of a host's or scheme's form
        return Refused(f"is no address that can be asked: {error.reason}")
    cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    if isinstance(cause, http.client.InvalidURL) or (isinstance(cause, ValueError) and not isinstance(cause, OSError)):
        return Refused(f"is no address that can be asked: {cause}")
    if isinstance(cause, ssl.SSLCertVerificationError):
        return Refused(f"its certificate is not valid: {cause.verify_message}")
    if isinstance(cause, TimeoutError):
        return Failed("no answer in time")
    reason = (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
    if isinstance(cause, socket.gaierror) and not begun:
        return Refused(f"its host is not found ({reason})")
    if isinstance(cause, OSError) and cause.errno in OFFLINE and not begun:
        return Refused(reason)
    return Failed(reason)


def _local_path(url: str) -> Path:
    parts = urlsplit(url)
    if parts.scheme != "file":
        return Path(url)
    if parts.netloc not in ("", "localhost"):
        raise Refused(f"a file:// address names a file of this machine, not of {parts.netloc!r} (three slashes?)")
    return Path(urllib.request.url2pathname(parts.path))


def _receive_local(source: Path, part: Part, want: Want, meter: Meter) -> None:
    try:
        if not source.is_file():
            raise Refused("there is no such file")
        with source.open("rb") as file:
            total = source.stat().st_size
            _check_size(total, want, part, 0)
            with _disk(part):
                part.begin(Origin(url=str(source), total=total))
            _append(file, part, total, meter)
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror or error}") from None
    if part.size != total:
        raise Refused(f"gave {part.size:,} of {total:,} bytes")
