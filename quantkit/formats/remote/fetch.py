"""One range of a remote file, exactly: tried again with growing pauses, timed, held against the file's size and ETag.

What came before a connection broke is kept, and the rest asked for. Nothing that was fetched is handed on unless every
answer spoke of the same version of the file.
"""

from __future__ import annotations

import random
import re
import ssl
import threading
import time
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse

from quantkit.errors import SourceError
from quantkit.formats.remote.connections import Answer, Connections
from quantkit.formats.remote.files import Address, RemoteFile

_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})", re.ASCII)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_ABSENT = (403, 404, 410)
_PIECE = 1 << 20
_FEW = 3
"""Answers without the range after which a server counts as one that sends none."""
PERMISSION = "Check the address and who you are to it: HF_TOKEN, ~/.aws, GOOGLE_APPLICATION_CREDENTIALS."
CHANGED = "It is another version now: begin anew with --restart, or name a revision that stays."
AGAIN = "Give the same command again: it goes on where it stopped."


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for. Seconds: ``timeout`` without a byte, ``first_pause`` before the second try (each
    later one up to twice as long, at most ``longest_pause``, or ``longest_asked`` where the server asks for a pause);
    ``tries`` in a row that bring nothing; ``slowest``: bytes
    a second below which an answer counts as stalled."""

    timeout: float = 30.0
    tries: int = 8
    first_pause: float = 0.5
    longest_pause: float = 30.0
    longest_asked: float = 300.0
    slowest: int = 16_384


class Fetcher:
    """Fetches ranges over connections that stay open. Thread-safe. `close` it."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._connections = Connections(patience.timeout)
        self._ended = threading.Event()
        self._moved: dict[str, Address] = {}
        """By identity where a hub sent us on to. A signed address serves for a while, and hubs count requests."""

    def fetch(self, file: RemoteFile, start: int, stop: int) -> bytearray:
        """Bytes ``[start, stop)``. Raises `SourceError` in one line: refused, gone, changed, or not to be had."""
        data, done, failures = bytearray(stop - start), 0, 0
        view, address = memoryview(data), self._moved.get(file.identity) or file.address()
        while done < len(data):
            attempt = self._attempt(file, address, start + done, stop, view[done:])
            done += attempt.nbytes
            if done == len(data):
                break
            failures = 1 if attempt.nbytes else failures + 1
            if attempt.refused:
                address = self._renewed(file, address, failures)
            if failures >= self._patience.tries or self._ended.is_set():
                raise SourceError(f"{file.shown}: {attempt.trouble}, {failures} times in a row.", hint=AGAIN)
            self._pause(failures, attempt.pause)
        return data

    def probe(self, shown: str, address: Address) -> tuple[int, str] | None:
        """Size and ETag of what lies at an address, None if nothing does. Raises `SourceError`, also for a server that
        sends no ranges."""
        trouble = ""
        for failures in range(1, self._patience.tries + 1):
            try:
                answer = self._connections.ask("GET", address, {"Range": "bytes=0-0"})
            except (OSError, HTTPException) as error:
                trouble = _said(error)
            else:
                status = answer.response.status
                found = _CONTENT_RANGE.fullmatch(answer.response.getheader("Content-Range", ""))
                if status == 206:
                    answer.response.read(2)
                answer.close(whole=status == 206 and answer.response.isclosed())
                if status in _ABSENT:
                    return None
                if found and status in (206, 416):
                    return int(found[3]), answer.etag
                trouble = f"the server answers {status}" if status != 200 else "its server sends no ranges"
                if status not in (*_PASSING, 200) or (status == 200 and failures == _FEW):
                    break
            self._pause(failures, 0.0)
        raise SourceError(f"{shown}: {trouble}.", hint=PERMISSION)

    def stop(self) -> None:
        """End what is under way in other threads: it fails."""
        self._ended.set()
        self._connections.interrupt()

    def close(self) -> None:
        """Close the connections, when no thread fetches any more."""
        self._connections.close()

    def _attempt(self, file: RemoteFile, address: Address, start: int, stop: int, view: memoryview) -> _Attempt:
        try:
            answer = self._connections.ask("GET", address, {"Range": f"bytes={start}-{stop - 1}"})
        except ssl.SSLCertVerificationError as error:
            raise SourceError(f"{file.shown}: {_said(error)}.", hint="See SSL_CERT_FILE.") from None
        except (OSError, HTTPException) as error:
            return _Attempt(trouble=_said(error))
        attempt = _judged(file, answer, start, stop)
        if attempt.trouble:
            answer.close(whole=False)
            return attempt
        if file.linked and answer.moved:
            self._moved[file.identity] = Address(answer.moved)
        nbytes, trouble = _received(answer.response, view, self._patience)
        answer.close(whole=nbytes == len(view))
        return _Attempt(nbytes, trouble)

    def _renewed(self, file: RemoteFile, address: Address, failures: int) -> Address:
        """Another address where the signature of the first ran out."""
        found = file.address()
        if self._moved.pop(file.identity, None) == address:
            return found
        if found == address or failures > 1:
            raise SourceError(f"{file.shown}: no permission to read it.", hint=PERMISSION)
        return found

    def _pause(self, failures: int, least: float) -> None:
        """Full jitter: many readers that failed together must not come back together."""
        longest = min(self._patience.longest_pause, self._patience.first_pause * 2**failures)
        # A server may ask for a pause, though not for a long one.
        self._ended.wait(max(random.uniform(0, longest), min(least, self._patience.longest_asked)))


@dataclass(frozen=True, slots=True)
class _Attempt:
    """``nbytes`` came; ``trouble``: why no more, "" if the answer is sound; ``pause``: seconds that the server asks
    for; ``refused``: it does not know who asks."""

    nbytes: int = 0
    trouble: str = ""
    pause: float = 0.0
    refused: bool = False


def _judged(file: RemoteFile, answer: Answer, start: int, stop: int) -> _Attempt:
    """What the head of an answer says. Raises `SourceError` for what no further try would change."""
    status, headers = answer.response.status, answer.response
    if status in (401, 403):
        return _Attempt(trouble=f"the server answers {status}", refused=True)
    if status in _PASSING:
        wait = headers.getheader("Retry-After", "")
        return _Attempt(trouble=f"the server answers {status}", pause=float(wait) if wait.isdecimal() else 0.0)
    if status in (404, 410, 412, 416):
        raise SourceError(f"{file.shown}: changed or went away while it was read ({status}).", hint=CHANGED)
    if status not in (200, 206):
        raise SourceError(f"{file.shown}: the server answers {status}.", hint=PERMISSION)
    said = answer.linked if file.linked else answer.etag
    if file.etag and said and said != file.etag:
        raise SourceError(f"{file.shown}: changed while it was read (its ETag is another).", hint=CHANGED)
    if headers.getheader("Content-Encoding", "identity") != "identity":
        return _Attempt(trouble="the server packs its answer")
    if status == 200:
        whole = start == 0 and headers.getheader("Content-Length") == str(file.nbytes)
        return _Attempt() if whole and stop == file.nbytes else _Attempt(trouble="the server ignores the range")
    found = _CONTENT_RANGE.fullmatch(headers.getheader("Content-Range", ""))
    if found is None or found[1] is None or int(found[1]) != start or int(found[2]) >= stop:
        return _Attempt(trouble="the server sends another range")
    if int(found[3]) != file.nbytes:
        raise SourceError(f"{file.shown}: has {int(found[3]):,} bytes, had {file.nbytes:,}.", hint=CHANGED)
    return _Attempt()


def _received(response: HTTPResponse, view: memoryview, patience: Patience) -> tuple[int, str]:
    """How many bytes of the body came, and why no more."""
    done, begun = 0, time.monotonic()
    try:
        while done < len(view):
            count = response.readinto(view[done : done + _PIECE])
            if not count:
                return done, "the connection ended early"
            done += count
            if time.monotonic() - begun > patience.timeout + done / patience.slowest:
                return done, "the server sends too slowly"
    except (OSError, HTTPException) as error:
        return done, _said(error)
    return done, ""


def _said(error: Exception) -> str:
    """A failure in some words. Messages of libraries may quote an address with its signature."""
    if isinstance(error, TimeoutError):
        return "the server was silent for too long"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted ({error.verify_message})"
    if isinstance(error, OSError):
        return f"no connection ({error.strerror or type(error).__name__})"
    return f"no sound answer ({type(error).__name__})"
