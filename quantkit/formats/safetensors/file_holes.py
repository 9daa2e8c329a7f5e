"""Parts of shards that were never written: a download into a file of full size leaves them where a piece is missing.

The file system knows them (Linux, macOS and most of their file systems), so nothing is read.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import ShardHeader, StoredTensor, open_regular, printable
from quantkit.tensors import DTYPES


def file_holes(directory: Path, headers: Iterable[ShardHeader], least: Mapping[str, int]) -> tuple[str, ...]:
    """A line for each shard of which ``least[name]`` weights in a row of some tensor, or more, were never written.
    Tensors that are not in ``least`` may be so."""
    lines = (_hole(directory / header.file, header, least) for header in headers)
    return tuple(line for line in lines if line is not None)


def _hole(path: Path, header: ShardHeader, least: Mapping[str, int]) -> str | None:
    tensors = sorted((tensor for tensor in header.tensors.values() if tensor.info.nbytes), key=lambda one: one.start)
    starts = [tensor.start for tensor in tensors]
    fd, size = open_regular(path)
    try:
        for start, stop in _unwritten(fd, size):
            for tensor in tensors[max(0, bisect_right(starts, start) - 1) : bisect_right(starts, stop - 1)]:
                missing = min(stop, tensor.stop) - max(start, tensor.start)
                if missing >= least.get(tensor.info.name, size) * DTYPES[tensor.info.dtype][0]:
                    return _line(path, tensor, missing)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}).") from error
    finally:
        os.close(fd)
    return None


def _unwritten(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 byte of each part of an open file that the file system does not store."""
    at = 0
    while hasattr(os, "SEEK_HOLE") and at < size:
        start = os.lseek(fd, at, os.SEEK_HOLE)
        if start >= size:
            return
        try:
            at = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:  # there is none behind it
            at = size
        yield start, at


def _line(path: Path, tensor: StoredTensor, missing: int) -> str:
    return (
        f"{path}: {printable(tensor.info.name)}: {missing:,} of its {tensor.info.nbytes:,} bytes were never written, "
        "they read as zeros."
    )
