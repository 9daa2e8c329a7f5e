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
        self._file = path.open("r+b" if lines else "wb")
        whole = b"".join(_line(entry) for entry in lines)
        self._file.seek(len(whole))
        self._file.truncate()
        if not lines:
            self._append(dict(header))

    def append(self, entry: Entry) -> None:
        """Record a finished step. Returns when it is on the disk."""
        self._append(entry)
        self.entries.append(entry)

    def of_kind(self, kind: str) -> list[Entry]:
        """Entries whose "done" is ``kind``, oldest first."""
        return [entry for entry in self.entries if entry["done"] == kind]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, entry: Entry) -> None:
        try:
            self._file.write(_line(entry))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self._path}: {error.strerror}.",
                hint="Free space and run the same command again: it goes on from here.",
            ) from error


def _line(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _read_lines(path: Path) -> list[Entry]:
    """Every whole entry; what follows the first torn or damaged line is gone."""
    if not path.exists():
        return []
    entries: list[Entry] = []
    for line in path.read_bytes().splitlines(keepends=True):
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
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise OutputError(
            f"{path.parent}: holds an unfinished job with another {', '.join(different)}.",
            hint="Finish it with the same command and files, or begin anew with --restart.",
        )
