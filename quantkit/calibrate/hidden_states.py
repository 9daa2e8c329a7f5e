"""Rows of activations, in memory (of the processor or of a GPU) or in a file: (n_rows, length, width) float32 or
bfloat16, addressed by row or by token.

A file is read and written with pread/pwrite, never mapped: its pages belong to the page cache and not to this process,
so a store on disk costs the process nothing but the rows in hand. Both kinds give the same numbers.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quantkit.errors import OutputError
from quantkit.formats.preallocated import disk_errors
from quantkit.kernels.backend import Backend, backend_of

CPU = torch.device("cpu")
_SAVED_BYTES = 64 * 2**20
"""What leaves a GPU at once."""


class RowStore(Protocol):
    """Activations of ``n_rows`` sequences of ``length`` tokens. Token t of row r has the number ``r * length + t``.

    What is read lies on ``device``; what is given may lie anywhere.
    """

    n_rows: int
    length: int
    width: int
    device: torch.device
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """What it takes now."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) -> (rows, length, width), a copy or a view that must not be written."""
        ...

    def write(self, start: int, rows: Tensor) -> None:
        """Replace rows from ``start`` on. rows (n, length, width) or (n * length, width) of any float dtype."""
        ...

    def gather(self, tokens: Tensor) -> Tensor:
        """Tokens (n,) int64 in rising order -> (n, width)."""
        ...

    def add(self, tokens: Tensor, values: Tensor, shares: Tensor) -> None:
        """Add values (n, width), times shares (n,) float32, onto distinct tokens (n,) int64 in rising order."""
        ...

    def save(self, path: Path, rows: tuple[int, int] | None = None) -> None:
        """Write rows [first, stop), or all, to ``path``, and their CRC-32 behind them, synced to disk."""
        ...

    def close(self) -> None:
        """Free the memory or the file."""
        ...


class MemoryRows:
    """A store in memory."""

    @classmethod
    def of(cls, data: Tensor) -> MemoryRows:
        """A store that is ``data`` (n, width): rows of one token each."""
        store = cls(0, 1, data.shape[1], data.device, data.dtype)
        store.n_rows, store._data = len(data), data
        return store

    def __init__(
        self, n_rows: int, length: int, width: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32
    ) -> None:
        self.n_rows, self.length, self.width, self.device, self.dtype = n_rows, length, width, device, dtype
        self._data = torch.zeros(n_rows * length, width, device=device, dtype=dtype)

    @property
    def nbytes(self) -> int:
        """See `RowStore.nbytes`."""
        return self._data.nbytes

    def read(self, start: int, stop: int) -> Tensor:
        """See `RowStore.read`."""
        return self._data[start * self.length : stop * self.length].view(stop - start, self.length, self.width)

    def write(self, start: int, rows: Tensor) -> None:
        """See `RowStore.write`."""
        flat = rows.reshape(-1, self.width)
        self._data[start * self.length : start * self.length + len(flat)] = flat

    def gather(self, tokens: Tensor) -> Tensor:
        """See `RowStore.gather`."""
        return self._data[tokens.to(self.device)]

    def add(self, tokens: Tensor, values: Tensor, shares: Tensor) -> None:
        """See `RowStore.add`."""
        tokens, values, shares = (part.to(self.device) for part in (tokens, values, shares))
        if backend_of(self._data) is Backend.TRITON:
            from quantkit.kernels.triton.scatter import add_rows_

            add_rows_(self._data, tokens, values, shares)
        else:
            self._data.index_add_(0, tokens, (values * shares.unsqueeze(-1)).to(self.dtype))

    def save(self, path: Path, rows: tuple[int, int] | None = None) -> None:
        """See `RowStore.save`."""
        step = max(1, _SAVED_BYTES // (self.dtype.itemsize * self.width))
        first, stop = (row * self.length for row in rows or (0, self.n_rows))
        with disk_errors(path), path.open("wb") as file:
            parts = (self._data[start : min(start + step, stop)].cpu() for start in range(first, stop, step))
            _save(file.fileno(), parts)

    def close(self) -> None:
        """See `RowStore.close`."""
        self._data = torch.empty(0, self.width, device=self.device, dtype=self.dtype)


class FileRows:
    """A store in a file that has no name any more: however the process ends, its space is free again."""

    def __init__(self, path: Path, n_rows: int, length: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        self.n_rows, self.length, self.width, self.device, self.dtype = n_rows, length, width, CPU, dtype
        self._path = path
        self._row_bytes = length * width * dtype.itemsize
        with disk_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            path.unlink()
            os.ftruncate(self._fd, n_rows * self._row_bytes)

    @property
    def nbytes(self) -> int:
        """No memory."""
        return 0

    def read(self, start: int, stop: int) -> Tensor:
        """See `RowStore.read`."""
        data = torch.empty(stop - start, self.length, self.width, dtype=self.dtype)
        read_exactly(self._fd, _bytes_of(data), start * self._row_bytes)
        return data

    def write(self, start: int, rows: Tensor) -> None:
        """See `RowStore.write`."""
        with disk_errors(self._path):
            write_exactly(self._fd, _bytes_of(rows.to(CPU, self.dtype).contiguous()), start * self._row_bytes)

    def gather(self, tokens: Tensor) -> Tensor:
        """See `RowStore.gather`."""
        data = torch.empty(len(tokens), self.width, dtype=self.dtype)
        self._each_run(tokens.cpu(), data, read_exactly)
        return data

    def add(self, tokens: Tensor, values: Tensor, shares: Tensor) -> None:
        """See `RowStore.add`."""
        total = self.gather(tokens).add_((values * shares.to(values.device).unsqueeze(-1)).cpu())
        with disk_errors(self._path):
            self._each_run(tokens.cpu(), total, write_exactly)

    def _each_run(self, tokens: Tensor, rows: Tensor, move: Callable[[int, memoryview, int], None]) -> None:
        """Read or write ``rows`` (n, width) of tokens (n,) in rising order, consecutive tokens at once."""
        view, nbytes = _bytes_of(rows), self.width * self.dtype.itemsize
        for first, stop, token in _runs(tokens):
            move(self._fd, view[first * nbytes : stop * nbytes], token * nbytes)

    def save(self, path: Path, rows: tuple[int, int] | None = None) -> None:
        """See `RowStore.save`."""
        with disk_errors(path), path.open("wb") as file:
            _save(file.fileno(), (self.read(start, start + 1) for start in range(*(rows or (0, self.n_rows)))))

    def close(self) -> None:
        """See `RowStore.close`."""
        os.close(self._fd)


def _runs(tokens: Tensor) -> Iterator[tuple[int, int, int]]:
    """Consecutive tokens: positions [first, stop) of ``tokens``, from token number ``token`` on."""
    if not len(tokens):
        return
    breaks = (tokens.diff() != 1).nonzero().flatten().add_(1)
    starts = torch.cat([breaks.new_zeros(1), breaks])
    yield from zip(starts.tolist(), [*breaks.tolist(), len(tokens)], tokens[starts].tolist(), strict=True)


def _save(fd: int, parts: Iterable[Tensor]) -> None:
    crc, end = 0, 0
    for part in parts:
        data = _bytes_of(part)
        write_exactly(fd, data, end)
        crc, end = zlib.crc32(data, crc), end + len(data)
    write_exactly(fd, memoryview(crc.to_bytes(_CRC_BYTES, "little")), end)
    os.fsync(fd)


def load(path: Path, store: RowStore, rows: tuple[int, int] | None = None, chunk_rows: int = 1) -> None:
    """Fill rows [first, stop) of ``store``, or all, from a file that `RowStore.save` wrote. Raises `OutputError` if it
    is gone, has another size, or was damaged."""
    first, last = rows or (0, store.n_rows)
    row_bytes = store.length * store.width * 4
    end = (last - first) * row_bytes
    needed, crc = end + _CRC_BYTES, 0
    found = path.stat().st_size if path.exists() else 0
    if found != needed:
        raise OutputError(
            f"{path}: has {found:,} bytes, the hidden states of the unfinished job have {needed:,}.",
            hint="Begin anew with --restart.",
        )
    with disk_errors(path), path.open("rb") as file:
        for start in range(first, last, chunk_rows):
            stop = min(start + chunk_rows, last)
            data = torch.empty(stop - start, store.length, store.width)
            read_exactly(file.fileno(), _bytes_of(data), (start - first) * row_bytes)
            crc = zlib.crc32(_bytes_of(data), crc)
            store.write(start, data)
        expected = os.pread(file.fileno(), _CRC_BYTES, end)
    if expected != crc.to_bytes(_CRC_BYTES, "little"):
        raise OutputError(f"{path}: was damaged since it was saved.", hint="Begin anew with --restart.")


def read_exactly(fd: int, view: memoryview, offset: int) -> None:
    """Fill bytes from a file. Raises EOFError where the file ends early."""
    while view:
        count = os.preadv(fd, [view[:_IO_BYTES]], offset)
        if count == 0:
            raise EOFError(f"file ends {len(view)} bytes early")
        view, offset = view[count:], offset + count


def write_exactly(fd: int, view: memoryview, offset: int) -> None:
    """Write bytes to a file at ``offset``."""
    while view:
        count = os.pwrite(fd, view[:_IO_BYTES], offset)
        view, offset = view[count:], offset + count


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(torch.uint8).numpy().data.cast("B") if tensor.numel() else memoryview(b"")


_CRC_BYTES = 4
_IO_BYTES = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call
