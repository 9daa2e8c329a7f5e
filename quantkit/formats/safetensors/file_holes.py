"""Parts of shards that were never written: a download into a file of full size leaves them where a piece is missing.

The file system knows them (Linux, macOS and most of their file systems), so nothing is read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import ShardHeader, StoredTensor, printable
from quantkit.formats.storage import LOCAL, Storage
from quantkit.tensors import DTYPES


def file_holes(
    directory: Path, headers: Iterable[ShardHeader], least: Mapping[str, int], storage: Storage = LOCAL
) -> tuple[str, ...]:
    """A line for each shard of which ``least[name]`` weights in a row of some tensor, or more, were never written.
    Tensors that are not in ``least`` may be so."""
    lines = (_hole(directory / header.file, header, least, storage) for header in headers)
    return tuple(line for line in lines if line is not None)


def _hole(path: Path, header: ShardHeader, least: Mapping[str, int], storage: Storage) -> str | None:
    tensors = sorted((tensor for tensor in header.tensors.values() if tensor.info.nbytes), key=lambda one: one.start)
    starts = [tensor.start for tensor in tensors]
    try:
        with closing(storage.open(path)) as file:
            for start, stop in file.unwritten():
                for tensor in tensors[max(0, bisect_right(starts, start) - 1) : bisect_right(starts, stop - 1)]:
                    missing = min(stop, tensor.stop) - max(start, tensor.start)
                    if missing >= least.get(tensor.info.name, file.size) * DTYPES[tensor.info.dtype][0]:
                        return _line(path, tensor, missing)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}).") from error
    return None


def _line(path: Path, tensor: StoredTensor, missing: int) -> str:
    return (
        f"{path}: {printable(tensor.info.name)}: {missing:,} of its {tensor.info.nbytes:,} bytes were never written, "
        "they read as zeros."
    )
