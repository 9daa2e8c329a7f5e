"""A file of a checkpoint, wherever it lies: its size, what tells it from another, and exact reads at offsets.

`LocalFile` is a descriptor. `quantkit.formats.remote` has the other kind, whose bytes are fetched. What reads shards
asks a `Storage` for them and knows no more.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from quantkit.errors import SourceError

MAX_READ = 1 << 30
"""Bytes per system call: Linux moves at most 2 GiB - 4 KiB in one."""


class FileState(NamedTuple):
    """By what a changed file is known without reading it. In a journal a list of four numbers."""

    nbytes: int
    modified_ns: int
    """Of a fetched file 63 bits of a digest of its ETag; then the other two are 0."""
    changed_ns: int
    """Of content, owner, permissions or links: a time that no program can set."""
    inode: int


class RangedFile(Protocol):
    """An open file. Several threads may read at once."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def state(self) -> FileState:
        """By what a changed file is known."""
        ...

    def pread(self, nbytes: int, at: int) -> bytes:
        """Up to ``nbytes`` from byte ``at``, fewer only at the end. Raises `SourceError`."""
        ...

    def fill(self, buffer: memoryview, at: int, where: str) -> None:
        """Fill ``buffer`` (of bytes) from byte ``at``. Raises `SourceError`, which begins with ``where``, if the file
        ends early or cannot be read."""
        ...

    def will_need(self, at: int, nbytes: int) -> None:
        """This range will be read soon. Returns at once."""
        ...

    def unwritten(self) -> Iterator[tuple[int, int]]:
        """First and last + 1 byte of each part that was never written, as far as that is known without reading."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class Storage(Protocol):
    """Opens files by their path."""

    def open(self, path: Path) -> RangedFile:
        """Raises `SourceError` if it is missing, no regular file, or cannot be opened."""
        ...

    def origin(self, folder: Path) -> str:
        """Where a folder's files come from, without credentials; "" for a folder of this machine."""
        ...

    def check_room(self, folder: Path, nbytes: int, what: str) -> None:
        """Raise `PlanError` if files of ``folder`` are fetched, and there is no room for ``nbytes`` of them at once.
        ``what`` needs them."""
        ...


class LocalFile:
    """A descriptor of a regular file."""

    def __init__(self, path: Path) -> None:
        """Raises `SourceError` as `open_regular` does."""
        self._path = path
        self.fd, self._size = open_regular(path)

    @property
    def size(self) -> int:
        """Bytes, when it was opened."""
        return self._size

    @property
    def state(self) -> FileState:
        """By what a changed file is known."""
        found = os.fstat(self.fd)
        return FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    def pread(self, nbytes: int, at: int) -> bytes:
        """See `RangedFile`."""
        try:
            return os.pread(self.fd, nbytes, at)
        except OSError as error:
            raise SourceError(f"{self._path}: cannot be read ({error.strerror}).") from error

    def fill(self, buffer: memoryview, at: int, where: str) -> None:
        """See `RangedFile`."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.fd, [buffer[done : done + MAX_READ]], at + done)
            except OSError as error:
                raise SourceError(f"{where}: cannot be read ({error.strerror}).") from error
            if count == 0:
                raise ends_early(where, len(buffer) - done)
            done += count

    def will_need(self, at: int, nbytes: int) -> None:
        """Ask the operating system to read a range ahead. Does nothing where it cannot be asked (macOS)."""
        if hasattr(os, "posix_fadvise"):
            # It is advice: a file system that cannot take it still reads correctly.
            with suppress(OSError):
                os.posix_fadvise(self.fd, at, nbytes, os.POSIX_FADV_WILLNEED)

    def unwritten(self) -> Iterator[tuple[int, int]]:
        """Holes, where the file system knows them."""
        at = 0
        while hasattr(os, "SEEK_HOLE") and at < self._size:
            start = os.lseek(self.fd, at, os.SEEK_HOLE)
            if start >= self._size:
                return
            try:
                at = os.lseek(self.fd, start, os.SEEK_DATA)
            except OSError:  # there is none behind it
                at = self._size
            yield start, at

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


@dataclass(frozen=True, slots=True)
class LocalStorage:
    """Files of this machine."""

    def open(self, path: Path) -> LocalFile:
        """See `Storage`."""
        return LocalFile(path)

    def origin(self, folder: Path) -> str:
        """None."""
        del folder
        return ""

    def check_room(self, folder: Path, nbytes: int, what: str) -> None:
        """Nothing is fetched."""


LOCAL = LocalStorage()


def ends_early(where: str, missing: int) -> SourceError:
    """What is said of a file that ends too early."""
    return SourceError(f"{where}: the file ends {missing:,} bytes too early.", hint="Fetch the file again.")


def open_regular(path: Path) -> tuple[int, int]:
    """File descriptor and size of a regular file; symbolic links are followed, because the hub's cache is made of them.

    Raises `SourceError` for what is missing, a folder, a pipe, a loop of links, or not readable.
    """
    try:
        # Without O_NONBLOCK, a named pipe in the place of a shard would hang the process here.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as error:
        raise SourceError(
            f"{path}: no such file.", hint="A checkpoint needs config.json, its tokenizer files and all its shards."
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{printable(str(path))}: cannot be opened ({error}).") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise SourceError(f"{path}: is not a regular file.")
    return fd, status.st_size


def printable(text: str, limit: int = 200) -> str:
    """``text`` fit for a one-line message: escaped if it holds control characters, and cut to ``limit`` characters."""
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 20]}... ({len(text):,} characters)"
