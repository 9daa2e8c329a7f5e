"""The older form of imatrix files, .dat: one count of chunks for each weight, experts included.

i32 number of weights; for each: i32 length, name, i32 chunks, i32 number of values, float32 values (mean of squares
times chunks); then, optional, i32 chunks and the name of the text (i32 length first). Little-endian. Source:
common/imatrix-loader.cpp of llama.cpp.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import printable
from quantkit.formats.shard_files import ShardFiles
from quantkit.formats.storage import open_regular

MAX_WEIGHTS = 200_000
MAX_NAME_BYTES = 255


class DatImatrix:
    """Places of all values in a .dat file; `read` fetches those of one weight."""

    def __init__(self, path: Path) -> None:
        """Raises `SourceError` for what is no such file, or ends early."""
        self._path = path
        self._places: dict[str, tuple[int, int, int]] = {}  # offset, number of values, chunks
        self.datasets: tuple[str, ...] = ()
        self.chunk_count: int | None = None
        fd, self._size = open_regular(path)
        try:
            self._scan_tail(fd, self._scan(fd))
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({error.strerror}).") from error
        finally:
            os.close(fd)
        self.sizes = {name: (count, 1) for name, (_, count, _) in self._places.items()}
        self._files = ShardFiles(path.parent, {path.name: self._size})

    def read(self, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Values and the one count, one dimension each. A count of 0 stands for 1, as in llama-quantize."""
        offset, count, chunks = self._places[name]
        values = np.empty(count, "<f4")
        with self._files.borrow(self._path.name) as file:
            file.fill(values.view(np.uint8).data, offset, f"{self._path}: {printable(name)}")
        return values, np.array([chunks or 1], np.float32)

    def close(self) -> None:
        """Close the file."""
        self._files.close()

    def _scan(self, fd: int) -> int:
        """Fill in the places; returns where they end."""
        at = 4
        n_weights = self._i32(fd, 0)
        if not 1 <= n_weights <= MAX_WEIGHTS:
            self._refuse(f"its first number, {n_weights:,}, counts no weights")
        for number in range(1, n_weights + 1):
            # One read for all: a file of 200,000 weights would take a million.
            head = os.pread(fd, 4 + MAX_NAME_BYTES + 8, at)
            length = struct.unpack_from("<i", head)[0] if len(head) >= 4 else self._ends()
            if not 1 <= length <= MAX_NAME_BYTES:
                self._refuse(f"the name of weight {number} has a length of {length:,}")
            if len(head) < 12 + length:
                self._ends()
            name = self._name(head[4 : 4 + length])
            chunks, count = struct.unpack_from("<ii", head, 4 + length)
            at += 12 + length
            if chunks < 0 or count < 1:
                self._refuse(f"{name} has {count:,} values of {chunks:,} chunks")
            if 4 * count > self._size - at:
                missing = 4 * count - (self._size - at)
                raise SourceError(
                    f"{self._path}: truncated, {missing:,} bytes of {name} are missing.", hint="Fetch the file again."
                )
            if name in self._places:
                self._refuse(f"{name} occurs twice")
            self._places[name] = at, count, chunks
            at += 4 * count
        return at

    def _scan_tail(self, fd: int, at: int) -> None:
        if self._size - at < 8:
            return
        self.chunk_count, length = self._i32(fd, at), self._i32(fd, at + 4)
        if 0 < length <= self._size - at - 8:
            self.datasets = (os.pread(fd, min(length, 4096), at + 8).decode("utf-8", "replace"),)

    def _name(self, raw: bytes) -> str:
        text = raw.decode("utf-8", "replace")
        if not text.isprintable():
            self._refuse(f"a name, {printable(repr(raw))}, holds control characters")
        return text

    def _i32(self, fd: int, at: int) -> int:
        return struct.unpack("<i", self._take(fd, at, 4))[0]

    def _take(self, fd: int, at: int, nbytes: int) -> bytes:
        data = os.pread(fd, nbytes, at)
        return data if len(data) == nbytes else self._ends()

    def _ends(self) -> NoReturn:
        self._refuse(f"it ends at byte {self._size:,}, inside its table")

    def _refuse(self, problem: str) -> NoReturn:
        raise SourceError(f"{self._path}: is no imatrix, neither a GGUF nor a sound .dat file: {problem}.")
