"""Open shards, few at a time, and exact ranged reads into tensors.

No mmap: pages read here never count as memory of the process. V3 has 163 shards and the usual limit is 1,024
descriptors for everything, so few stay open; the one idle for longest is closed first. Several threads may read at
once: `os.preadv` carries its own offset.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import SourceError
from quantkit.formats.storage import LOCAL, RangedFile, Storage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class _OpenFile:
    file: RangedFile
    users: int = 0


class ShardFiles:
    """A pool of open files. An open resource: `close` it, or use it in ``with`` through its owner."""

    def __init__(self, directory: Path, sizes: dict[str, int], limit: int = 64, storage: Storage = LOCAL) -> None:
        """``sizes``: size of each shard when its header was read; a file that has another size by now is refused.

        At most ``limit`` stay open while idle.
        """
        self._directory = directory
        self._sizes = sizes
        self._limit = limit
        self._storage = storage
        self._lock = threading.Lock()
        self._open: dict[str, _OpenFile] = {}

    @contextmanager
    def borrow(self, file: str) -> Generator[RangedFile, None, None]:
        """The open ``file``, which stays valid inside the ``with`` block, whatever other threads open."""
        with self._lock:
            entry = self._open.pop(file, None) or _OpenFile(self._open_unchanged(file))
            self._open[file] = entry  # re-inserted last: a dict keeps the order of use
            entry.users += 1
            self._close_idle()
        try:
            yield entry.file
        finally:
            with self._lock:
                entry.users -= 1

    def close(self) -> None:
        """Close every file. Reading afterwards opens them again."""
        with self._lock:
            for entry in self._open.values():
                entry.file.close()
            self._open.clear()

    def __del__(self) -> None:
        self.close()

    def _open_unchanged(self, file: str) -> RangedFile:
        opened = self._storage.open(self._directory / file)
        if opened.size != self._sizes[file]:
            opened.close()
            raise SourceError(
                f"{self._directory / file}: has {opened.size:,} bytes, but {self._sizes[file]:,} when it was opened.",
                hint="Do not change a checkpoint while it is read.",
            )
        return opened

    def _close_idle(self) -> None:
        excess = len(self._open) - self._limit
        if excess <= 0:
            return
        idle = [file for file, entry in self._open.items() if entry.users == 0]
        for file in idle[:excess]:
            self._open.pop(file).file.close()


def read_into(file: RangedFile, tensor: Tensor, start: int, where: str) -> None:
    """Fill the contiguous CPU ``tensor`` with the file's bytes from ``start``.

    Raises `SourceError`, which begins with ``where``, if the file ends early or cannot be read.
    """
    assert tensor.is_contiguous(), where
    assert tensor.device.type == "cpu", where
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes:
        # A view of the tensor's own memory without numpy; the tensor outlives it because the caller holds it.
        file.fill(memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B"), start, where)
