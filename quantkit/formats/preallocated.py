"""Files whose every byte has its place before the first is written: what shards of safetensors and GGUF have in common.

What enters is a layout: the header of each file and the place of each named tensor, a function of the plan alone. What
leaves is a folder of files with complete headers and reserved space, into which data is written at offsets in any
order. A killed job is taken up by opening the folder again: headers and sizes must be exactly the planned ones.

Files are made under names ending in ``.new`` and renamed when all have their full size. So a file under its final name
is whole, and as long as one ``.new`` is left no data was written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from quantkit.errors import OutputError
from quantkit.formats.checksums import WrittenRange, merged, written_range
from quantkit.formats.sizes import short_size

UNFINISHED = ".new"
"""Behind the name of a file that is being made."""
_MAX_OPEN = 64
_CHUNK_BYTES = 1 << 22
_HASH_THREADS = 4


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Where a tensor's data lies: ``nbytes`` bytes at byte ``offset`` of its file."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """One file. ``header``: the bytes at its start; ``places``: of each tensor by name; what neither covers is zero."""

    file: str
    header: bytes
    places: Mapping[str, ByteRange]
    nbytes: int


Steps = Mapping[str, Sequence[WrittenRange]]
"""What was written in each step of a job, by the step's name."""


@dataclass(frozen=True, slots=True)
class FilesLayout:
    """All files that one job writes into a folder at offsets.

    ``patterns``: globs of what a runtime would load from the folder, or trip over: such a file is refused if it is
    neither planned nor one of the ``companions`` (an index).
    """

    files: tuple[FileLayout, ...]
    patterns: tuple[str, ...]
    companions: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers and padding included."""
        return sum(file.nbytes for file in self.files)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, without headers and padding."""
        return sum(place.nbytes for file in self.files for place in file.places.values())


def combined(*layouts: FilesLayout) -> FilesLayout:
    """Layouts that go into one folder through one writer (a model and its imatrix). No file or tensor name may occur
    twice."""
    return FilesLayout(
        tuple(file for layout in layouts for file in layout.files),
        tuple(dict.fromkeys(pattern for layout in layouts for pattern in layout.patterns)),
        tuple(dict.fromkeys(name for layout in layouts for name in layout.companions)),
    )


class PreallocatedFiles:
    """The files of a layout on disk, open for writing at offsets. Descriptors are opened on demand and given back by
    `sync`. Thread-safe: importance is written while another thread delivers weights."""

    def __init__(self, directory: Path, layout: FilesLayout, *, fresh: bool) -> None:
        self.directory = directory
        self.layout = layout
        self.fresh = fresh
        self._places: dict[str, tuple[str, ByteRange]] = {}
        self._numbers = {file.file: number for number, file in enumerate(layout.files)}
        self._written: dict[tuple[str, int], WrittenRange] = {}
        for file in layout.files:
            for name, place in file.places.items():
                assert name not in self._places, f"{name} is planned twice"
                self._places[name] = file.file, place
        self._open: dict[str, int] = {}
        # A descriptor that one thread closes must not be in another's hands: its number may be another file's by then.
        self._lock = threading.RLock()

    @classmethod
    def open(cls, directory: Path, layout: FilesLayout) -> PreallocatedFiles:
        """Make the files in full size (``fresh``), or check those of an interrupted job.

        Raises `OutputError` if space is short, if a file is missing or is not the planned one, or if other files that
        match the layout's patterns are in the folder.
        """
        _refuse_foreign(directory, layout)
        half_made = any((directory / (file.file + UNFINISHED)).exists() for file in layout.files)
        missing = [file for file in layout.files if not (directory / file.file).exists()]
        fresh = half_made or len(missing) == len(layout.files)
        if missing and not fresh:
            raise OutputError(
                f"{directory}: {missing[0].file} of an interrupted job is gone.", hint="Start again with --restart."
            )
        for file in layout.files:
            if file not in missing:
                _check_file(directory / file.file, file)
        if fresh:
            _create(directory, missing)
        return cls(directory, layout, fresh=fresh)

    def write(self, name: str, start: int, data: bytes | memoryview) -> None:
        """Put bytes at byte ``start`` of a tensor's data. Raises `OutputError` for a full disk; what was synced before
        stays good."""
        file, place = self._places[name]
        rest = memoryview(data).cast("B")
        assert 0 <= start <= start + len(rest) <= place.nbytes, (
            f"{name}: {len(rest)} bytes at {start} of {place.nbytes}"
        )
        written = written_range(self._numbers[file], place.offset + start, rest)
        with self._lock, disk_errors(self.directory / file):
            if rest.nbytes:
                self._written[file, written.start] = written
            fd, at = self._descriptor(file), written.start
            while rest:
                written = os.pwrite(fd, rest, at)
                at, rest = at + written, rest[written:]

    def read(self, name: str) -> bytes:
        """All bytes of a (small) tensor as the file now has them."""
        file, place = self._places[name]
        with self._lock, disk_errors(self.directory / file):
            return os.pread(self._descriptor(file), place.nbytes, place.offset)

    def written(self) -> tuple[WrittenRange, ...]:
        """What was written since this was asked last, with its checksums."""
        with self._lock:
            found = merged(self._written.values())
            self._written.clear()
        return found

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        with self._lock:
            for file in list(self._open):
                fd = self._open.pop(file)
                with disk_errors(self.directory / file):
                    try:
                        os.fsync(fd)
                    finally:
                        os.close(fd)

    def sha256(self, steps: Steps | None = None) -> dict[str, str]:
        """Sync, then file name -> sha256 (hex) of every file of the layout.

        Raises `OutputError` naming the step if a file no longer holds what ``steps`` wrote into it.
        """
        self.sync()
        names = [file.file for file in self.layout.files]
        checks: dict[int, list[_Check]] = {number: [] for number in range(len(names))}
        for step, ranges in (steps or {}).items():
            for item in ranges:
                checks.setdefault(item.file, []).append((item.start, item.nbytes, item.crc32, step))
        paths = [self.directory / name for name in names]
        ordered = [sorted(checks[number]) for number in range(len(names))]
        with ThreadPoolExecutor(min(_HASH_THREADS, os.cpu_count() or 1)) as pool:
            return dict(zip(names, pool.map(_checked_sha256, paths, ordered), strict=True))

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            if len(self._open) >= _MAX_OPEN:
                self.sync()
            with disk_errors(self.directory / file):
                self._open[file] = os.open(self.directory / file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        return self._open[file]


def check_place(path: Path) -> None:
    """Raise `OutputError` unless a file can be made there."""
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{path}: is no place for a file.", hint="Give a file name in a folder that exists.")


def write_durably(path: Path, data: bytes) -> None:
    """Replace a small file in one step: after a crash it holds the old bytes or the new ones. Raises `OutputError`."""
    new = path.with_name(path.name + UNFINISHED)
    with disk_errors(path):
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        sync_directory(path.parent)


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    return _checked_sha256(path, ())


_Check = tuple[int, int, int, str]
"""Start, bytes and CRC-32 of a range, and the step that wrote it."""


def _checked_sha256(path: Path, checks: Iterable[_Check]) -> str:
    """sha256 (hex) of a file, and on the way the checksums of ranges, sorted by their start."""
    digest = hashlib.sha256()
    with disk_errors(path), path.open("rb") as file:
        for start, nbytes, wanted, step in checks:
            for chunk in _chunks(file, start - file.tell()):
                digest.update(chunk)
            found = 0
            for chunk in _chunks(file, nbytes):
                digest.update(chunk)
                found = zlib.crc32(chunk, found)
            if found != wanted or file.tell() != start + nbytes:
                raise OutputError(
                    f"{path}: {step} is not as it was written, somewhere in bytes {start:,} to {start + nbytes:,}.",
                    hint="Another program or the disk changed it: start again with --restart.",
                )
        for chunk in _chunks(file, None):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: BinaryIO, nbytes: int | None) -> Generator[bytes]:
    """The next bytes, or all that follow if None; fewer where the file ends."""
    rest = nbytes
    while rest is None or rest > 0:
        chunk = file.read(_CHUNK_BYTES if rest is None else min(rest, _CHUNK_BYTES))
        if not chunk:
            return
        rest = None if rest is None else rest - len(chunk)
        yield chunk


def _refuse_foreign(directory: Path, layout: FilesLayout) -> None:
    """A runtime would load, or trip over, shards that this plan does not have."""
    planned = {file.file for file in layout.files}
    for path in sorted(path for pattern in layout.patterns for path in directory.glob(pattern)):
        name = path.name.removesuffix(UNFINISHED)
        if name not in planned and name not in layout.companions:
            raise OutputError(
                f"{path}: is not one of the {len(planned)} shards of this job.",
                hint="It is from another job: choose another folder, or start again with --restart.",
            )


def _check_file(path: Path, layout: FileLayout) -> None:
    with disk_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size, header = os.fstat(fd).st_size, os.pread(fd, len(layout.header), 0)
        finally:
            os.close(fd)
    if size != layout.nbytes:
        what = f"has {size:,} bytes, the plan needs {layout.nbytes:,}"
    elif header != layout.header:
        what = "has another header than the plan needs"
    else:
        return
    raise OutputError(
        f"{path}: {what}.", hint="It is from another recipe or source, or damaged: start again with --restart."
    )


def _create(directory: Path, files: list[FileLayout]) -> None:
    """Reserve all space before renaming the first file, so that a full disk is found before any work."""
    with disk_errors(directory):
        _remove_unfinished(directory, files)
    needed, free = sum(file.nbytes for file in files), _free_bytes(directory)
    if needed > free:
        raise _disk_full(directory, needed, free)
    try:
        for file in files:
            _reserve(directory / (file.file + UNFINISHED), file)
    except OSError as error:
        with suppress(OSError):  # what cannot be removed now is removed by the next run
            _remove_unfinished(directory, files)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(directory, needed, _free_bytes(directory)) from error
        raise OutputError(f"{directory}: cannot be written ({error.strerror}).") from error
    with disk_errors(directory):
        sync_directory(directory)
        for file in files:
            (directory / (file.file + UNFINISHED)).rename(directory / file.file)
        sync_directory(directory)


def _remove_unfinished(directory: Path, files: list[FileLayout]) -> None:
    for file in files:
        (directory / (file.file + UNFINISHED)).unlink(missing_ok=True)


def _reserve(path: Path, layout: FileLayout) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        written = os.pwrite(fd, layout.header, 0)
        if written != len(layout.header):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _allocate(fd, layout.nbytes)
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
        f"{directory}: the output needs {needed:,} bytes ({short_size(needed)}), "
        f"the disk has {free:,} ({short_size(free)}) free.",
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
