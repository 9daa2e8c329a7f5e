"""Documents from files. They may come from strangers and from other versions: whatever is wrong is refused in one
line."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, JsonValue, ValidationError

from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.evaluation import Evaluation
from quantkit.documents.values import DocumentPart
from quantkit.errors import OutputError
from quantkit.formats.safetensors.header import check_json_size, printable
from quantkit.formats.storage import open_regular

CONVERSION, EVALUATION = "quantkit.json", "evaluation.json"
MAX_BYTES = 128 * 2**20
"""Largest document that is read. DeepSeek V3's quantkit.json has 10 MB, its evaluation of ten thousand windows less
than 30."""

MAX_JSON_PARTS = 4_000_000
"""Values and keys of one."""


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A document and the file it was read from. ``written``: when that file was last changed, UTC."""

    path: Path
    document: ConversionDocument | Evaluation
    written: datetime


class _Kind(DocumentPart):
    kind: JsonValue = None
    quantkit: JsonValue = None
    trial: JsonValue = None


IS_EVALUATION, IS_BASELINE, IS_CONVERSION, IS_TRIAL = (
    "an evaluation",
    "a baseline of `quantkit check`",
    "a record of a conversion",
    "the report of a trial (`convert --layers`)",
)
"""What `kind_of` says."""
_KINDS = {"quantkit evaluation": IS_EVALUATION, "quantkit baseline": IS_BASELINE}
_READERS = {IS_BASELINE: "quantkit check EVALUATION --baseline", IS_TRIAL: "quantkit inspect"}
"""Commands that read what a report is not made of."""


def first_problem(error: ValidationError) -> str:
    """The first thing that a model refused, in one line: "tensors.lm_head.weight.n_tokens: Input should be ..."."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = printable(".".join(str(part)[:60] for part in first["loc"][:8]))
    return f"{f'{place}: ' if place else ''}{first['msg'][:200]}"


def read_documents(paths: Iterable[Path]) -> tuple[DocumentFile, ...]:
    """The documents of output folders (their quantkit.json, or those of their subfolders when a conversion made
    several outputs, and evaluation.json if one lies there) and of JSON files. Each once, in the order given.

    Raises `OutputError` for a path that holds none and for a file that cannot be read as one.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        for file in _files(path):
            files.setdefault(file.resolve(), file)
    return tuple(_read(file) for file in files.values())


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise OutputError(f"{path}: not found.", hint="Give output folders of `quantkit convert` or JSON documents.")
    folders = [path] if (path / CONVERSION).is_file() else sorted(p for p in path.iterdir() if p.is_dir())
    conversions = [folder / CONVERSION for folder in folders if (folder / CONVERSION).is_file()]
    evaluations = [file for file in (path / EVALUATION,) if file.is_file()]
    if not conversions and not evaluations:
        raise OutputError(
            f"{path}: holds no {CONVERSION}, nor do its subfolders, and no {EVALUATION}.",
            hint="Give an output folder of `quantkit convert`, or the file that `quantkit evaluate -o` wrote.",
        )
    yield from (*conversions, *evaluations)


def document_bytes(path: Path) -> bytes:
    """The text of a document, known to be no more than any of ours. Raises `OutputError` if it cannot be read or has
    too many bytes, `SourceError` for what is no file and for too many values."""
    fd, size = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        if size > MAX_BYTES:
            raise OutputError(f"{path}: {size:,} bytes, documents of quantkit have at most {MAX_BYTES:,}.")
        try:
            content = file.read(MAX_BYTES)
        except OSError as error:
            raise OutputError(f"{path}: cannot be read: {error.strerror}.") from error
    check_json_size(content, str(path), MAX_JSON_PARTS)
    return content


def _read(path: Path) -> DocumentFile:
    content = document_bytes(path)
    kind = kind_of(path, content)
    if kind == IS_EVALUATION:
        document: ConversionDocument | Evaluation = parsed_document(path, content, Evaluation)
    elif kind == IS_CONVERSION:
        document = parsed_document(path, content, ConversionDocument)
    elif kind:
        raise OutputError(
            f"{path}: is {kind}, of which no report is made.",
            hint=f"See what it says: {_READERS[kind]} {shlex.quote(str(path))}",
        )
    else:
        raise OutputError(
            f"{path}: is neither a conversion's {CONVERSION} nor an evaluation.",
            hint="`quantkit convert` and `quantkit evaluate -o FILE` write what a report is made of.",
        )
    return DocumentFile(path, document, datetime.fromtimestamp(path.stat().st_mtime, timezone.utc))


_Model = TypeVar("_Model", bound=BaseModel)


def kind_of(path: Path, content: bytes) -> str:
    """Which document of quantkit this is, "" for none: `IS_EVALUATION` and its like. Raises `OutputError` for what is
    no JSON object."""
    found = parsed_document(path, content, _Kind)
    if isinstance(found.kind, str) and found.kind in _KINDS:
        return _KINDS[found.kind]
    if isinstance(found.trial, list):
        return IS_TRIAL
    return IS_CONVERSION if isinstance(found.quantkit, str) else ""


def parsed_document(path: Path, content: bytes, model: type[_Model]) -> _Model:
    """Raises `OutputError` with the first thing that the model refuses."""
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise OutputError(
            f"{path}: {first_problem(error)}.",
            hint="The file is damaged, or was written by a version of quantkit that this one does not know.",
        ) from error
