"""Pieces of remote files on the disk, within a bound: the oldest that were read go first.

    CACHE/pieces-0/<identity of the file>/<start>-<stop>-<crc32>     (hexadecimal)

A piece gets its name by a rename when it is whole, and its CRC-32 is looked at before a later process trusts it: after
a crash or on a bad disk it is fetched again. The identity holds the ETag, so another version of a file is another file.
Each process has a folder for itself (pieces-0, pieces-1, ...), under a lock; what ended processes left in any of them
counts against the bound and goes before what this one fetched.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import threading
import zlib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

from quantkit.errors import OutputError
from quantkit.formats.preallocated import disk_errors
from quantkit.formats.sizes import short_size

_NAME = re.compile(r"([0-9a-f]{1,16})-([0-9a-f]{1,16})-([0-9a-f]{8})", re.ASCII)


class FilePiece(NamedTuple):
    """Bytes ``[start, stop)`` of the file of this ``identity``."""

    identity: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Of it."""
        return self.stop - self.start


@dataclass(slots=True)
class _Stored:
    path: Path
    crc32: int
    trusted: bool
    put_at: int
    """Bytes that had been put, its own among them."""
    used: bool


class Pieces:
    """An open resource: `close` gives the folder to the next process. Thread-safe."""

    def __init__(self, folder: Path, bound: int) -> None:
        """Take the first free folder of pieces in ``folder``, and look at what is there. Raises `OutputError` if it
        cannot be made or locked, or its disk has no room for the bound."""
        self.bound = bound
        self._lock = threading.Lock()
        self._stored: OrderedDict[FilePiece, _Stored] = OrderedDict()
        self._by_file: dict[str, set[FilePiece]] = {}
        self._strange: OrderedDict[Path, int] = OrderedDict()
        self._bytes = self._reserved = self._put = 0
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.folder, self._fd = _own(folder)
            try:
                self._look(folder)
                self._trim()
            except BaseException:
                os.close(self._fd)
                raise
        self._check_disk()

    @property
    def nbytes(self) -> int:
        """On the disk, and about to be."""
        with self._lock:
            return self._bytes + self._reserved

    def has(self, piece: FilePiece) -> bool:
        """Whether it is here."""
        with self._lock:
            return piece in self._stored

    def covering(self, identity: str, start: int, stop: int) -> FilePiece | None:
        """A small piece that holds these bytes, None if there is none."""
        with self._lock:
            own = self._by_file.get(identity, ())
            return next((piece for piece in own if piece.start <= start and stop <= piece.stop), None)

    def read(self, piece: FilePiece, into: memoryview, offset: int) -> bool:
        """Fill ``into`` with the piece's bytes from ``offset``; False if it is not here, or was damaged."""
        with self._lock:
            found = self._stored.get(piece)
        if found is None:
            return False
        try:
            sound = self._read(found, piece, into, offset)
        except OSError:  # it went to make room, or its disk fails: it is fetched again
            sound = False
        with self._lock:
            if not sound:
                self._drop(piece)
            elif piece in self._stored:
                found.used = True
                self._stored.move_to_end(piece)
        return sound

    def reserve(self, nbytes: int, *, urgent: bool) -> bool:
        """Make room for a piece that is about to be fetched. Not ``urgent``: False unless pieces that were read make
        room; then nothing changes."""
        with self._lock:
            while self._bytes + self._reserved + nbytes > self.bound:
                if not self._evict(urgent=urgent):
                    if not urgent:
                        return False
                    break
            self._reserved += nbytes
            return True

    def release(self, nbytes: int) -> None:
        """Give room back that was reserved for a piece that did not come."""
        with self._lock:
            self._reserved -= nbytes

    def put(self, piece: FilePiece, data: bytearray) -> None:
        """Keep a piece for which room was reserved. Raises `OutputError` if the disk is full."""
        crc32 = zlib.crc32(data)
        folder = self.folder / piece.identity
        path = folder / f"{piece.start:x}-{piece.stop:x}-{crc32:08x}"
        try:
            with disk_errors(path):
                folder.mkdir(exist_ok=True)
                new = folder / f"{path.name}.new"
                new.write_bytes(data)
                new.replace(path)
        finally:
            self.release(piece.nbytes)
        with self._lock:
            self._drop(piece, unlink=False)
            self._by_file.setdefault(piece.identity, set()).add(piece)
            self._stored[piece] = _Stored(path, crc32, trusted=True, put_at=self._put + piece.nbytes, used=False)
            self._bytes += piece.nbytes
            self._put += piece.nbytes

    def close(self) -> None:
        """Let another process use what is here."""
        os.close(self._fd)

    def _read(self, found: _Stored, piece: FilePiece, into: memoryview, offset: int) -> bool:
        with found.path.open("rb", buffering=0) as file:
            if not found.trusted:
                data = file.read()
                found.trusted = len(data) == piece.nbytes and zlib.crc32(data) == found.crc32
                if not found.trusted:
                    return False
            return os.preadv(file.fileno(), [into], offset) == len(into)

    def _evict(self, *, urgent: bool) -> bool:
        """Remove one piece, the least needed. False if none may go."""
        if self._strange:
            path, nbytes = self._strange.popitem(last=False)
            path.unlink(missing_ok=True)
            self._bytes -= nbytes
            return True
        for piece, stored in self._stored.items():
            # What was announced and not read for as long as the whole cache takes to fill was announced in vain.
            if stored.used or self._put - stored.put_at >= self.bound:
                self._drop(piece)
                return True
        if urgent and self._stored:
            self._drop(next(reversed(self._stored)))  # the last announced is needed last
            return True
        return False

    def _drop(self, piece: FilePiece, *, unlink: bool = True) -> None:
        found = self._stored.pop(piece, None)
        if found is not None:
            self._bytes -= piece.nbytes
            self._by_file[piece.identity].discard(piece)
            if unlink:
                with suppress(OSError):
                    found.path.unlink(missing_ok=True)

    def _look(self, folder: Path) -> None:
        """Own pieces of an earlier process, oldest first, and those of others that have ended."""
        for path in sorted(self.folder.glob("*/*"), key=_modified):
            match, nbytes = _NAME.fullmatch(path.name), path.stat().st_size
            piece = FilePiece(path.parent.name, int(match[1], 16), int(match[2], 16)) if match else None
            if match is None or piece is None or piece.nbytes != nbytes:
                path.unlink(missing_ok=True)
                continue
            self._by_file.setdefault(piece.identity, set()).add(piece)
            self._stored[piece] = _Stored(path, int(match[3], 16), trusted=False, put_at=0, used=True)
            self._bytes += nbytes
        for other in sorted(folder.glob("pieces-*")):
            if other != self.folder and _is_free(other):
                for path in sorted(other.glob("*/*"), key=_modified):
                    self._strange[path] = path.stat().st_size
                    self._bytes += self._strange[path]

    def _trim(self) -> None:
        while self._bytes > self.bound and self._evict(urgent=True):
            pass

    def _check_disk(self) -> None:
        free, needed = shutil.disk_usage(self.folder).free, self.bound - self._bytes
        if free < needed:
            self.close()
            raise OutputError(
                f"{self.folder}: the cache may grow by {short_size(needed)}, its disk has {short_size(free)} free.",
                hint="Give a smaller --cache, or --cache-dir on another disk.",
            )


def _own(folder: Path) -> tuple[Path, int]:
    """The first folder of pieces that no living process has, and the descriptor of its lock."""
    for number in count():
        own = folder / f"pieces-{number}"
        own.mkdir(exist_ok=True)
        fd = os.open(own / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return own, fd
        os.close(fd)
    raise AssertionError


def _is_free(folder: Path) -> bool:
    """Whether no living process has the folder."""
    try:
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns
