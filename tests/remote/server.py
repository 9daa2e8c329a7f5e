"""A web server on loopback that serves a folder by ranges, and does by seed what servers do on bad days.

What it does wrong is drawn for each request from `Moods`, so a run with the same seed and the same requests sees the
same faults. `seen` keeps each request's path and headers.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from urllib.parse import unquote, urlsplit

MOODS = ("drops", "stalls", "truncates", "busy", "whole", "shorter", "garbles")


@dataclass
class Moods:
    """``share`` of the requests go wrong, in one of ``kinds``; ``stall``: seconds of silence. ``change_after``: so many
    requests into it, every file has another ETag (None: never)."""

    kinds: tuple[str, ...] = ()
    share: float = 0.0
    stall: float = 1.0
    change_after: int | None = None
    draw: Random = field(default_factory=Random)


class Server(ThreadingHTTPServer):
    """Files of a folder at ``url``."""

    daemon_threads = True

    def __init__(self, folder: Path, moods: Moods, *, etags: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.moods = moods
        self.etags = etags
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.faults: dict[str, int] = {}
        self.refuse = ""
        """What an address must not hold."""
        self.expires = ("", 0)
        """What an address must not hold so many requests into it."""
        self.refuse_after: int | None = None
        """So many requests into it, all are refused."""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Of the folder."""
        return f"http://127.0.0.1:{self.server_address[1]}/{self.folder.name}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are nothing to print."""

    def mood(self) -> str:
        """What goes wrong with the next request, "" for nothing."""
        with self.lock:
            wrong = self.moods.draw.random() < self.moods.share
            kind = self.moods.draw.choice(self.moods.kinds) if wrong and self.moods.kinds else ""
            if kind:
                self.faults[kind] = self.faults.get(kind, 0) + 1
            return kind

    def etag(self, path: Path) -> str:
        """Of a file as it is now."""
        changed = self.moods.change_after is not None and len(self.seen) > self.moods.change_after
        return hashlib.md5(f"{path.name} {path.stat().st_size} {changed}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers)))
        path = self.server.folder.parent / unquote(urlsplit(self.path).path).lstrip("/")
        mood = self.server.mood()
        old, limit = self.server.expires
        expired = bool(old) and old in self.path and len(self.server.seen) > limit
        late = self.server.refuse_after is not None and len(self.server.seen) > self.server.refuse_after
        if late or expired or (self.server.refuse and self.server.refuse in self.path):
            self._short(403)
        elif not path.is_file():
            self._short(404)
        elif mood == "busy":
            self._short(503, {"Retry-After": "0"})
        elif mood == "drops":
            self.close_connection = True
        elif mood == "stalls":
            time.sleep(self.server.moods.stall)
            self.close_connection = True
        else:
            self._file(path, mood)

    def _file(self, path: Path, mood: str) -> None:
        data = path.read_bytes()
        asked = self.headers.get("Range")
        if asked is None or mood == "whole":
            self._send(200, data, mood, path, {})
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(data))
        if start >= len(data):
            self._short(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        if mood == "shorter" and stop - start > 1:
            stop -= (stop - start) // 2
        self._send(206, data[start:stop], mood, path, {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def _send(self, status: int, data: bytes, mood: str, path: Path, headers: dict[str, str]) -> None:
        if mood == "garbles":
            self.wfile.write(b"not http at all\r\n\r\n")
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.server.etags:
            self.send_header("ETag", f'"{self.server.etag(path)}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if mood == "truncates":
            data = data[: max(1, len(data) // 2)]
            self.close_connection = True
        self.wfile.write(data)

    def _short(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@contextmanager
def serving(folder: Path, moods: Moods | None = None, *, etags: bool = True) -> Generator[Server]:
    """A server while this is not left."""
    server = Server(folder, moods or Moods(), etags=etags)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
