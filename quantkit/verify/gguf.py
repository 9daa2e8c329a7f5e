"""llama.cpp's load contract, held against a GGUF model's header: what it asserts when it loads the file, and what it
computes otherwise without a word if it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quantkit.documents.read import CONVERSION
from quantkit.errors import ConfigError
from quantkit.formats.gguf.header import is_gguf
from quantkit.formats.gguf.reader import GgufReader
from quantkit.inspect.gguf import inspect_gguf
from quantkit.inspect.imatrix import ImatrixInspection
from quantkit.inspect.known_gguf import KNOWN_GGUF

LLAMA_CPP = "llama.cpp"


def holds_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder with one and without safetensors, or with nothing but the record of
    one."""
    if path.is_dir():
        recorded = (path / CONVERSION).is_file() and not (path / "config.json").exists()
        return (recorded or any(path.glob("*.gguf"))) and not any(path.glob("*.safetensors"))
    return path.suffix == ".gguf" or (path.is_file() and is_gguf(path))


def read_gguf(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """Faults, notes, and the number of tensors. Raises `SourceError` for a damaged file, `ConfigError` for an imatrix
    and for another architecture than those of `KNOWN_GGUF`."""
    found = inspect_gguf(path)
    if isinstance(found, ImatrixInspection):
        raise ConfigError(f"{path}: is an imatrix, not a model.")
    if found.architecture not in KNOWN_GGUF:
        raise ConfigError(
            f"{found.path}: general.architecture is {found.architecture or 'missing'}, of which only the storage is "
            f"known; {', '.join(KNOWN_GGUF)} can be verified.",
            hint="See what it holds: quantkit inspect.",
        )
    with GgufReader(path) as model:
        faults = (*KNOWN_GGUF[found.architecture].faults(model), *_row_faults(model, f"{found.architecture}."))
    return faults, tuple(line for line in found.unusual if line not in faults), found.stored_tensors


def _row_faults(model: GgufReader, prefix: str) -> Iterator[str]:
    """Sizes that llama.cpp's graph asserts."""
    experts, used = (model.get(f"{prefix}{key}") for key in ("expert_count", "expert_used_count"))
    groups, kept = (model.get(f"{prefix}expert_group_{key}") for key in ("count", "used_count"))
    if isinstance(experts, int) and isinstance(used, int) and not 0 < used <= experts:
        yield f"{prefix}expert_used_count is {used}, of {experts} experts: llama.cpp ends with an assertion."
    if isinstance(experts, int) and isinstance(groups, int) and groups > 1:
        if groups >= experts or experts % groups:
            yield f"{prefix}expert_group_count is {groups}, which does not divide {experts} experts."
        if not isinstance(kept, int) or not 0 < kept < groups:
            yield f"{prefix}expert_group_used_count is {kept}, 1 to {groups - 1} was needed."
