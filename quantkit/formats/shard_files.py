"""Open shards, few at a time, and exact ranged reads into tensors.

No mmap: pages read here never count as memory of the process. V3 has 163 shards and the usual limit is 1,024
descriptors for everything, so few stay open; the one idle for longest is closed first. Several threads may read at
once: `os.preadv` carries its own offset.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import open_regular

if TYPE_CHECKING:
    from torch import Tensor

MAX_READ = 1 << 30
"""Bytes per system call: Linux moves at most 2 GiB - 4 KiB in one."""


@dataclass(slots=True)
class _OpenFile:
    fd: int
    users: int = 0


class ShardFiles:
    """A pool of read-only file descriptors. An open resource: `close` it, or use it in ``with`` through its owner."""

    def __init__(self, directory: Path, sizes: dict[str, int], limit: int = 64) -> None:
        """``sizes``: size of each shard when its header was read; a file that has another size by now is refused.

        At most ``limit`` descriptors stay open while idle.
        """
        self._directory = directory
        self._sizes = sizes
        self._limit = limit
        self._lock = threading.Lock()
        self._open: dict[str, _OpenFile] = {}

    @contextmanager
    def borrow(self, file: str) -> Generator[int, None, None]:
        """A descriptor of ``file`` that stays valid inside the ``with`` block, whatever other threads open."""
        with self._lock:
            entry = self._open.pop(file, None) or _OpenFile(self._open_unchanged(file))
            self._open[file] = entry  # re-inserted last: a dict keeps the order of use
            entry.users += 1
            self._close_idle()
        try:
            yield entry.fd
        finally:
            with self._lock:
                entry.users -= 1

    def close(self) -> None:
        """Close every descriptor. Reading afterwards opens them again."""
        with self._lock:
            for entry in self._open.values():
                os.close(entry.fd)
            self._open.clear()

    def __del__(self) -> None:
        self.close()

    def _open_unchanged(self, file: str) -> int:
        fd, size = open_regular(self._directory / file)
        if size != self._sizes[file]:
            os.close(fd)
            raise SourceError(
                f"{self._directory / file}: has {size:,} bytes, but {self._sizes[file]:,} when it was opened.",
                hint="Do not change a checkpoint while it is read.",
            )
        return fd

    def _close_idle(self) -> None:
        excess = len(self._open) - self._limit
        if excess <= 0:
            return
        idle = [file for file, entry in self._open.items() if entry.users == 0]
        for file in idle[:excess]:
            os.close(self._open.pop(file).fd)


def read_into(fd: int, tensor: Tensor, start: int, where: str) -> None:
    """Fill the contiguous CPU ``tensor`` with the file's bytes from ``start``.

    Raises `SourceError`, which begins with ``where``, if the file ends early or cannot be read.
    """
    assert tensor.is_contiguous(), where
    assert tensor.device.type == "cpu", where
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes:
        # A view of the tensor's own memory without numpy; the tensor outlives it because the caller holds it.
        read_buffer(fd, memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B"), start, where)


def read_buffer(fd: int, buffer: memoryview, start: int, where: str) -> None:
    """Fill the writable ``buffer`` (of bytes) with the file's bytes from ``start``. Raises as `read_into` does."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done : done + MAX_READ]], start + done)
        except OSError as error:
            raise SourceError(f"{where}: cannot be read ({error.strerror}).") from error
        if count == 0:
            raise SourceError(
                f"{where}: the file ends {len(buffer) - done:,} bytes too early.", hint="Fetch the file again."
            )
        done += count


def advise_willneed(fd: int, start: int, nbytes: int) -> None:
    """Ask the operating system to read a range ahead. Does nothing where it cannot be asked (macOS)."""
    if hasattr(os, "posix_fadvise"):
        # It is advice: a file system that cannot take it still reads correctly.
        with suppress(OSError):
            os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_WILLNEED)
