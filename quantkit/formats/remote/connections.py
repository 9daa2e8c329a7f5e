"""HTTP connections that stay open, one a thread and host. Redirects are followed here, because a token must not follow.

Proxies are those of the environment (HTTPS_PROXY, NO_PROXY), certificates those of the system (SSL_CERT_FILE).
"""

from __future__ import annotations

import base64
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from socket import SHUT_RDWR, socket
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass
from weakref import WeakSet

from quantkit.formats.remote.files import Address
from quantkit.version import __version__

MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)


class BadAnswer(HTTPException):
    """An answer that HTTP does not have, or that nobody should follow."""


@dataclass(slots=True)
class Answer:
    """``response``: its body is still to be read; ``linked``: what the first server says of the file that it sends on
    to (X-Linked-Etag); ``etag``: that, else the ETag of a server that was asked itself; "" if there is none; ``moved``:
    where another host has the file, "" if none does."""

    response: HTTPResponse
    linked: str
    etag: str
    moved: str
    connections: Connections
    key: tuple[str, str]

    def close(self, *, whole: bool) -> None:
        """End it. ``whole``: the body was read, so the connection may serve again."""
        self.response.close()
        if not whole:
            self.connections.drop(self.key)


class Connections:
    """An open resource: `close` it when no thread uses it any more."""

    def __init__(self, timeout: float) -> None:
        """``timeout``: seconds without a byte after which a read fails."""
        self._timeout = timeout
        self._own = threading.local()
        self._all: set[HTTPConnection] = set()
        self._sockets: WeakSet[socket] = WeakSet()
        self._lock = threading.Lock()
        self._tls = ssl.create_default_context()

    def ask(self, method: str, address: Address, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
        """Send a request, with redirects followed. Raises `OSError` or `HTTPException`, of which some may pass."""
        url, sent, linked = address.url, {**address.headers, **headers}, ""
        for _ in range(MOST_REDIRECTS + 1):
            response, key = self._send(method, url, sent, body)
            linked = linked or bare_etag(response.getheader("X-Linked-Etag"))
            target = response.getheader("Location")
            if response.status not in _REDIRECTS or target is None:
                moved = urlsplit(url).netloc != urlsplit(address.url).netloc
                own = "" if moved else bare_etag(response.getheader("ETag"))
                return Answer(response, linked, linked or own, url if moved else "", self, key)
            response.read()
            url, sent = _redirected(url, target, sent)
        raise BadAnswer("too many redirects")

    def drop(self, key: tuple[str, str]) -> None:
        """Close this thread's connection to a host: it may hold the rest of an answer."""
        connection = self._mine().pop(key, None)
        if connection is not None:
            connection.close()
            with self._lock:
                self._all.discard(connection)

    def interrupt(self) -> None:
        """Let reads of all threads end now. To close a connection under a thread that reads would confuse it."""
        with self._lock:
            sockets = list(self._sockets)
        for each in sockets:
            with suppress(OSError):
                each.shutdown(SHUT_RDWR)

    def close(self) -> None:
        """Close all."""
        with self._lock:
            for connection in self._all:
                connection.close()
            self._all.clear()

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> tuple[HTTPResponse, tuple[str, str]]:
        parts = urlsplit(url)
        key = (parts.scheme, parts.netloc)
        connection, through = self._connection(parts, key)
        target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        proxied = {} if not through or parts.scheme == "https" else _proxy_headers(through)
        try:
            connection.request(
                method,
                f"http://{parts.netloc}{target}" if through and parts.scheme == "http" else target,
                body,
                {"User-Agent": f"quantkit/{__version__}", "Accept-Encoding": "identity", **proxied, **headers},
            )
            with self._lock:
                self._sockets.add(connection.sock)
            return connection.getresponse(), key
        except BaseException:
            self.drop(key)
            raise

    def _connection(self, parts: SplitResult, key: tuple[str, str]) -> tuple[HTTPConnection, str]:
        """This thread's connection, and the proxy that it goes through, "" if none."""
        host = parts.hostname
        if parts.scheme not in ("http", "https") or not host:
            raise BadAnswer("an address without a host")
        proxy = "" if proxy_bypass(host) else getproxies().get(parts.scheme, "")
        found = self._mine().get(key)
        if found is None:
            found = self._opened(parts, host, proxy)
            self._mine()[key] = found
            with self._lock:
                self._all.add(found)
        return found, proxy

    def _opened(self, parts: SplitResult, host: str, proxy: str) -> HTTPConnection:
        via = urlsplit(proxy) if proxy else parts
        to, port = via.hostname or host, via.port
        if parts.scheme == "http":
            return HTTPConnection(to, port, timeout=self._timeout)
        made = HTTPSConnection(to, port, timeout=self._timeout, context=self._tls)
        if proxy:
            made.set_tunnel(host, parts.port, _proxy_headers(proxy))
        return made

    def _mine(self) -> dict[tuple[str, str], HTTPConnection]:
        if not hasattr(self._own, "open"):
            self._own.open = {}
        return self._own.open


def bare_etag(value: str | None) -> str:
    """An ETag without W/ and quotation marks, "" for none."""
    return (value or "").removeprefix("W/").strip('"')


def basic(user: str | None, password: str | None) -> str:
    """The value of a header that tells who asks."""
    return "Basic " + base64.b64encode(f"{unquote(user or '')}:{unquote(password or '')}".encode()).decode()


def _proxy_headers(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    return {"Proxy-Authorization": basic(parts.username, parts.password)} if parts.username else {}


def _redirected(url: str, target: str, headers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Where an answer points to, and what may be sent there: who asks is told only to the server that was named."""
    found, before = urlsplit(urljoin(url, target)), urlsplit(url)
    if before.scheme == "https" and found.scheme != "https":
        raise BadAnswer("a redirect away from https")
    same = (found.scheme, found.netloc) == (before.scheme, before.netloc)
    kept = {name: value for name, value in headers.items() if same or name.lower() != "authorization"}
    return found.geturl(), kept
