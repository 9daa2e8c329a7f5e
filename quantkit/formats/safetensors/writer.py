"""Safetensors shards whose every byte has its place before the first is written.

What enters are the tensors of a checkpoint, in groups that must share a file; what leaves is a folder of shards with
complete headers and reserved space, into which data is written at offsets in any order, and at the end the index.
How files are made, taken up after a crash and refused is the matter of `preallocated`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.formats.checksums import WrittenRange
from quantkit.formats.preallocated import (
    ByteRange,
    FileLayout,
    FilesLayout,
    PreallocatedFiles,
    Steps,
    sha256_of,
    write_durably,
)
from quantkit.formats.safetensors.header import INDEX_NAME
from quantkit.tensors import DTYPES, TensorInfo

MAX_SHARD_BYTES = 5_000_000_000
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """One file. ``header``: length, JSON and padding, as it stands at the start; ``offsets``: of each tensor's data
    from the file's start."""

    file: str
    tensors: tuple[TensorInfo, ...]
    header: bytes
    offsets: tuple[int, ...]
    nbytes: int

    @property
    def layout(self) -> FileLayout:
        """The file as `preallocated` makes it."""
        pairs = zip(self.tensors, self.offsets, strict=True)
        places = {info.name: ByteRange(offset, info.nbytes) for info, offset in pairs}
        return FileLayout(self.file, self.header, places, self.nbytes)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """All files of a checkpoint. ``data_bytes``: tensor data without headers, what an index calls total_size."""

    shards: tuple[Shard, ...]
    data_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def layout(self) -> FilesLayout:
        """The files as `preallocated` makes them."""
        return FilesLayout(tuple(shard.layout for shard in self.shards), ("*.safetensors*",), (INDEX_NAME,))


def layout_shards(groups: Iterable[tuple[TensorInfo, ...]], max_shard_bytes: int = MAX_SHARD_BYTES) -> ShardLayout:
    """Distribute tensors over shards in the order given; a group stays together, and a shard exceeds the limit only for
    one large group."""
    files: list[list[TensorInfo]] = [[]]
    size = 0
    for group in groups:
        nbytes = sum(info.nbytes for info in group)
        if files[-1] and size + nbytes > max_shard_bytes:
            files.append([])
            size = 0
        files[-1] += group
        size += nbytes
    names = _file_names(len(files))
    shards = tuple(shard_of(name, tensors) for name, tensors in zip(names, files, strict=True))
    return ShardLayout(shards, sum(info.nbytes for tensors in files for info in tensors))


def _file_names(n_files: int) -> list[str]:
    if n_files == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{n_files:05d}.safetensors" for number in range(1, n_files + 1)]


def shard_of(file: str, tensors: Sequence[TensorInfo]) -> Shard:
    """One file with some tensors."""
    # Wide elements first: then every tensor starts at a multiple of its element size without gaps, which readers may
    # not have.
    ordered = sorted(tensors, key=lambda info: -DTYPES[info.dtype][0])
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: list[int] = []
    end = 0
    for info in ordered:
        assert info.name not in entries, f"{info.name} is planned twice"
        starts.append(end)
        end += info.nbytes
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [starts[-1], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, tuple(ordered), header, tuple(len(header) + start for start in starts), len(header) + end)


class ShardWriter:
    """Shards on disk, open for writing at offsets. Descriptors are opened on demand and given back by `sync`."""

    def __init__(self, files: PreallocatedFiles, layout: ShardLayout) -> None:
        self.directory = files.directory
        self.fresh = files.fresh
        self._files = files
        self._layout = layout
        self._infos = {info.name: info for shard in layout.shards for info in shard.tensors}

    @classmethod
    def open(cls, directory: Path, layout: ShardLayout) -> ShardWriter:
        """Make the shards in full size, or check those of an interrupted job.

        Raises `OutputError` if space is short, if a shard is missing or is not the planned one, or if other shards are
        in the folder.
        """
        return cls(PreallocatedFiles.open(directory, layout.layout), layout)

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers included."""
        return self._layout.nbytes

    def info(self, name: str) -> TensorInfo:
        """The stored tensor as its header describes it."""
        return self._infos[name]

    def write(self, name: str, start: int, data: bytes | memoryview) -> None:
        """Put bytes at byte ``start`` of a tensor's data. Raises `OutputError` for a full disk; what was synced before
        stays good."""
        self._files.write(name, start, data)

    def read(self, name: str) -> bytes:
        """All bytes of a (small) tensor as the file now has them."""
        return self._files.read(name)

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        self._files.sync()

    def written(self) -> tuple[WrittenRange, ...]:
        """What was written since this was asked last."""
        return self._files.written()

    def finish(self, steps: Steps | None = None) -> dict[str, str]:
        """Sync, write the index, and return file name -> sha256 (hex) of the shards and the index. Raises `OutputError`
        if the shards no longer hold what ``steps`` wrote."""
        self.sync()
        weight_map = {info.name: shard.file for shard in self._layout.shards for info in shard.tensors}
        index = {"metadata": {"total_size": self._layout.data_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_durably(self.directory / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())
        return {**self._files.sha256(steps), INDEX_NAME: sha256_of(self.directory / INDEX_NAME)}
