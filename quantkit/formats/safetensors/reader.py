"""A folder of safetensors shards as a `TensorSource`: headers at open, bytes only in `read`, `read_rows` and `chunks`.

What enters is a folder with `model.safetensors.index.json`, or one `model.safetensors`, or shards alone. What leaves
is each tensor as it is stored (FP8 codes stay FP8: `fp8_source` decodes them). Every float tensor that leaves was
checked for NaN and infinity.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import (
    INDEX_NAME,
    ShardHeader,
    StoredTensor,
    printable,
    read_header,
    read_shard,
)
from quantkit.formats.safetensors.index import listed_shards, read_index, read_small
from quantkit.formats.shard_files import ShardFiles, read_into
from quantkit.formats.storage import LOCAL, FileState, Storage
from quantkit.tensors import DTYPES, TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["SafetensorsSource", "StoredTensor", "read_header", "read_index", "read_small", "require_finite"]

_SAMPLE_BYTES = 4096
_COMPARED_BYTES = 2**24
_FLOATS = {"F64", "F32", "F16", "BF16"}
# First 7-bit code that is not a number: e4m3 has NaN only at 0x7F; e5m2 has infinity at 0x7C and NaN above it.
_FIRST_NON_FINITE_CODE = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7C}


class SafetensorsSource:
    """Stored tensors of one folder. Reads are thread-safe; `close` (or ``with``) gives the file descriptors back.

    ``unlisted``: names that shards hold but the index does not list. They are not shown (a reader that follows the
    index would not see them either) and not an error (converters drop entries from an index without rewriting
    shards); the caller reports them.
    """

    def __init__(self, directory: Path | str, *, without: Container[str] = (), storage: Storage = LOCAL) -> None:
        """Read headers, no weights; none of the shards ``without``. Raises `SourceError` for a damaged, incomplete or
        hostile folder."""
        self.directory = Path(directory)
        self.storage = storage
        files, weight_map = listed_shards(self.directory)
        if weight_map is not None:
            weight_map = {name: file for name, file in weight_map.items() if file not in without}
        self._headers = [read_shard(self.directory / file, storage) for file in files if file not in without]
        everything = _merge(self.directory, self._headers)
        self._stored = everything if weight_map is None else _listed(self.directory, weight_map, everything)
        self.unlisted = tuple(name for name in everything if name not in self._stored)
        self._infos = {name: stored.info for name, stored in self._stored.items()}
        sizes = {header.file: header.size for header in self._headers}
        self._shard_files = ShardFiles(self.directory, sizes, storage=storage)

    @property
    def headers(self) -> Sequence[ShardHeader]:
        """What each shard says about itself."""
        return self._headers

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, as stored, in file order."""
        return self._infos

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the shards, sorted."""
        return tuple(sorted(header.file for header in self._headers))

    def share(self, copies: Mapping[str, str]) -> None:
        """Show tensors under further names: name -> a tensor that is here. Nothing is read."""
        for name, original in copies.items():
            stored = self._stored[original]
            info = TensorInfo(name, stored.info.shape, stored.info.dtype)
            self._stored[name] = replace(stored, info=info)
            self._infos[name] = info

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors have the same dtype, shape and bytes. Reads them in pieces until they differ."""
        first, second = self.stored(name), self.stored(other)
        if (first.info.shape, first.info.dtype) != (second.info.shape, second.info.dtype):
            return False
        with self._shard_files.borrow(first.file) as one, self._shard_files.borrow(second.file) as two:
            for done in range(0, first.info.nbytes, _COMPARED_BYTES):
                count = min(_COMPARED_BYTES, first.info.nbytes - done)
                if one.pread(count, first.start + done) != two.pread(count, second.start + done):
                    return False
        return True

    def stored(self, name: str) -> StoredTensor:
        """Shard and byte range of one tensor. Raises `SourceError` if there is no such tensor."""
        try:
            return self._stored[name]
        except KeyError as error:
            raise SourceError(f"{self.directory}: holds no tensor {printable(name)}.") from error

    def path_of(self, name: str) -> Path:
        """The shard that holds a tensor."""
        return self.directory / self.stored(name).file

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or rows ``[start, stop)`` of its first dimension, as stored, on the CPU.

        Raises `SourceError` for NaN and infinity, and if the file shrank meanwhile.
        """
        stored = self.stored(name)
        tensor = self._read_range(stored, rows or (0, _n_rows(stored.info)))
        if rows is None:
            tensor = tensor.reshape(stored.info.shape)
        require_finite(name, str(self.directory / stored.file), tensor)
        return tensor

    def read_unchecked(self, name: str, *, pinned: bool) -> Tensor:
        """The tensor as stored, on the CPU, its values not looked at: for who checks them elsewhere. ``pinned``: in
        page-locked memory, from where a GPU takes it at full speed.

        Raises `SourceError` if the file shrank meanwhile.
        """
        stored = self.stored(name)
        tensor = self._read_range(stored, (0, _n_rows(stored.info)), pinned=pinned)
        return tensor.reshape(stored.info.shape)

    def read_rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Rows of dimension 0 in the given order, repeats allowed: an embedding lookup that reads only these rows.

        Neighbouring rows are read together. Takes memory for the result, and once more for the distinct rows if
        ``indices`` do not rise. Raises `SourceError` for an index outside the tensor.
        """
        import torch

        stored = self.stored(name)
        where = f"{self.path_of(name)}: {name}"
        distinct = sorted(set(indices))
        if distinct and not 0 <= distinct[0] <= distinct[-1] < _n_rows(stored.info):
            asked = distinct[0] if distinct[0] < 0 else distinct[-1]
            raise SourceError(f"{where}: has {_n_rows(stored.info):,} rows; row {asked:,} was asked for.")
        table = torch.empty((len(distinct), *stored.info.shape[1:]), dtype=_torch_dtype(stored.info))
        with self._shard_files.borrow(stored.file) as shard:
            for at, first, n_rows in _runs(distinct):
                read_into(shard, table[at : at + n_rows], stored.start + first * _row_bytes(stored.info), where)
        require_finite(name, str(self.path_of(name)), table)
        if distinct == list(indices):
            return table
        place = {row: at for at, row in enumerate(distinct)}
        return table[torch.tensor([place[row] for row in indices], dtype=torch.int64)]

    def chunks(self, name: str, max_bytes: int) -> Iterator[Tensor]:
        """The tensor in consecutive pieces along dimension 0, each at most ``max_bytes`` but at least one row.

        Concatenated along dimension 0 they are what `read` gives. A tensor without dimensions comes as one piece of
        shape (1,); one without elements as one piece.
        """
        for rows in row_ranges(self.stored(name).info, max_bytes):
            yield self.read(name, rows)

    def prefetch(self, names: list[str]) -> None:
        """Ask the operating system, or the cache of a remote source, to read these tensors ahead. Returns at once."""
        by_file: dict[str, list[StoredTensor]] = {}
        for stored in map(self.stored, names):
            by_file.setdefault(stored.file, []).append(stored)
        for file, tensors in by_file.items():
            with self._shard_files.borrow(file) as shard:
                for start, stop in _joined(tensors):
                    shard.will_need(start, stop - start)

    def fingerprint(self) -> str:
        """sha256 (hex) that tells whether a resumed job still reads the same checkpoint; copying and touching keep it.

        Covers config, index, and of each shard its name, size, header and three samples of its data (a finetune of
        the same architecture has the same headers). It reads few weights: no proof against someone who edits single
        bytes.
        """
        digest = hashlib.sha256()
        for name in ("config.json", INDEX_NAME):
            path = self.directory / name
            digest.update(hashlib.sha256(read_small(path) if path.exists() else b"").digest())
        self._announce_samples()
        for header in sorted(self._headers, key=lambda header: header.file):
            digest.update(hashlib.sha256(f"{header.file}\0{header.size}".encode()).digest() + header.digest)
            with self._shard_files.borrow(header.file) as shard:
                for at in _samples(header):
                    digest.update(hashlib.sha256(shard.pread(_SAMPLE_BYTES, at)).digest())
        return digest.hexdigest()

    def states(self) -> Mapping[str, FileState]:
        """By the name of each shard what tells it from another, without reading it."""
        found: dict[str, FileState] = {}
        for file in self.files:
            with self._shard_files.borrow(file) as shard:
                found[file] = shard.state
        return found

    def _announce_samples(self) -> None:
        """Those of a remote source come together."""
        for header in self._headers:
            with self._shard_files.borrow(header.file) as shard:
                for at in _samples(header):
                    shard.will_need(at, min(_SAMPLE_BYTES, header.size - at))

    def close(self) -> None:
        """Give the file descriptors back. A later read opens them again."""
        self._shard_files.close()

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_range(self, stored: StoredTensor, rows: tuple[int, int], *, pinned: bool = False) -> Tensor:
        import torch

        start, stop = rows
        assert 0 <= start <= stop <= _n_rows(stored.info), f"{stored.info.name}: rows {rows} of {_n_rows(stored.info)}"
        shape = (stop - start, *stored.info.shape[1:])
        tensor = torch.empty(shape, dtype=_torch_dtype(stored.info), pin_memory=pinned)
        with self._shard_files.borrow(stored.file) as shard:
            where = f"{self.directory / stored.file}: {stored.info.name}"
            read_into(shard, tensor, stored.start + start * _row_bytes(stored.info), where)
        return tensor


def require_finite(name: str, file: str, tensor: Tensor) -> None:
    """Raise `SourceError` naming file and tensor if a float tensor (FP8 codes included) holds NaN or infinity.

    One pass without temporaries for the usual dtypes: a NaN reaches both minimum and maximum, an infinity one of them.
    """
    import torch

    if not tensor.numel():
        return
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        limit = _FIRST_NON_FINITE_CODE["F8_E4M3" if tensor.dtype == torch.float8_e4m3fn else "F8_E5M2"]
        bad = (tensor.view(torch.uint8) & 0x7F) >= limit
        if not bad.any():
            return
    elif tensor.dtype in [getattr(torch, DTYPES[dtype][1]) for dtype in _FLOATS]:
        lowest, highest = torch.aminmax(tensor)
        if torch.isfinite(lowest) and torch.isfinite(highest):
            return
        bad = ~torch.isfinite(tensor)
    else:
        return
    first = [int(index) for index in bad.nonzero()[0]]
    found = f"{int(bad.sum()):,} of {tensor.numel():,} values are NaN or infinite, the first at {first}"
    raise SourceError(
        f"{file}: {printable(name)}: {found}.",
        hint="Fetch the file again; if it is so at its origin, the model is broken.",
    )


def row_ranges(info: TensorInfo, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Consecutive ``[start, stop)`` that cover dimension 0, each at most ``max_bytes`` but at least one row."""
    n_rows = _n_rows(info)
    step = max(1, max_bytes // max(1, _row_bytes(info)))
    yield from ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))
    if not n_rows:
        yield (0, 0)


def _merge(directory: Path, headers: list[ShardHeader]) -> dict[str, StoredTensor]:
    merged: dict[str, StoredTensor] = {}
    for header in headers:
        for name, stored in header.tensors.items():
            if name in merged:
                both = f"{merged[name].file} and {header.file}"
                raise SourceError(f"{directory}: {printable(name)}: is in two shards, {both}.")
            merged[name] = stored
    return merged


def _listed(
    directory: Path, weight_map: dict[str, str], everything: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The stored tensors that the index lists, in file order. Raises `SourceError` unless all are where it says."""
    for name, file in weight_map.items():
        stored = everything.get(name)
        if stored is None or stored.file != file:
            found = "no shard holds it" if stored is None else f"it is in {stored.file}"
            raise SourceError(f"{directory / INDEX_NAME}: lists {printable(name)} in {file}, but {found}.")
    return {name: stored for name, stored in everything.items() if name in weight_map}


def _joined(tensors: list[StoredTensor]) -> Iterator[tuple[int, int]]:
    """First and last + 1 byte of tensors of a file, of neighbours together."""
    first, *others = sorted(tensors, key=lambda tensor: tensor.start)
    start, stop = first.start, first.stop
    for stored in others:
        if stored.start > stop:
            yield start, stop
            start = stored.start
        stop = max(stop, stored.stop)
    yield start, stop


def _samples(header: ShardHeader) -> tuple[int, ...]:
    """Where the samples of a shard's data begin."""
    length = header.size - header.data_start
    return tuple(header.data_start + length * quarter // 4 for quarter in (1, 2, 3))


def _n_rows(info: TensorInfo) -> int:
    return info.shape[0] if info.shape else 1


def _row_bytes(info: TensorInfo) -> int:
    return math.prod(info.shape[1:]) * DTYPES[info.dtype][0]


def _torch_dtype(info: TensorInfo) -> torch.dtype:
    import torch

    dtype = getattr(torch, DTYPES[info.dtype][1])
    assert isinstance(dtype, torch.dtype)
    return dtype


class _Run(NamedTuple):
    """``n_rows`` consecutive rows from ``first``; they go to position ``at`` of the result."""

    at: int
    first: int
    n_rows: int


def _runs(rising: list[int]) -> Iterator[_Run]:
    at = 0
    for end in range(1, len(rising) + 1):
        if end == len(rising) or rising[end] != rising[end - 1] + 1:
            yield _Run(at, rising[at], end - at)
            at = end
