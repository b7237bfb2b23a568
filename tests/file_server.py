"""A server of small files on the loopback, as the Hugging Face Hub and as a plain server, that misbehaves when told to.

with serving({"name": b"..."}) as server:
    server.misbehave(cut(1000), status(429, "1"))      # the next two answers; after that it behaves
    server.url("name")                                  # plain
    server.hub                                          # for HF_ENDPOINT: /owner/repo/resolve/main/name
    server.asked                                        # what came: path, Range, Authorization
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STEP = 1 << 14
FOREVER = 600.0  # seconds, after which a test that hangs fails


@dataclass(frozen=True)
class Asked:
    path: str
    range: str
    authorization: str


@dataclass
class Server:
    files: dict[str, bytes]
    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    sent: int = 0  # bytes of files
    todo: list[Callable[[Handler, bytes], None]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def hub(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, name: str) -> str:
        return f"{self.hub}/plain/{name}"

    def misbehave(self, *how: Callable[[Handler, bytes], None]) -> None:
        self.todo[:] = how

    @property
    def of_files(self) -> list[Asked]:
        """Without the hub's own answers, which only redirect."""
        return [asked for asked in self.asked if "/resolve/" not in asked.path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ours: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        ours, headers = self.ours, self.headers
        with ours.lock:
            ours.asked.append(Asked(self.path, headers.get("Range", ""), headers.get("Authorization", "")))
        data = ours.files.get(self.path.rpartition("/")[2])
        if data is None:
            return self.head(404, 0)
        if "/resolve/" in self.path:
            return self.redirect(data)
        with ours.lock:
            how = ours.todo.pop(0) if ours.todo else whole
        with contextlib.suppress(ConnectionError):
            how(self, data)
        return None

    def redirect(self, data: bytes) -> None:
        """As the hub does for large files: what it is, and where its bytes are (on another host)."""
        place = f"http://localhost:{self.ours.port}/cdn/{self.path.rpartition('/')[2]}"
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.head(302, 0, Location=place, X_Linked_Size=str(len(data)), X_Linked_Etag=etag)

    @property
    def start(self) -> int:
        found = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        return int(found[1]) if found else 0

    def head(self, status: int, length: int | None, **headers: str) -> None:
        """length: None to leave it out."""
        self.send_response(status)
        if length is not None:
            headers["Content-Length"] = str(length)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def right_head(self, data: bytes, begins: int | None = None) -> None:
        """Of the part that was asked for. begins: where it is said to begin."""
        if not self.start:
            return self.head(200, len(data))
        if self.start >= len(data):
            return self.head(416, 0)
        begins = self.start if begins is None else begins
        return self.head(206, len(data) - self.start, Content_Range=f"bytes {begins}-{len(data) - 1}/{len(data)}")

    def body(self, data: bytes, wait: float = 0.0) -> None:
        for at in range(0, len(data), STEP):
            self.wfile.write(data[at : at + STEP])
            with self.ours.lock:
                self.ours.sent += len(data[at : at + STEP])
            time.sleep(wait)


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """Clients that go away in the middle are what is tested here."""


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + FOREVER
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- how to answer


def whole(handler: Handler, data: bytes, wait: float = 0.0) -> None:
    """wait: between its pieces."""
    handler.right_head(data)
    handler.body(data[handler.start :], wait)


def slowly(handler: Handler, data: bytes) -> None:
    whole(handler, data, 0.02)


def held(release: threading.Event) -> Callable[[Handler, bytes], None]:
    """A quarter, then a little now and then until it is released, then the rest."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.right_head(data)
        rest = data[handler.start :]
        quarter = len(rest) // 4
        handler.body(rest[:quarter])
        rest = rest[quarter:]
        while not release.is_set() and len(rest) > 2 * STEP:
            handler.body(rest[:STEP], 1.0)
            rest = rest[STEP:]
        release.wait(FOREVER)
        handler.body(rest)

    return answer


def cut(after: int, silence: float = 0.0) -> Callable[[Handler, bytes], None]:
    """Promises all, and after some bytes says nothing more for so many seconds, then closes the connection."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.right_head(data)
        handler.body(data[handler.start :][:after])
        time.sleep(silence)
        handler.close_connection = True

    return answer


def other_bytes(handler: Handler, data: bytes) -> None:
    handler.right_head(data)
    handler.body(bytes(len(data) - handler.start))


def no_ranges(handler: Handler, data: bytes) -> None:
    handler.head(200, len(data))
    handler.body(data)


def from_another_byte(handler: Handler, data: bytes) -> None:
    handler.right_head(data, begins=handler.start - 1)
    handler.body(data[handler.start :])


def length(count: int, html: bool = False) -> Callable[[Handler, bytes], None]:
    """Lies about the size: says `count` bytes and sends as many."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.head(200, count, Content_Type="text/html" if html else "application/octet-stream")
        handler.body((data * 3)[:count])

    return answer


def chunked(count: int) -> Callable[[Handler, bytes], None]:
    """Does not say how much it is, and sends `count` bytes."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.head(200, None, Transfer_Encoding="chunked")
        data = (data * 3)[:count]
        for at in range(0, len(data), STEP):
            piece = data[at : at + STEP]
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    return answer


def status(code: int, **headers: str) -> Callable[[Handler, bytes], None]:
    return lambda handler, data: handler.head(code, 0, **headers)


@contextlib.contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[Server]:
    ours = Server(dict(files))
    http = Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"ours": ours}))
    ours.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield ours
    finally:
        http.shutdown()
        http.server_close()
