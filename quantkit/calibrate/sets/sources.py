"""Files -> their documents, in pieces, with the domain of each, one at a time; what the manifest says of each file."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from quantkit.calibrate.chats import ChatDocument
from quantkit.calibrate.documents import (
    Document,
    FileText,
    TextDocument,
    TextFile,
    Update,
    find_files,
    stream_documents,
)
from quantkit.calibrate.pieces import TextReader
from quantkit.calibrate.sets.cutting import pieces_of
from quantkit.documents.calibration_set import SourceText
from quantkit.documents.portable import without_folder
from quantkit.errors import CalibrationError

OnRead = Callable[[int, int], object]
"""Is told how many bytes were read, and how many all files have."""

BY_FILE, BY_FOLDER = "file", "folder"
MOST_DOMAINS = 256
_STEP = 1 << 24  # bytes
_SHARD = re.compile(r"[-_.]\d{3,}(-of-\d{3,})?$")
"""What a file's name ends with if its data set has several: train-00003-of-00008."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A chat, or a text that is not longer than was asked for."""

    domain: str
    text: str
    chat: ChatDocument | None = None

    def record(self) -> dict[str, object]:
        """What is written of it, and what makes it equal to another."""
        return {"text": self.text} if self.chat is None else dict(self.chat.record())


@dataclass(slots=True)
class _ByteCount:
    """Bytes read so far, for ``on_read``, which is told each `_STEP`."""

    total: int
    on_read: OnRead | None
    done: int = 0
    told: int = 0

    def add(self, update: Update, block: bytes) -> None:
        """Hand the next bytes of a file to ``update``."""
        update(block)
        self.done += len(block)
        if self.on_read is not None and (self.done - self.told >= _STEP or self.done == self.total):
            self.told = self.done
            self.on_read(self.done, self.total)


@dataclass(slots=True)
class Sources:
    """The files that ``entries`` name, relative to ``base_dir``, and the domain of each. ``read``: of the files that
    were read to their end."""

    files: Sequence[TextFile]
    domains: Sequence[str]
    read: list[SourceText] = field(default_factory=list[SourceText])

    @classmethod
    def find(cls, entries: Sequence[str], base_dir: Path, domain_by: str = BY_FILE) -> Sources:
        """Raises `CalibrationError`: a file is missing or of an unknown kind."""
        files = find_files(entries, base_dir)
        if domain_by == BY_FILE:
            return cls(files, _file_domains(files))
        if domain_by == BY_FOLDER:
            return cls(files, [file.path.resolve().parent.name for file in files])
        keyed = [replace(file, domain_key=domain_by) for file in files]
        return cls(keyed, _file_domains(files))  # a .txt file names no domain

    def pieces(self, most_bytes: int, on_read: OnRead | None = None) -> Iterator[Piece]:
        """All texts, in pieces of at most ``most_bytes`` bytes, and all chats. Raises `CalibrationError`: a file is
        unusable, or names more than `MOST_DOMAINS` domains."""
        seen: set[str] = set()
        count = _ByteCount(sum(file.path.stat().st_size for file in self.files), on_read)
        for file, domain in zip(self.files, self.domains, strict=True):
            digest, n_documents = hashlib.sha256(), 0
            for document in stream_documents(file, lambda block, update=digest.update: count.add(update, block)):
                n_documents += 1
                named = _named_domain(document) or domain
                seen.add(named)
                if len(seen) > MOST_DOMAINS:
                    raise _too_many(file)
                yield from _pieces(document, named, most_bytes)
            self.read.append(SourceText(file=_name(file), sha256=digest.hexdigest(), documents=n_documents))


def _pieces(document: Document, domain: str, most_bytes: int) -> Iterator[Piece]:
    match document:
        case ChatDocument():
            yield Piece(domain, document.text(), document)
        case TextDocument():
            yield from (Piece(domain, text) for text in pieces_of(TextReader(document.text), most_bytes))
        case FileText():
            with document.open() as reader:
                yield from (Piece(domain, text) for text in pieces_of(reader, most_bytes))


def _named_domain(document: Document) -> str:
    return document.domain if isinstance(document, TextDocument | ChatDocument) else ""


def _file_domains(files: Sequence[TextFile]) -> list[str]:
    """Stems of the files without the numbers of shards, with the folder where two folders have the same stem."""
    stems = [_SHARD.sub("", file.path.stem) or file.path.stem for file in files]
    folders = [file.path.resolve().parent for file in files]
    homes: defaultdict[str, set[Path]] = defaultdict(set)
    for stem, folder in zip(stems, folders, strict=True):
        homes[stem].add(folder)
    shared = Counter({stem: len(places) for stem, places in homes.items()})
    return [f"{folder.name}/{stem}" if shared[stem] > 1 else stem for stem, folder in zip(stems, folders, strict=True)]


def _name(file: TextFile) -> str:
    """The file as it was named, without the folders of this machine."""
    return without_folder(file.label)


def _too_many(file: TextFile) -> CalibrationError:
    return CalibrationError(
        f"{file.label}: with it there are more than {MOST_DOMAINS} domains.",
        hint="Balance by folder (--domain-by folder), or by a column with fewer values.",
    )
