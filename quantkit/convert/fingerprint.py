"""What a resumed job must have in common with the one that was interrupted, so that its bytes are the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch

from quantkit.calibrate.dataset import TokenRows
from quantkit.calibrate.imatrix_file import ImportanceFile
from quantkit.documents.journal import JobHeader
from quantkit.plan.machine import Machine
from quantkit.plan.recipe import Recipe
from quantkit.version import __version__


class Fingerprinted(Protocol):
    """A source that can name its content."""

    def fingerprint(self) -> str:
        """Hex digest of headers and config."""
        ...


def job_header(
    recipe: Recipe, source: Fingerprinted, rows: TokenRows | None, importance: ImportanceFile | None, machine: Machine
) -> JobHeader:
    """The journal's first line. Device, threads and budget are in it: sums in another order may round a code the other
    way."""
    return JobHeader(
        quantkit_version=f"{__version__}, sources {_sources()[:12]}",
        torch_version=torch.__version__,
        recipe=sha256_of_text(recipe.model_dump_json()),
        source=source.fingerprint(),
        calibration_text=None if rows is None else hashlib.sha256(rows.tokens.tobytes()).hexdigest(),
        imatrix=None if importance is None else importance.sha256,
        device=machine.device_name,
        threads=torch.get_num_threads(),
        memory_budget=machine.budget,
    )


def _sources() -> str:
    """Hex digest of the package's own code: a checkout that was updated is another one."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def sha256_of_text(text: str) -> str:
    """Hex digest of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()
