"""Shards that end in zeros: what an interrupted download leaves of a file that was created in full size."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from quantkit.formats.safetensors.header import ShardHeader, StoredTensor, printable
from quantkit.formats.storage import LOCAL, RangedFile, Storage

ZERO_ROWS = 0.01
"""Of a matrix's rows that may hold only zeros at the end of a file: vocabularies are padded."""
_PIECE = 2**20


def zero_tails(directory: Path, headers: Iterable[ShardHeader], storage: Storage = LOCAL) -> tuple[str, ...]:
    """A line for each shard whose last matrix ends in rows of zeros, more than 1 % of them. Reads no more than those
    rows. Vectors of zeros behind the matrix (biases that were never trained) say nothing by themselves."""
    lines = (_zero_tail(directory / header.file, header, storage) for header in headers)
    return tuple(line for line in lines if line is not None)


def _zero_tail(path: Path, header: ShardHeader, storage: Storage) -> str | None:
    with closing(storage.open(path)) as file:
        for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.start, reverse=True):
            if not tensor.info.nbytes:
                continue
            matrix = len(tensor.info.shape) > 1
            rows = tensor.info.shape[0] if matrix else 1
            suspicious = int(ZERO_ROWS * rows) + 1
            if not _only_zeros(file, tensor, suspicious * (tensor.info.nbytes // rows)):
                return None
            if matrix:
                return (
                    f"{path}: {printable(tensor.info.name)}: at least the last {suspicious:,} of {rows:,} rows hold "
                    "only zeros, up to the end of the file."
                )
    return None


def _only_zeros(file: RangedFile, tensor: StoredTensor, nbytes: int) -> bool:
    """Whether the last bytes of a tensor are all zero."""
    for at in range(tensor.stop - nbytes, tensor.stop, _PIECE):
        piece = file.pread(min(_PIECE, tensor.stop - at), at)
        if piece.count(0) != len(piece):
            return False
    return True
