"""A loopback HTTP server whose answers are scripted, and which keeps account of what was asked and sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Request:
    """One request; ``sent`` counts the bytes of the body."""

    path: str
    range: str | None
    headers: dict[str, str]
    sent: int = 0
    status: int = 0


@dataclass
class Quirk:
    """How one answer differs from a good one. ``drop`` closes the connection after that many bytes of the body."""

    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)  # None: the header is left out
    drop: int | None = None
    length: int | None = None  # declared Content-Length
    body: bytes | None = None  # another body, sent whole with status 200
    ranges: bool = True
    if_range: bool = True  # whether a changed file is sent whole
    content_range: str | None = None
    chunked: bool = False
    delay: float = 0.0  # seconds between pieces of the body
    begin: Callable[[], None] | None = None  # called before the answer


GOOD = Quirk()


class Server:
    """Serves ``files`` by path; each request takes the next of ``quirks``, after those a good answer."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.quirks: list[Quirk] = []
        self.always: Quirk = GOOD
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def base(self) -> str:
        """Address without a slash at its end."""
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def add(self, path: str, data: bytes, etag: str | None = None) -> str:
        """Serve ``data``; returns its address."""
        self.files[path] = data
        self.etags[path] = f'"{abs(hash(data)):x}"' if etag is None else etag
        return self.base + path

    def next_quirk(self) -> Quirk:
        with self.lock:
            return self.quirks.pop(0) if self.quirks else self.always

    @property
    def sent(self) -> int:
        """Bytes of all bodies."""
        return sum(request.sent for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    owner: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        owner, quirk = self.owner, self.owner.next_quirk()
        path = self.path.removeprefix(owner.base)  # a proxy is asked for the whole address
        if path.startswith("http://"):
            path = "/" + path.split("/", 3)[3]
        request = Request(path, self.headers["Range"], dict(self.headers.items()))
        with owner.lock:
            owner.requests.append(request)
        if quirk.begin:
            quirk.begin()
        status, headers, body = self.answer(path, quirk)
        request.status = status
        self.close_connection = True
        try:
            self.send_response(status)
            for key, value in {**headers, **quirk.headers, "Connection": "close"}.items():
                if value is not None:
                    self.send_header(key, value)
            self.end_headers()
            self.send_body(body, quirk, request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client went away

    def answer(self, path: str, quirk: Quirk) -> tuple[int, dict[str, str], bytes]:
        data = self.owner.files.get(path)
        if quirk.status is not None:
            return quirk.status, {"Content-Length": "0"}, b""
        if data is None:
            return 404, {"Content-Length": "0"}, b""
        data = data if quirk.body is None else quirk.body
        etag = self.owner.etags[path]
        headers = {"Content-Type": "application/zip", **({"ETag": etag} if etag else {})}
        status, begin = 200, 0
        asked = self.headers["Range"] if quirk.ranges and quirk.body is None else None
        if asked and (not quirk.if_range or self.headers["If-Range"] == etag):
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(data):
                return 416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"}, b""
            status = 206
            headers["Content-Range"] = quirk.content_range or f"bytes {begin}-{len(data) - 1}/{len(data)}"
        body = data[begin:]
        if quirk.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(len(body) if quirk.length is None else quirk.length)
        return status, headers, body

    def send_body(self, body: bytes, quirk: Quirk, request: Request) -> None:
        end = len(body) if quirk.drop is None else min(quirk.drop, len(body))
        step = max(1, end // 20) if quirk.delay else 1 << 16
        for begin in range(0, end, step):
            piece = body[begin : min(begin + step, end)]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if quirk.chunked else piece)
            self.wfile.flush()
            request.sent += len(piece)
            if quirk.delay:
                time.sleep(quirk.delay)
        if quirk.chunked and end == len(body):
            self.wfile.write(b"0\r\n\r\n")


@contextmanager
def serving() -> Iterator[Server]:
    """A running server."""
    server = Server()
    server.thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        server.thread.join()
