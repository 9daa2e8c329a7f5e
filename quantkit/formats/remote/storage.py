"""`RemoteStorage`: shards of remote folders as `RangedFile`s, read through pieces on the disk.

A remote folder has a local one, in which config, index, tokenizer and the like lie whole. In the place of a shard there
is a line of text, so that what lists the folder finds its name, and what would read it without asking here is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from quantkit.errors import PlanError, SourceError
from quantkit.formats.remote.ahead import Ahead
from quantkit.formats.remote.files import Listing, RemoteFile
from quantkit.formats.remote.pieces import FilePiece, Pieces
from quantkit.formats.sizes import short_size
from quantkit.formats.storage import LOCAL, FileState, RangedFile, ends_early

PIECE_BYTES = 8 << 20
"""Large enough that a request's latency does not count, small enough that few needless bytes come along."""
SMALL = 1 << 20
"""Reads of up to so many bytes (headers, samples) bring no whole piece."""
HEAD_BYTES = 128 << 10
"""Of every shard, fetched together at the start. The header of a V3 shard has 75 KB."""
AT_ONCE = 8
"""Pieces that one reader waits for at a time: what bounds its memory."""


class RemoteStorage:
    """Opens files of known folders. Files elsewhere are this machine's. Thread-safe."""

    def __init__(
        self, pieces: Pieces, start: Callable[[Mapping[str, RemoteFile]], Ahead], piece_bytes: int = PIECE_BYTES
    ) -> None:
        """``start``: begins to fetch pieces of files by their identity, which may become more."""
        self._pieces = pieces
        self._piece_bytes = piece_bytes
        self._by_identity: dict[str, RemoteFile] = {}
        self._shards: dict[Path, dict[str, RemoteFile]] = {}
        self._origins: dict[Path, str] = {}
        self._ahead = start(self._by_identity)

    def add(self, folder: Path, listing: Listing, shards: tuple[RemoteFile, ...]) -> None:
        """From now on the ``shards`` of ``folder`` are those of a listing. Their heads are on their way."""
        self._origins[folder] = listing.origin
        self._shards[folder] = {file.name: file for file in shards}
        self._by_identity.update((file.identity, file) for file in shards)
        head = min(HEAD_BYTES, self._piece_bytes)
        self._ahead.announce(FilePiece(file.identity, 0, min(head, file.nbytes)) for file in shards if file.nbytes)

    def open(self, path: Path) -> RangedFile:
        """See `Storage`."""
        file = self._shards.get(path.parent, {}).get(path.name)
        return LOCAL.open(path) if file is None else _Shard(file, self._pieces, self._ahead, self._piece_bytes)

    def origin(self, folder: Path) -> str:
        """See `Storage`."""
        return self._origins.get(folder, "")

    def check_room(self, folder: Path, nbytes: int, what: str) -> None:
        """See `Storage`."""
        if folder in self._origins and nbytes > self._pieces.bound:
            raise PlanError(
                f"--cache {short_size(self._pieces.bound)}: {what} of {self._origins[folder]} has "
                f"{short_size(nbytes)}, which must be there at once.",
                hint=f"Give --cache {-(-nbytes // 2**30)}GiB or more; twice that lets the next layer come meanwhile.",
            )

    def close(self) -> None:
        """End the threads, and give the folder of pieces back."""
        self._ahead.close()
        self._pieces.close()


class _Shard:
    """A `RangedFile` of a remote file."""

    def __init__(self, file: RemoteFile, pieces: Pieces, ahead: Ahead, piece_bytes: int) -> None:
        self._file = file
        self._identity = file.identity
        self._pieces = pieces
        self._ahead = ahead
        self._piece_bytes = piece_bytes
        self._is_small = min(SMALL, piece_bytes)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._file.nbytes

    @property
    def state(self) -> FileState:
        """Of the version that is read: another one is never read under this name."""
        return self._file.state

    def pread(self, nbytes: int, at: int) -> bytes:
        """See `RangedFile`. A small read brings no more than itself."""
        stop = min(at + nbytes, self.size)
        if stop <= at:
            return b""
        data = bytearray(stop - at)
        if len(data) > self._is_small:
            self.fill(memoryview(data), at, self._file.shown)
        else:
            self._read_small(memoryview(data), at)
        return bytes(data)

    def fill(self, buffer: memoryview, at: int, where: str) -> None:
        """See `RangedFile`."""
        if at + len(buffer) > self.size:
            raise ends_early(where, at + len(buffer) - self.size)
        small = self._pieces.covering(self._identity, at, at + len(buffer)) if len(buffer) <= self._is_small else None
        if small is not None and self._pieces.read(small, buffer, at - small.start):
            return
        pieces = tuple(self._grid(at, len(buffer)))
        for first in range(0, len(pieces), AT_ONCE):
            group = pieces[first : first + AT_ONCE]
            coming = {piece: self._ahead.want(piece) for piece in group if not self._pieces.has(piece)}
            for piece in group:
                start, stop = max(at, piece.start), min(at + len(buffer), piece.stop)
                into = buffer[start - at : stop - at]
                if piece in coming:
                    into[:] = memoryview(coming.pop(piece).result())[start - piece.start : stop - piece.start]
                    self._pieces.read(piece, into[:0], 0)  # it was used, and may go
                else:
                    self._copy(piece, into, start - piece.start)
        self._ahead.made_room()

    def will_need(self, at: int, nbytes: int) -> None:
        """See `RangedFile`."""
        stop = min(at + nbytes, self.size)
        if stop <= at:
            return
        if stop - at > self._is_small:
            self._ahead.announce(self._grid(at, stop - at))
        elif self._pieces.covering(self._identity, at, stop) is None:
            self._ahead.announce((self._small(at, stop),))

    def unwritten(self) -> Iterator[tuple[int, int]]:
        """None is known."""
        return iter(())

    def close(self) -> None:
        """Nothing is open."""

    def _grid(self, at: int, nbytes: int) -> Iterator[FilePiece]:
        """The pieces that hold these bytes."""
        step = self._piece_bytes
        for start in range(at - at % step, at + nbytes, step):
            yield FilePiece(self._identity, start, min(start + step, self.size))

    def _small(self, at: int, stop: int) -> FilePiece:
        """The piece of the grid if it is on its way anyway, else just these bytes."""
        whole = next(self._grid(at, 1))
        return whole if stop <= whole.stop and self._ahead.is_coming(whole) else FilePiece(self._identity, at, stop)

    def _read_small(self, into: memoryview, at: int) -> None:
        piece = self._pieces.covering(self._identity, at, at + len(into))
        if piece is None:
            head = FilePiece(self._identity, 0, min(HEAD_BYTES, self._piece_bytes, self.size))
            piece = head if at + len(into) <= head.stop else self._small(at, at + len(into))
        self._copy(piece, into, at - piece.start)

    def _copy(self, piece: FilePiece, into: memoryview, offset: int) -> None:
        """From the disk; if it is not there, or was damaged, from its origin."""
        if not self._pieces.read(piece, into, offset):
            into[:] = memoryview(self._ahead.want(piece).result())[offset : offset + len(into)]


def is_shard(name: str) -> bool:
    """Whether a file of a remote folder is read by ranges."""
    return name.endswith(".safetensors") and not name.startswith(".")


def refuse_gguf(listing: Listing) -> None:
    """Raise `SourceError` for a folder of GGUF: its files are read from this machine only."""
    names = [file.name for file in listing.files]
    if any(name.endswith(".gguf") for name in names) and not any(map(is_shard, names)):
        raise SourceError(
            f"{listing.origin}: holds GGUF, of remote sources safetensors are read.", hint="Fetch the .gguf file first."
        )
