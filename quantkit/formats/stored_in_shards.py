"""What a source says of the shards behind it, whatever its tensors are decoded from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quantkit.formats.safetensors.file_holes import file_holes
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.formats.safetensors.zero_tail import zero_tails
from quantkit.formats.storage import FileState


class StoredInShards:
    """Those members of a `ModelSource` that only ask its shards. ``raw``: what is stored."""

    raw: SafetensorsSource

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards, sorted by name."""
        return tuple(self.raw.directory / file for file in self.raw.files)

    @property
    def origin(self) -> str:
        """Where a remote source comes from, "" for a folder of this machine."""
        return self.raw.storage.origin(self.raw.directory)

    @property
    def notes(self) -> tuple[str, ...]:
        """None: what is unusual about shards is refused."""
        return ()

    @property
    def unlisted(self) -> tuple[str, ...]:
        """Names that shards hold but the index does not list; they are not shown."""
        return self.raw.unlisted

    def path_of(self, name: str) -> Path:
        """The shard that holds a plain tensor."""
        return self.raw.path_of(name)

    def equal(self, name: str, other: str) -> bool:
        """See `SafetensorsSource.equal`."""
        return self.raw.equal(name, other)

    def zeros(self, limits: Mapping[str, int]) -> tuple[str, ...]:
        """A line for each shard that ends in rows of zeros; without any, for each that has a hole."""
        headers, directory, storage = self.raw.headers, self.raw.directory, self.raw.storage
        return zero_tails(directory, headers, storage) or file_holes(directory, headers, limits, storage)

    def states(self) -> Mapping[str, FileState]:
        """By the name of each shard what tells it from another."""
        return self.raw.states()

    def fingerprint(self) -> str:
        """sha256 (hex) of what is stored, see `SafetensorsSource.fingerprint`."""
        return self.raw.fingerprint()
