"""What a source says of the shards behind it, whatever its tensors are decoded from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quantkit.formats.safetensors.file_holes import file_holes
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.formats.safetensors.zero_tail import zero_tails


class StoredInShards:
    """Those members of a `ModelSource` that only ask its shards. ``raw``: what is stored."""

    raw: SafetensorsSource

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards, sorted by name."""
        return tuple(self.raw.directory / file for file in self.raw.files)

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
        headers = self.raw.headers
        return zero_tails(self.raw.directory, headers) or file_holes(self.raw.directory, headers, limits)

    def fingerprint(self) -> str:
        """sha256 (hex) of what is stored, see `SafetensorsSource.fingerprint`."""
        return self.raw.fingerprint()
