"""The bytes: sha256 of every file against quantkit.json, and a sample of linears decoded, held against the original if
it is at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.pruning import PruningRecord
from quantkit.documents.read import CONVERSION, read_documents
from quantkit.errors import QuantkitError
from quantkit.formats.preallocated import sha256_of
from quantkit.formats.safetensors.header import printable
from quantkit.quantizers.awq import Awq

RESCALING = (Awq.model_fields["kind"].default,)
"""Methods that rescale channels."""
_THREADS = 8
"""At most: hashing is bound by a processor each, 1 to 2 GB/s, until the disk is the limit."""


@dataclass(frozen=True, slots=True)
class Hashed:
    """``faults``: a line for each file that is not what quantkit.json says; ``files`` and ``nbytes``: what agreed;
    ``recorded``: whether there was anything to compare with."""

    faults: tuple[str, ...]
    files: int
    nbytes: int
    recorded: bool


def hash_files(directory: Path) -> Hashed:
    """Hash every file that quantkit.json of the folder lists. Raises `QuantkitError` for a document that is none."""
    if not (directory / CONVERSION).is_file():
        return Hashed((), 0, 0, recorded=False)
    (found,) = read_documents([directory / CONVERSION])
    if not isinstance(found.document, ConversionDocument) or not found.document.sha256:
        return Hashed((), 0, 0, recorded=False)
    wanted = found.document.sha256
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        problems = list(pool.map(partial(_problem, directory), wanted, wanted.values()))
    good = [name for name, problem in zip(wanted, problems, strict=True) if not problem]
    nbytes = sum((directory / name).stat().st_size for name in good)
    return Hashed((*filter(None, problems), *_strangers(directory, wanted)), len(good), nbytes, recorded=True)


def is_rescaled(directory: Path) -> bool:
    """Whether quantkit.json says that a method rescaled channels: linears are then not those of the original."""
    if not (directory / CONVERSION).is_file():
        return False
    (found,) = read_documents([directory / CONVERSION])
    recipe = json.dumps(found.document.recipe) if isinstance(found.document, ConversionDocument) else ""
    return any(f'"kind": "{kind}"' in recipe for kind in RESCALING)


def pruning_of(directory: Path) -> PruningRecord | None:
    """Which experts quantkit.json says were pruned, None if none."""
    if not (directory / CONVERSION).is_file():
        return None
    (found,) = read_documents([directory / CONVERSION])
    return found.document.pruning if isinstance(found.document, ConversionDocument) else None


def _problem(directory: Path, name: str, wanted: str) -> str:
    if Path(name).name != name:
        return f"quantkit.json lists {printable(name, 60)}, which is no file of this folder."
    path = directory / name
    if not path.is_file():
        return f"{path.name}: is missing."
    try:
        found = sha256_of(path)
    except QuantkitError as error:
        return error.message
    return "" if found == wanted else f"{path.name}: its sha256 is {found[:12]}..., quantkit.json says {wanted[:12]}..."


def _strangers(directory: Path, wanted: Mapping[str, str]) -> Iterator[str]:
    """Weights that the conversion did not write: runtimes load whatever safetensors they find."""
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in wanted:
            yield f"{path.name}: is not of this conversion, but a runtime may load it."
