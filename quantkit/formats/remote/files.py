"""A file that lies elsewhere: its size, what tells it from another version of itself, and how it is asked for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from quantkit.errors import SourceError
from quantkit.formats.storage import FileState


@dataclass(frozen=True, slots=True)
class Address:
    """What a request needs. Either part may hold a secret: neither is ever shown or stored."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """``name``: plain, inside its folder; ``shown``: in messages, without credentials; ``etag``: as the server quotes
    it, without quotation marks ("" if there is none); ``address``: asked again when it is refused, as signatures run
    out; ``sha256``, ``git_sha1``: hex digests of the content (git's with its own prefix), "" where they are not given;
    ``linked``: ``etag`` is what the first server says of it (X-Linked-Etag); who it sends on to has ETags of its own.
    """

    name: str
    shown: str
    nbytes: int
    etag: str
    address: Callable[[], Address] = field(repr=False, compare=False)
    sha256: str = ""
    git_sha1: str = ""
    linked: bool = False

    @property
    def identity(self) -> str:
        """Hex digest of what is known without reading it: place, size, ETag."""
        said = f"{self.shown}\0{self.nbytes}\0{self.etag}\0{self.sha256}"
        return hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()[:32]

    @property
    def state(self) -> FileState:
        """As a journal keeps it."""
        return FileState(self.nbytes, int(self.identity[:15], 16), 0, 0)

    def check_content(self, data: bytes) -> None:
        """Raise `SourceError` if the whole content is not what the digests say."""
        if self.sha256 and hashlib.sha256(data).hexdigest() != self.sha256:
            raise SourceError(f"{self.shown}: its sha256 is not the one that its origin states.", hint=TRY_AGAIN)
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        if self.git_sha1 and blob.hexdigest() != self.git_sha1:
            raise SourceError(f"{self.shown}: its git digest is not the one that its origin states.", hint=TRY_AGAIN)


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one remote folder. ``origin``: without credentials, with the revision that was found; ``folder``:
    relative path that its local folder gets, whose last part names the model."""

    origin: str
    folder: str
    files: tuple[RemoteFile, ...]


def plain(name: str) -> str:
    """A name that a folder of this machine can have, whatever it is elsewhere."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).lstrip(".")[:100] or "model"


TRY_AGAIN = "Give the same command again; if it stays so, the file is damaged there."
