"""A hub on loopback: one repository, listed as the hub lists it; large files redirect to a storage of another host."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.remote.server import Server, serving

NAME, TOKEN = "someone/nano", "hf_hush"


class Hub(ThreadingHTTPServer):
    """``commits``: by branch. ``private``: who has not the token is told that there is nothing."""

    daemon_threads = True

    def __init__(self, folder: Path, storage: Server) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.storage = storage
        self.commits = {"main": "a" * 40, "v2": "b" * 40}
        self.private = False
        self.gated = False
        self.expire_after: int | None = None
        """So many requests to the storage, and the addresses that were given until then are refused."""
        self.seen: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://localhost:{self.server_address[1]}"

    def siblings(self) -> list[dict[str, object]]:
        """As the hub lists them with their metadata."""
        return [_sibling(path) for path in sorted(self.folder.iterdir()) if path.is_file()]


def _sibling(path: Path) -> dict[str, object]:
    data = path.read_bytes()
    found: dict[str, object] = {"rfilename": path.name, "size": len(data), "blobId": git_sha1(data)}
    if path.suffix == ".safetensors":
        found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found


def git_sha1(data: bytes) -> str:
    """The digest that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append((path, self.headers.get("Authorization")))
        if self.server.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"X-Error-Code": "RepoNotFound"})
        elif self.server.gated:
            self._answer(403, {"X-Error-Code": "GatedRepo"})
        elif path.startswith(f"/api/models/{NAME}"):
            self._list(path.removeprefix(f"/api/models/{NAME}").removeprefix("/revision/") or "main")
        elif path.startswith(f"/{NAME}/resolve/"):
            self._file(*path.removeprefix(f"/{NAME}/resolve/").split("/"))
        else:
            self._answer(404, {"X-Error-Code": "RepoNotFound"})

    def _list(self, revision: str) -> None:
        commit = self.server.commits.get(revision, revision if revision in self.server.commits.values() else "")
        if not commit:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            return
        body = {"id": NAME, "sha": commit, "siblings": self.server.siblings(), "tags": [], "private": False}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _file(self, commit: str, name: str) -> None:
        path = self.server.folder / name
        if commit not in self.server.commits.values() or not path.is_file():
            self._answer(404, {"X-Error-Code": "EntryNotFound"})
        elif path.suffix == ".safetensors":
            linked = {"X-Linked-Etag": f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"', "X-Repo-Commit": commit}
            self._answer(302, {"Location": f"{self.server.storage.url}{name}?{self._signature()}", **linked})
        else:
            first, _, last = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
            data = path.read_bytes()
            part = data[int(first) : int(last) + 1] if last else data
            span = {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}
            self._answer(206, {"ETag": f'"{git_sha1(data)}"', **span}, part)

    def _signature(self) -> str:
        late = self.server.expire_after is not None and len(self.server.storage.seen) > self.server.expire_after
        return f"Signature=s3cr3t-{int(late)}"

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@contextmanager
def hub_of(folder: Path) -> Generator[Hub]:
    """A hub while this is not left."""
    with serving(folder) as storage:
        hub = Hub(folder, storage)
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            hub.server_close()
            thread.join()
