"""What a conversion has finished, one JSON line each, synced before the next step begins.

Line 1 names the job: recipe, source, text, versions. A resumed run must state the same, or is told what differs. The
bytes that a later line vouches for are on the disk before the line is. A line torn by a kill is ignored, and so is its
step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from quantkit.errors import OutputError
from quantkit.formats.safetensors.writer import disk_errors

Entry = dict[str, object]


class Journal:
    """An append-only file of entries. ``entries`` holds those after the header."""

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        """Start a journal, or take one up. Raises `OutputError` if it belongs to another job, naming every
        difference."""
        self._path = path
        lines = _read_lines(path)
        self.entries: list[Entry] = lines[1:]
        if lines:
            _refuse_other_job(path, lines[0], header)
        with disk_errors(path):
            # Unbuffered: what a full disk refused must not be written again when the file is closed.
            self._file = path.open("r+b" if lines else "wb", buffering=0)
            self._file.truncate(self._file.seek(sum(len(_line(entry)) for entry in lines)))
        if lines:
            return
        try:
            self._append(dict(header))
        except OutputError:
            self._file.close()
            raise

    def append(self, entry: Entry) -> None:
        """Record a finished step. Returns when it is on the disk."""
        self._append(entry)
        self.entries.append(entry)

    def rewind(self, n_entries: int) -> None:
        """Forget all but the first entries: their steps will be done again."""
        if n_entries == len(self.entries):
            return
        lost = sum(len(_line(entry)) for entry in self.entries[n_entries:])
        with disk_errors(self._path):
            self._file.truncate(self._file.seek(-lost, os.SEEK_END))
            os.fsync(self._file.fileno())
        del self.entries[n_entries:]

    def of_kind(self, kind: str) -> list[Entry]:
        """Entries whose "done" is ``kind``, oldest first."""
        return [entry for entry in self.entries if entry["done"] == kind]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, entry: Entry) -> None:
        with disk_errors(self._path):
            rest = memoryview(_line(entry))
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _read_lines(path: Path) -> list[Entry]:
    """Every whole entry; what follows the first torn or damaged line is gone."""
    if not path.exists():
        return []
    entries: list[Entry] = []
    with disk_errors(path):
        content = path.read_bytes()
    for line in content.splitlines(keepends=True):
        try:
            value: object = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict) or not line.endswith(b"\n"):
            break
        entry = cast("Entry", value)
        if _line(entry) != line:
            break
        entries.append(entry)
    return entries


def _refuse_other_job(path: Path, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    different = [
        f"{key} ({found.get(key)}, now {value})" if isinstance(value, int) else key
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if different:
        raise OutputError(
            f"{path.parent}: holds an unfinished job with another {', '.join(different)}.",
            hint="Finish it with the same command and files, or begin anew with --restart.",
        )
