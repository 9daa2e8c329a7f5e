"""What ``--restart`` may delete: a folder that a conversion with the same outputs made, and nothing else lies in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.read import CONVERSION, read_documents
from quantkit.errors import OutputError
from quantkit.formats.preallocated import disk_errors
from quantkit.formats.safetensors.header import printable

MODEL_CARD = "README.md"


def refuse_foreign(out: Path, outputs: Sequence[str]) -> None:
    """Raise `OutputError` naming the first thing in ``out`` that a conversion with these outputs did not make.

    An empty folder holds none. A result's files are those of its own quantkit.json, compared by name.
    """
    problem = why_foreign(out, outputs)
    if problem:
        raise OutputError(
            f"{out}: {problem}, and --restart would delete it.",
            hint="Choose another -o, or remove it yourself.",
        )


def why_foreign(out: Path, outputs: Sequence[str]) -> str:
    """What `refuse_foreign` says, "" if it lets ``out`` be replaced."""
    with disk_errors(out):
        return _problem(out, outputs)


def results_of(out: Path, outputs: Sequence[str]) -> tuple[ConversionDocument, ...]:
    """The documents of a finished job's folder in the order of its outputs; () if it is not one, or not complete."""
    folders = [out] if len(outputs) == 1 else [out / name for name in outputs]
    if not all((folder / CONVERSION).is_file() for folder in folders):
        return ()
    documents = [_document(folder) for folder in folders]
    complete = all(
        document.sha256 and all((folder / name).is_file() for name in document.sha256)
        for folder, document in zip(folders, documents, strict=True)
    )
    named = tuple(document.output for document in documents) == tuple(outputs)
    return tuple(documents) if complete and named else ()


def _problem(out: Path, outputs: Sequence[str]) -> str:
    """What speaks against deleting ``out``, "" if nothing does."""
    if not out.is_dir():
        return "is no folder that quantkit made"
    entries = sorted(out.iterdir())
    if (out / CONVERSION).is_file():
        document = _document(out)
        if tuple(outputs) != (document.output,):
            return f"holds the output {printable(document.output)}, not this job's {', '.join(outputs)}"
        return next(_strangers(out, document), "")
    if strangers := [entry for entry in entries if entry.is_symlink() or not (entry / CONVERSION).is_file()]:
        return f"is no folder that quantkit made: it holds {printable(strangers[0].name)}"
    return _problem_of_several(entries, outputs)


def _problem_of_several(folders: Sequence[Path], outputs: Sequence[str]) -> str:
    """The same for a folder with one result for each output."""
    documents = [_document(folder) for folder in folders]
    for folder, document in zip(folders, documents, strict=True):
        alone = document.output != folder.name or not _has_several_outputs(document)
        if alone or folder.name not in outputs or document.job.facts() != documents[0].job.facts():
            return f"holds {printable(folder.name)}, a result of another job"
        if stranger := next(_strangers(folder, document), ""):
            return stranger
    return ""


def _has_several_outputs(document: ConversionDocument) -> bool:
    outputs = document.recipe.get("outputs")
    return isinstance(outputs, list) and len(outputs) > 1


def _strangers(folder: Path, document: ConversionDocument) -> Iterator[str]:
    """What a result's folder holds beside its own files."""
    own = {CONVERSION, MODEL_CARD, *document.sha256}
    for path in sorted(folder.iterdir()):
        if path.name not in own or (path.is_dir() and not path.is_symlink()):
            yield f"holds {printable(path.name)}, which quantkit did not make"


def _document(folder: Path) -> ConversionDocument:
    (file,) = read_documents([folder / CONVERSION])
    if not isinstance(file.document, ConversionDocument):
        raise OutputError(f"{file.path}: is an evaluation, not what a conversion made.")
    return file.document
