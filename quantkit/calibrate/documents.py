"""Names of text in a recipe -> files -> documents.

Enters: entries such as `builtin:mixed`, `notes.txt`, `corpus/*.jsonl`. Leaves: for each file its sha256 and its
documents, each of them a text or a chat (a list of messages). Nothing here knows a tokenizer.

    .txt      the whole file is one document
    .jsonl    one JSON object a line: `messages` (list of {role, content, ...}) or `text` (string)
    .parquet  a column `messages` or `text`; needs pyarrow
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from quantkit.errors import CalibrationError

EXTENSIONS = (".txt", ".jsonl", ".parquet")
BUILTIN = "builtin:"


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of text. `label` is its name as the recipe spells it, for messages and records."""

    label: str
    path: Path

    @property
    def domain(self) -> str:
        return self.path.stem


@dataclass(frozen=True, slots=True)
class TextDocument:
    """One text. `where` names its place for messages: `notes.jsonl:12`."""

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class ChatDocument:
    """One conversation, to be rendered by the checkpoint's chat template."""

    where: str
    messages: Sequence[Mapping[str, Any]]


Document = TextDocument | ChatDocument


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
            raise CalibrationError(f"{entry[:80]!r}: is no usable file name ({error}).") from error
        for file in files:
            found.setdefault(file.path.resolve(), file)
    return list(found.values())


def read_documents(file: TextFile) -> tuple[str, list[Document]]:
    """(sha256 of the file, its documents). Raises CalibrationError with `file:line` where a line is to blame."""
    try:
        content = file.path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{file.label}: cannot be read ({error.strerror}).") from error
    if not content.strip():
        raise CalibrationError(f"{file.label}: the file is empty.", hint="Remove it from the recipe.")
    parse = {".txt": _parse_txt, ".jsonl": _parse_jsonl, ".parquet": _parse_parquet}[file.path.suffix.lower()]
    documents = [document for document in parse(file.label, content) if not _is_blank(document)]
    if not documents:
        raise CalibrationError(f"{file.label}: holds no text.", hint="Remove it from the recipe.")
    return hashlib.sha256(content).hexdigest(), documents


def _is_blank(document: Document) -> bool:
    return isinstance(document, TextDocument) and not document.text.strip()


# ------------------------------------------------------------------------------------------------------------ names


def _builtin_files(entry: str) -> list[TextFile]:
    name = entry.removeprefix(BUILTIN)
    root = builtin_dir()
    names = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if name not in names:
        raise CalibrationError(f"{entry}: no such built-in text.", hint=f"There are: {', '.join(names) or 'none'}.")
    paths = sorted(path for path in (root / name).iterdir() if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise CalibrationError(f"{entry}: the folder {root / name} holds no {', '.join(EXTENSIONS)} file.")
    return [TextFile(f"{entry}/{path.name}", path) for path in paths]


def _named_files(entry: str, base_dir: Path) -> list[TextFile]:
    if not entry:
        raise CalibrationError("A name among the text files is empty.")
    path = base_dir / Path(entry).expanduser()
    if path.exists() or not any(character in entry for character in "*?["):
        return [_checked(TextFile(entry, path))]
    pattern = Path(entry).expanduser()
    # Path.glob takes no absolute pattern: search from the root of the file system instead.
    root = Path(pattern.anchor) if pattern.anchor else base_dir
    relative = str(pattern.relative_to(pattern.anchor)) if pattern.anchor else entry
    matches = sorted(match for match in root.glob(relative) if not match.is_dir())
    if not matches:
        raise CalibrationError(f"{entry}: no file matches.", hint=f"Relative names count from {base_dir}.")
    return [_checked(TextFile(_label(match, root, pattern), match)) for match in matches]


def _label(match: Path, root: Path, pattern: Path) -> str:
    return str(match) if pattern.anchor else match.relative_to(root).as_posix()


def _checked(file: TextFile) -> TextFile:
    if file.path.is_dir():
        raise CalibrationError(f"{file.label}: is a folder.", hint=f"Name its files: {file.label.rstrip('/')}/*.txt")
    if not file.path.is_file():
        raise CalibrationError(f"{file.label}: no such file.", hint=f"Looked for {file.path}.")
    if file.path.suffix.lower() not in EXTENSIONS:
        found = file.path.suffix or "no extension"
        raise CalibrationError(f"{file.label}: found {found}, can read {', '.join(EXTENSIONS)}.")
    return file


# ---------------------------------------------------------------------------------------------------------- formats


def _decode(label: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise CalibrationError(f"{label}: is not UTF-8 ({found}).", hint="Convert it: iconv -t UTF-8") from error


def _parse_txt(label: str, content: bytes) -> Iterator[Document]:
    yield TextDocument(label, _decode(label, content))


def _parse_jsonl(label: str, content: bytes) -> Iterator[Document]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which is legal inside a JSON string.
    for number, line in enumerate(_decode(label, content).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{label}:{number}"
        try:
            record: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{where}: is not JSON ({error}).") from error
        if not isinstance(record, dict):
            found = type(record).__name__
            raise CalibrationError(f"{where}: found {found}, needed an object with `text` or `messages`.")
        yield _document(where, cast("dict[str, object]", record))


def _parse_parquet(label: str, content: bytes) -> Iterator[Document]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        hint = "Install pyarrow (the extra `parquet`)."
        raise CalibrationError(f"{label}: reading .parquet needs pyarrow.", hint=hint) from error
    try:
        file = parquet.ParquetFile(arrow.BufferReader(content))
        names: list[str] = file.schema_arrow.names
        column = next((name for name in ("messages", "text") if name in names), None)
        if column is None:
            raise CalibrationError(f"{label}: found columns {', '.join(names)}, needed `text` or `messages`.")
        values: list[object] = file.read(columns=[column]).column(column).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{label}: is not readable as parquet ({str(error).splitlines()[0]}).") from error
    for number, value in enumerate(values, start=1):
        yield _document(f"{label}: row {number}", {column: value})


def _document(where: str, record: Mapping[str, object]) -> Document:
    """`messages` wins over `text`: a data set with both holds the text in some other model's template."""
    if "messages" in record:
        return ChatDocument(where, _messages(where, record["messages"]))
    if "text" not in record:
        found = ", ".join(record) or "no key"
        raise CalibrationError(f"{where}: found {found}, needed the key `text` or `messages`.")
    text = record["text"]
    if not isinstance(text, str):
        raise CalibrationError(f"{where}: `text` is {type(text).__name__}, needed a string.")
    return TextDocument(where, encodable(where, text))


def _messages(where: str, value: object) -> list[Mapping[str, Any]]:
    messages = cast("list[object]", value) if isinstance(value, list) else []
    if not messages:
        raise CalibrationError(f"{where}: `messages` must be a list of at least one message.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(cast("dict[str, object]", message).get("role"), str):
            raise CalibrationError(f"{where}: each message must be an object with `role` and `content`.")
    return cast("list[Mapping[str, Any]]", messages)


def encodable(where: str, text: str) -> str:
    """``text`` if it can be UTF-8. Raises CalibrationError that begins with ``where``."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{where}: holds half of a surrogate pair, which is no character.") from error
    return text
