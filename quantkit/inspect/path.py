"""`inspect_path`: whatever lies under a path, by its kind."""

from __future__ import annotations

import os
from pathlib import Path

from quantkit.documents.sensitivity import PROGRESS, SENSITIVITY
from quantkit.errors import SourceError
from quantkit.formats.gguf.header import is_gguf
from quantkit.formats.safetensors.header import printable
from quantkit.formats.storage import LOCAL, Storage
from quantkit.inspect.folder import Inspection, inspect_folder
from quantkit.inspect.gguf import GgufInspection, inspect_gguf
from quantkit.inspect.imatrix import ImatrixInspection, inspect_imatrix
from quantkit.inspect.sensitivity import SensitivityInspection, inspect_sensitivity
from quantkit.inspect.storage import NAMES_SHOWN
from quantkit.inspect.trial import TrialInspection, inspect_trial

AnyInspection = Inspection | GgufInspection | ImatrixInspection | TrialInspection | SensitivityInspection
"""What `inspect_path` finds."""


def inspect_path(path: Path, storage: Storage = LOCAL) -> AnyInspection:
    """A folder with safetensors or, if it has none, with a GGUF model; the folder of a Fisher pass; a .gguf file; an
    imatrix file of either form; a trial's report. ``storage``: opens shards.

    Raises `SourceError` for damaged files, and for files of other kinds.
    """

    if any((path / name).is_file() for name in (SENSITIVITY, PROGRESS)):
        return inspect_sensitivity(path)
    if path.is_dir():
        return inspect_gguf(path) if _holds_gguf(path) else inspect_folder(path, storage)
    if not os.path.lexists(path):
        raise SourceError(
            f"{printable(str(path))}: no such file or folder.",
            hint="Give the folder of a checkpoint, a .gguf file, or an imatrix file.",
        )
    if is_gguf(path) or path.suffix == ".gguf":
        return inspect_gguf(path)
    if path.suffix == ".dat" or "imatrix" in path.name:
        return inspect_imatrix(path)
    if path.suffix == ".json" and (trial := inspect_trial(path)) is not None:
        return trial
    raise SourceError(
        f"{path}: is neither a GGUF file nor a folder.",
        hint="Give the folder of a checkpoint, a .gguf file, or an imatrix file.",
    )


def _holds_gguf(folder: Path) -> bool:
    """Whether a folder has GGUF files and no safetensors. Raises `SourceError` if only folders inside it have any."""
    if next(folder.glob("*.safetensors"), None) is not None:
        return False
    if next(folder.glob("*.gguf"), None) is not None:
        return True
    inside = sorted({path.parent.name for end in ("safetensors", "gguf") for path in folder.glob(f"*/*.{end}")})
    if inside:
        more = f" and {len(inside) - NAMES_SHOWN:,} more" if len(inside) > NAMES_SHOWN else ""
        names = ", ".join(inside[:NAMES_SHOWN]) + more
        raise SourceError(
            f"{folder}: holds no checkpoint itself, but folders with one: {names}.",
            hint=f"Give one of them: {folder / inside[0]}",
        )
    return False
