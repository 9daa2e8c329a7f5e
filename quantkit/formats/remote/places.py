"""`places`: what the user named, as folders of this machine, with the storage that opens their shards.

CACHE/sources/<digest of the listing>/<folder>/     config, index, tokenizer and the like; a line for each shard
CACHE/pieces-N/                                     pieces of shards
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.formats.preallocated import disk_errors, write_durably
from quantkit.formats.remote import buckets, https, hub
from quantkit.formats.remote.addresses import is_remote, scheme_of
from quantkit.formats.remote.ahead import Ahead
from quantkit.formats.remote.fetch import Fetcher, Patience
from quantkit.formats.remote.files import Listing, RemoteFile
from quantkit.formats.remote.pieces import Pieces
from quantkit.formats.remote.storage import PIECE_BYTES, RemoteStorage, is_shard, refuse_gguf
from quantkit.formats.safetensors.header import INDEX_NAME, printable
from quantkit.formats.side_files import MAX_SIDE_FILE_BYTES, NOT_SIDE_FILES, SIDE_FILES
from quantkit.formats.storage import LOCAL, Storage

DEFAULT_CACHE = 50 * 2**30
_SHARE_OF_DISK = 0.9
"""Of what is free, that a cache may take of which nobody said how large it may be."""
STANDS_FOR_SHARD = b"quantkit: this shard is read from its origin.\n"
_WHOLE = (*SIDE_FILES, "config.json", "params.json", "README.md", INDEX_NAME)


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """``folder``: of the cache; ``nbytes``: bound of all pieces in it, each of up to ``piece_bytes``
    (None: `DEFAULT_CACHE`, or what its disk has room for if that is less)."""

    folder: Path
    nbytes: int | None = None
    patience: Patience = Patience()
    piece_bytes: int = PIECE_BYTES


@dataclass(frozen=True, slots=True)
class Places:
    """``folders``: of this machine, in the order of the names; ``storage``: opens their shards."""

    folders: tuple[Path, ...]
    storage: Storage


@contextmanager
def places(names: Sequence[str], options: CacheOptions) -> Generator[Places]:
    """Folders of all ``names``, addresses and paths. Small files of remote ones are fetched now, shards while they are
    read, until this is left.

    Raises `SourceError` in one line for an address that cannot be read, `OutputError` for a cache that cannot be
    written.
    """
    if not any(map(is_remote, names)):
        yield Places(tuple(map(Path, names)), LOCAL)
        return
    with ExitStack() as stack:
        fetcher = Fetcher(options.patience)
        stack.callback(fetcher.close)
        listings = {name: _listing(name, fetcher) for name in names if is_remote(name)}
        pieces = Pieces(options.folder, _bound(options))
        storage = RemoteStorage(pieces, lambda files: Ahead(fetcher, pieces, files), options.piece_bytes)
        stack.callback(storage.close)
        folders = {name: _local_folder(options.folder, found, fetcher) for name, found in listings.items()}
        for name, found in listings.items():
            storage.add(folders[name], found, _shards(found))
        yield Places(tuple(folders.get(name) or Path(name) for name in names), storage)


def _bound(options: CacheOptions) -> int:
    if options.nbytes is not None:
        return options.nbytes
    folder = options.folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return min(DEFAULT_CACHE, int(_SHARE_OF_DISK * shutil.disk_usage(folder).free))


def _listing(name: str, fetcher: Fetcher) -> Listing:
    scheme = scheme_of(name)
    if scheme in ("http", "https"):
        found = https.listing(name, fetcher)
    elif scheme == "hf":
        found = hub.listing(name)
    elif scheme in ("s3", "gs"):
        found = buckets.listing(name)
    else:
        raise SourceError(f"{scheme}://: is not read.", hint="Sources are folders, hf://, s3://, gs:// and https://.")
    refuse_gguf(found)
    return found


def _shards(found: Listing) -> tuple[RemoteFile, ...]:
    return tuple(file for file in found.files if is_shard(file.name))


def _small(files: Iterable[RemoteFile]) -> Generator[RemoteFile]:
    """Files that are fetched whole. Larger ones no output takes along."""
    for file in files:
        wanted = any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _WHOLE)
        weights = any(fnmatch.fnmatchcase(file.name, pattern) for pattern in NOT_SIDE_FILES)
        if wanted and (not weights or file.name == INDEX_NAME) and file.nbytes <= MAX_SIDE_FILE_BYTES:
            yield file


def _local_folder(cache: Path, found: Listing, fetcher: Fetcher) -> Path:
    """The folder that stands for a listing. What an earlier process fetched of the same versions is taken."""
    digest = hashlib.sha256("\0".join(sorted(file.identity for file in found.files)).encode()).hexdigest()[:16]
    folder = cache.absolute() / "sources" / digest / found.folder
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file in _small(found.files):
        _refuse_odd_name(found, file)
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.nbytes:
            data = bytes(fetcher.fetch(file, 0, file.nbytes))
            file.check_content(data)
            write_durably(path, data)
    for file in _shards(found):
        _refuse_odd_name(found, file)
        if not (folder / file.name).is_file():
            write_durably(folder / file.name, STANDS_FOR_SHARD)
    return folder


def _refuse_odd_name(found: Listing, file: RemoteFile) -> None:
    """A name from elsewhere must not leave the folder."""
    if not file.name.isprintable() or set(file.name) & set("/\\:") or file.name.startswith("."):
        raise SourceError(f"{found.origin}: holds {printable(repr(file.name))}, a plain name was needed.")
