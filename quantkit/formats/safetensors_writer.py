"""Safetensors shards whose every byte has its place before the first is written.

What enters are the tensors of a checkpoint, in groups that must share a file; what leaves is a folder of shards with
complete headers and reserved space, into which data is written at offsets in any order. A killed job is taken up by
opening the folder again: the layout is a function of the plan alone, so headers and sizes must be exactly the same.

Files are made under names ending in ``.new`` and renamed when all have their full size. So a shard under its final name
is whole, and as long as one ``.new`` is left no data was written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.formats.safetensors_header import INDEX_NAME
from quantkit.tensors import DTYPES, TensorInfo

MAX_SHARD_BYTES = 5_000_000_000
_NEW = ".new"
_ALIGNMENT = 8
_MAX_OPEN = 64
_CHUNK_BYTES = 1 << 22
_HASH_THREADS = 4


@dataclass(frozen=True, slots=True)
class Shard:
    """One file. ``header``: length, JSON and padding, as it stands at the start; ``offsets``: of each tensor's data
    from the file's start."""

    file: str
    tensors: tuple[TensorInfo, ...]
    header: bytes
    offsets: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """All files of a checkpoint. ``data_bytes``: tensor data without headers, what an index calls total_size."""

    shards: tuple[Shard, ...]
    data_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(shard.nbytes for shard in self.shards)


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
    shards = tuple(_shard(name, tensors) for name, tensors in zip(names, files, strict=True))
    return ShardLayout(shards, sum(info.nbytes for tensors in files for info in tensors))


def _file_names(n_files: int) -> list[str]:
    if n_files == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{n_files:05d}.safetensors" for number in range(1, n_files + 1)]


def _shard(file: str, tensors: list[TensorInfo]) -> Shard:
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

    def __init__(self, directory: Path, layout: ShardLayout, *, fresh: bool) -> None:
        self.directory = directory
        self.fresh = fresh
        self._layout = layout
        self._places = {
            info.name: (info, shard.file, offset)
            for shard in layout.shards
            for info, offset in zip(shard.tensors, shard.offsets, strict=True)
        }
        self._open: dict[str, int] = {}

    @classmethod
    def open(cls, directory: Path, layout: ShardLayout) -> ShardWriter:
        """Make the shards in full size, or check those of an interrupted job.

        Raises `OutputError` if space is short, if a shard is missing or is not the planned one, or if other shards are
        in the folder.
        """
        _refuse_foreign(directory, layout)
        half_made = any((directory / (shard.file + _NEW)).exists() for shard in layout.shards)
        missing = [shard for shard in layout.shards if not (directory / shard.file).exists()]
        fresh = half_made or len(missing) == len(layout.shards)
        if missing and not fresh:
            raise OutputError(
                f"{directory}: {missing[0].file} of an interrupted job is gone.", hint="Start again with --restart."
            )
        for shard in layout.shards:
            if shard not in missing:
                _check_shard(directory / shard.file, shard)
        if fresh:
            _create(directory, missing)
        return cls(directory, layout, fresh=fresh)

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers included."""
        return self._layout.nbytes

    def info(self, name: str) -> TensorInfo:
        """The stored tensor as its header describes it."""
        return self._places[name][0]

    def write(self, name: str, start: int, data: bytes | memoryview) -> None:
        """Put bytes at byte ``start`` of a tensor's data. Raises `OutputError` for a full disk; what was synced before
        stays good."""
        info, file, offset = self._places[name]
        assert 0 <= start <= start + len(data) <= info.nbytes, f"{name}: {len(data)} bytes at {start} of {info.nbytes}"
        fd, at, rest = self._descriptor(file), offset + start, memoryview(data)
        with disk_errors(self.directory / file):
            while rest:
                written = os.pwrite(fd, rest, at)
                at, rest = at + written, rest[written:]

    def read(self, name: str) -> bytes:
        """All bytes of a (small) tensor as the file now has them."""
        info, file, offset = self._places[name]
        with disk_errors(self.directory / file):
            return os.pread(self._descriptor(file), info.nbytes, offset)

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        for file in list(self._open):
            fd = self._open.pop(file)
            with disk_errors(self.directory / file):
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    def finish(self) -> dict[str, str]:
        """Sync, write the index, and return file name -> sha256 (hex) of the shards and the index."""
        self.sync()
        weight_map = {name: file for name, (_, file, _) in sorted(self._places.items())}
        index = {"metadata": {"total_size": self._layout.data_bytes}, "weight_map": weight_map}
        write_durably(self.directory / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())
        files = [*(shard.file for shard in self._layout.shards), INDEX_NAME]
        with ThreadPoolExecutor(min(_HASH_THREADS, os.cpu_count() or 1)) as pool:
            return dict(zip(files, pool.map(sha256_of, [self.directory / file for file in files]), strict=True))

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            if len(self._open) >= _MAX_OPEN:
                self.sync()
            with disk_errors(self.directory / file):
                self._open[file] = os.open(self.directory / file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        return self._open[file]


def write_durably(path: Path, data: bytes) -> None:
    """Replace a small file in one step: after a crash it holds the old bytes or the new ones. Raises `OutputError`."""
    new = path.with_name(path.name + _NEW)
    with disk_errors(path):
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        sync_directory(path.parent)


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    digest = hashlib.sha256()
    with disk_errors(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _refuse_foreign(directory: Path, layout: ShardLayout) -> None:
    """A runtime would load, or trip over, shards that this plan does not have."""
    planned = {shard.file for shard in layout.shards}
    for path in sorted(directory.glob("*.safetensors*")):
        name = path.name.removesuffix(_NEW)
        if name not in planned and name != INDEX_NAME:
            raise OutputError(
                f"{path}: is not one of the {len(planned)} shards of this job.",
                hint="It is from another job: choose another folder, or start again with --restart.",
            )


def _check_shard(path: Path, shard: Shard) -> None:
    with disk_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size, header = os.fstat(fd).st_size, os.pread(fd, len(shard.header), 0)
        finally:
            os.close(fd)
    if size != shard.nbytes:
        what = f"has {size:,} bytes, the plan needs {shard.nbytes:,}"
    elif header != shard.header:
        what = "has another header than the plan needs"
    else:
        return
    raise OutputError(
        f"{path}: {what}.", hint="It is from another recipe or source, or damaged: start again with --restart."
    )


def _create(directory: Path, shards: list[Shard]) -> None:
    """Reserve all space before renaming the first file, so that a full disk is found before any work."""
    for shard in shards:
        (directory / (shard.file + _NEW)).unlink(missing_ok=True)
    needed, free = sum(shard.nbytes for shard in shards), _free_bytes(directory)
    if needed > free:
        raise _disk_full(directory, needed, free)
    try:
        for shard in shards:
            _reserve(directory / (shard.file + _NEW), shard)
    except OSError as error:
        for shard in shards:
            (directory / (shard.file + _NEW)).unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(directory, needed, _free_bytes(directory)) from error
        raise OutputError(f"{directory}: cannot be written ({error.strerror}).") from error
    with disk_errors(directory):
        sync_directory(directory)
        for shard in shards:
            (directory / (shard.file + _NEW)).rename(directory / shard.file)
        sync_directory(directory)


def _reserve(path: Path, shard: Shard) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        written = os.pwrite(fd, shard.header, 0)
        if written != len(shard.header):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _allocate(fd, shard.nbytes)
        os.fsync(fd)
    finally:
        os.close(fd)


def _allocate(fd: int, nbytes: int) -> None:
    """Blocks for the whole file where the file system can reserve them, else a sparse file of full size."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, nbytes)


def _free_bytes(directory: Path) -> int:
    with disk_errors(directory):
        status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _disk_full(directory: Path, needed: int, free: int) -> OutputError:
    return OutputError(
        f"{directory}: the output needs {needed:,} bytes ({needed / 1e9:.1f} GB), "
        f"the disk has {free:,} ({free / 1e9:.1f} GB) free.",
        hint="Free space, or choose a folder on another disk.",
    )


@contextmanager
def disk_errors(path: Path) -> Generator[None, None, None]:
    """Turn what the operating system says about a file into one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "Free space and give the same command again: it goes on where it stopped." if full else ""
        what = "the disk is full" if full else f"cannot be read or written ({error.strerror})"
        raise OutputError(f"{path}: {what}.", hint=hint) from error


def sync_directory(directory: Path) -> None:
    """Return when the folder's names, new and changed, are on the disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
