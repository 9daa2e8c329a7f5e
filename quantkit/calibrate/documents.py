"""Names of text in a recipe -> files -> documents.

Enters: entries such as `builtin:mixed`, `notes.txt`, `corpus/*.jsonl`. Leaves: for each file its sha256 and its
documents, each of them a text or a chat. Nothing here knows a tokenizer.

    .txt      the whole file is one document, which is read when it is tokenised
    .jsonl    one JSON object a line: `messages` with the keys of chats.py, or `text` (string)
    .parquet  a column `text`, or `messages` and the columns beside it that chats.py knows; needs pyarrow

Rows and lines may name their domain under a key that the caller chooses.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

from quantkit.calibrate.chats import ChatDocument, chat_document, encodable
from quantkit.calibrate.parquet_rows import importable, parquet_rows
from quantkit.errors import CalibrationError
from quantkit.formats.safetensors.header import check_json_size, printable

Update = Callable[[bytes], object]
"""Takes the bytes of a file as they are read, for its sha256."""

EXTENSIONS = (".txt", ".jsonl", ".parquet")
BUILTIN = "builtin:"
MAX_EMPTY_CHATS = 0.1
"""Share of a file's chats that may say nothing. They are left out; more of them mean that the text is elsewhere."""
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of text. `label` is its name as the recipe spells it, for messages and records. `domain_key`: key or
    column that names the domain of each document, None if that is not asked for."""

    label: str
    path: Path
    domain_key: str | None = None

    @property
    def domain(self) -> str:
        return self.path.stem


@dataclass(frozen=True, slots=True)
class TextDocument:
    """One text. `where` names its place for messages: `notes.jsonl:12`. `domain`: as the row names it, or ""."""

    where: str
    text: str
    domain: str = ""


@dataclass(frozen=True, slots=True)
class FileText:
    """The text of a .txt file, which is known to be UTF-8, to be read when it is tokenised."""

    where: str
    path: Path

    def open(self) -> IO[str]:
        """The file's characters, its line ends as they are, without a byte order mark."""
        return self.path.open(encoding="utf-8-sig", newline="")

    def samples(self, most: int, n_characters: int) -> list[str]:
        """Up to ``most`` texts of at most ``n_characters``, evenly spread; the whole of a short file."""
        n_bytes = self.path.stat().st_size
        stride = max(4 * n_characters, n_bytes // most)
        with self.path.open("rb") as handle:
            texts: list[str] = []
            for begin in range(0, n_bytes, stride):
                handle.seek(begin)
                texts.append(handle.read(4 * n_characters).decode("utf-8", errors="ignore"))
        return [text.removeprefix("\ufeff")[:n_characters] for text in texts]


Document = TextDocument | FileText | ChatDocument


def builtin_dir() -> Path:
    """The folder of quantkit's own texts: inside the installed package, or at the top of a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "data" / "calibration_data"
    return installed if installed.is_dir() else package.parent / "calibration_data"


def find_files(entries: Sequence[str], base_dir: Path) -> list[TextFile]:
    """The files that `entries` name, in their order (a glob's matches by name), each file once.

    Relative names count from `base_dir`. Raises CalibrationError: unknown built-in, glob without a match, missing file,
    unknown extension.
    """
    found: dict[Path, TextFile] = {}
    for entry in entries:
        try:
            files = _builtin_files(entry) if entry.startswith(BUILTIN) else _named_files(entry, base_dir)
        except (OSError, ValueError, RuntimeError) as error:  # too long, `**` inside a name, `~` of nobody
            raise CalibrationError(f"{entry[:80]!r}: is no usable file name ({printable(str(error))}).") from error
        for file in files:
            found.setdefault(file.path.resolve(), file)
    return list(found.values())


def read_documents(file: TextFile) -> tuple[str, list[Document]]:
    """(sha256 of the file, its documents). Raises CalibrationError with `file:line` where a line is to blame."""
    digest = hashlib.sha256()
    documents = list(stream_documents(file, digest.update))
    return digest.hexdigest(), documents


def stream_documents(file: TextFile, update: Update) -> Iterator[Document]:
    """The documents of `read_documents`, one at a time: a file may be larger than memory.

    ``update`` is given all bytes of the file by the time of the last one. Raises CalibrationError where reading fails,
    and at the end if there was no text, or too many chats were empty.
    """
    read = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[file.path.suffix.lower()]
    try:
        with file.path.open("rb") as handle:
            yield from _with_content(file.label, read(file, handle, update))
    except OSError as error:
        raise CalibrationError(f"{file.label}: cannot be read ({error.strerror}).") from error


def _with_content(label: str, documents: Iterator[Document]) -> Iterator[Document]:
    """The documents that say something. Raises CalibrationError: there are none, or too many chats are empty."""
    n_full = n_chats = n_empty = 0
    first_empty = ""
    for document in documents:
        is_chat, is_blank = isinstance(document, ChatDocument), _is_blank(document)
        n_chats += is_chat
        if is_blank and is_chat:
            n_empty += 1
            first_empty = first_empty or document.where
        if not is_blank:
            n_full += 1
            yield document
    if n_empty > MAX_EMPTY_CHATS * n_chats:
        raise CalibrationError(
            f"{label}: {n_empty:,} of {n_chats:,} chats have no content at all, the first is {first_empty}.",
            hint=f"Up to {MAX_EMPTY_CHATS:.0%} are left out. Is the text of the messages under another key?",
        )
    if not n_full:
        raise CalibrationError(f"{label}: holds no text.", hint="Fill it, or leave it out.")


def samples_of(documents: Sequence[Document], most: int, n_characters: int) -> list[str]:
    """Beginnings of up to ``most`` texts, evenly spread over the documents or, of one file of text, over the file."""
    chosen = documents[:: -(-len(documents) // most)]
    samples: list[str] = []
    for document in chosen:
        match document:
            case TextDocument():
                samples.append(document.text[:n_characters])
            case FileText():
                samples += document.samples(most // len(chosen), n_characters)
            case ChatDocument():
                samples.append(document.text()[:n_characters])
    return samples


def _is_blank(document: Document) -> bool:
    if isinstance(document, ChatDocument):
        return document.is_empty()
    return isinstance(document, TextDocument) and not document.text.strip()


def _empty_file(label: str) -> CalibrationError:
    return CalibrationError(f"{label}: the file is empty.", hint="Fill it, or leave it out.")


# ------------------------------------------------------------------------------------------------------------ names


def _builtin_files(entry: str) -> list[TextFile]:
    name = entry.removeprefix(BUILTIN)
    root = builtin_dir()
    names = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if name not in names:
        raise CalibrationError(
            f"{printable(entry)}: no such built-in text.", hint=f"There are: {', '.join(names) or 'none'}."
        )
    paths = sorted(path for path in (root / name).iterdir() if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise CalibrationError(f"{entry}: the folder {root / name} holds no {', '.join(EXTENSIONS)} file.")
    return [_file(f"{entry}/{path.name}", path) for path in paths]


def _named_files(entry: str, base_dir: Path) -> list[TextFile]:
    if not entry:
        raise CalibrationError("A name among the text files is empty.")
    path = base_dir / Path(entry).expanduser()
    if path.exists() or not any(character in entry for character in "*?["):
        return [_checked(_file(entry, path))]
    pattern = Path(entry).expanduser()
    # Path.glob takes no absolute pattern: search from the root of the file system instead.
    root = Path(pattern.anchor) if pattern.anchor else base_dir
    relative = str(pattern.relative_to(pattern.anchor)) if pattern.anchor else entry
    matches = sorted(match for match in root.glob(relative) if not match.is_dir())
    if not matches:
        raise CalibrationError(
            f"{printable(entry)}: no file matches.",
            hint="" if pattern.anchor else f"Looked from the folder {base_dir.resolve()}",
        )
    return [_checked(_file(_label(match, root, pattern), match)) for match in matches]


def _file(label: str, path: Path) -> TextFile:
    return TextFile(printable(label, limit=1000), path)


def _label(match: Path, root: Path, pattern: Path) -> str:
    return str(match) if pattern.anchor else match.relative_to(root).as_posix()


def _checked(file: TextFile) -> TextFile:
    if file.path.is_dir():
        raise CalibrationError(f"{file.label}: is a folder.", hint=f"Name its files: {file.label.rstrip('/')}/*")
    if not file.path.is_file():
        raise CalibrationError(
            f"{file.label}: no such file.", hint=f"Looked for {printable(str(file.path.resolve()))}."
        )
    if file.path.suffix.lower() not in EXTENSIONS:
        found = file.path.suffix or "no extension"
        raise CalibrationError(f"{file.label}: found {found}, can read {', '.join(EXTENSIONS)}.")
    return file


# ---------------------------------------------------------------------------------------------------------- formats


def _read_txt(file: TextFile, handle: IO[bytes], update: Update) -> Iterator[Document]:
    """Check the file block by block; its text is read again when it is tokenised."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    n_bytes, blank = 0, True
    while block := handle.read(_BLOCK_BYTES):
        update(block)
        n_bytes += len(block)
        blank &= not _decode(file.label, decoder.decode, block, n_bytes).strip()
    blank &= not _decode(file.label, lambda rest: decoder.decode(rest, final=True), b"", n_bytes).strip()
    if blank:
        raise _empty_file(file.label)
    yield FileText(file.label, file.path)


def _read_jsonl(file: TextFile, handle: IO[bytes], update: Update) -> Iterator[Document]:
    # A binary file's lines end at "\n" alone: str.splitlines would also cut at U+2028, legal inside a JSON string.
    n_bytes, blank = 0, True
    for number, line in enumerate(handle, start=1):
        update(line)
        n_bytes += len(line)
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        text = _decode(file.label, lambda raw, encoding=encoding: raw.decode(encoding), line, n_bytes)
        if text.strip():
            blank = False
            yield _document_of_line(file, f"{file.label}:{number}", text)
    if blank:
        raise _empty_file(file.label)


def _decode(label: str, decode: Callable[[bytes], str], block: bytes, end: int) -> str:
    """The text of a block of bytes that ends ``end`` bytes into the file."""
    try:
        return decode(block)
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {end - len(error.object) + error.start}"
        raise CalibrationError(f"{label}: is not UTF-8 ({found}).", hint="Convert it: iconv -t UTF-8") from error


def _document_of_line(file: TextFile, where: str, line: str) -> Document:
    check_json_size(line.encode(), where)
    try:
        record: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: is not JSON ({printable(str(error))}).") from error
    if not isinstance(record, dict):
        found = type(record).__name__
        raise CalibrationError(f"{where}: found {found}, needed an object with `text` or `messages`.")
    return _document(file, where, cast("dict[str, object]", record))


def _read_parquet(file: TextFile, handle: IO[bytes], update: Update) -> Iterator[Document]:
    if not importable():
        hint = "Install pyarrow (the extra `parquet`)."
        raise CalibrationError(f"{file.label}: reading .parquet needs pyarrow.", hint=hint)
    empty = True
    while block := handle.read(_BLOCK_BYTES):
        update(block)
        empty = False
    if empty:
        raise _empty_file(file.label)
    for number, row in parquet_rows(file.label, file.path, file.domain_key):
        yield _document(file, f"{file.label}: row {number}", row)


def _document(file: TextFile, where: str, record: Mapping[str, object]) -> Document:
    """`messages` wins over `text`: a data set with both holds the text in some other model's template."""
    domain = "" if file.domain_key is None else _domain(where, file.domain_key, record)
    if "messages" in record:
        return replace(chat_document(where, record), domain=domain)
    if "text" not in record:
        found = printable(", ".join(record)) or "no key"
        raise CalibrationError(f"{where}: found {found}, needed the key `text` or `messages`.")
    text = record["text"]
    if not isinstance(text, str):
        raise CalibrationError(f"{where}: `text` is {type(text).__name__}, needed a string.")
    return TextDocument(where, encodable(where, text), domain)


def _domain(where: str, key: str, record: Mapping[str, object]) -> str:
    """What the record says of its domain."""
    if key not in record:
        found = printable(", ".join(record)) or "no key"
        raise CalibrationError(f"{where}: found {found}, needed the key `{key}`, which names the domain.")
    domain = record[key]
    if not isinstance(domain, str) or not domain.strip():
        found = "an empty string" if isinstance(domain, str) else type(domain).__name__
        raise CalibrationError(f"{where}: `{key}` is {found}, needed the name of a domain.")
    return printable(encodable(where, domain.strip()))
