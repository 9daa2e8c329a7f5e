"""What a conversion has finished, one JSON line each, synced before the next step begins.

Line 1 names the job: recipe, source, text, versions. A resumed run must state the same, or is told what differs. The
bytes that a later line vouches for are on the disk before the line is. Each later line ends in a CRC-32 of all that was
said up to it. The journal ends before the first line that is torn by a kill, damaged or edited, or no entry, and the
steps of the lines after it are done again.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from quantkit.documents.journal import ENTRY, JournalHeader, LayerEntry, OutsideEntry, TensorRecord
from quantkit.errors import OutputError
from quantkit.formats.checksums import WrittenRange
from quantkit.formats.preallocated import disk_errors, sync_directory
from quantkit.formats.safetensors.header import printable

_CHECKSUM = b',"crc32":'
"""Follows the last value of an entry."""


class End(NamedTuple):
    """Of a line: bytes of the file up to here, and the CRC-32 of all lines up to here without their checksums."""

    size: int
    crc32: int


class Journal:
    """An append-only file of entries. ``entries`` holds those after the header."""

    def __init__(self, path: Path, header: JournalHeader, source: Path) -> None:
        """Start a journal, or take one up. Raises `OutputError` if it belongs to another job, naming every difference,
        or if a shard of the checkpoint in folder ``source`` changed since it was begun."""
        self._path = path
        found, self.entries, self._ends = _read(path)
        if found is not None:
            _refuse_other_job(path, found, header, source)
        with disk_errors(path):
            # Unbuffered: what a full disk refused must not be written again when the file is closed.
            self._file = path.open("wb" if found is None else "r+b", buffering=0)
            self._file.truncate(self._file.seek(self._ends[-1].size if found is not None else 0))
        if found is not None:
            return
        try:
            self._append(header)
            with disk_errors(path):
                sync_directory(path.parent)
        except OutputError:
            self._file.close()
            raise

    def append(self, entry: OutsideEntry | LayerEntry) -> None:
        """Record a finished step. Returns when it is on the disk."""
        self._append(entry)
        self.entries.append(entry)

    def rewind(self, n_entries: int) -> None:
        """Forget all but the first entries: their steps will be done again."""
        if n_entries == len(self.entries):
            return
        with disk_errors(self._path):
            self._file.truncate(self._file.seek(self._ends[n_entries].size))
            os.fsync(self._file.fileno())
        del self.entries[n_entries:], self._ends[n_entries + 1 :]

    @property
    def layers(self) -> list[LayerEntry]:
        """The finished layers, in the order of the work."""
        return [entry for entry in self.entries if isinstance(entry, LayerEntry)]

    @property
    def outside_done(self) -> bool:
        """Whether the tensors outside the layers are written."""
        return any(isinstance(entry, OutsideEntry) for entry in self.entries)

    def tensors_of(self, output: int) -> dict[str, TensorRecord]:
        """What an output quantised, by name: first outside the layers, then in the order of the work."""
        entries = sorted(self.entries, key=lambda entry: isinstance(entry, LayerEntry))
        return {record.name: record for entry in entries for record in entry.tensors if record.output == output}

    def steps_of(self, output: int) -> dict[str, tuple[WrittenRange, ...]]:
        """What each finished step wrote into the files of an output, by the step's name."""
        return {_name(entry): entry.written[output] for entry in self.entries if output < len(entry.written)}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, line: JournalHeader | OutsideEntry | LayerEntry) -> None:
        content, end = checked_line(_json(line), self._ends[-1] if self._ends else None)
        with disk_errors(self._path):
            rest = memoryview(content)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        self._ends.append(end)


def _name(entry: OutsideEntry | LayerEntry) -> str:
    return f"layer {entry.layer}" if isinstance(entry, LayerEntry) else "what lies outside the layers"


def checked_line(text: bytes, before: End | None) -> tuple[bytes, End]:
    """A line of JSON ``text`` and its end. The first one (``before``: None) has no checksum: those after it have."""
    crc32 = zlib.crc32(text, before.crc32 if before else 0)
    content = text + b"\n" if before is None else b"%b%b%d}\n" % (text[:-1], _CHECKSUM, crc32)
    return content, End(len(content) + (before.size if before else 0), crc32)


def _json(line: JournalHeader | OutsideEntry | LayerEntry) -> bytes:
    return line.model_dump_json(by_alias=True).encode()


def _read(path: Path) -> tuple[JournalHeader | None, list[OutsideEntry | LayerEntry], list[End]]:
    """The header (None: there is none), every entry up to the first line that is none, and the ends of all these
    lines."""
    if not path.exists():
        return None, [], []
    with disk_errors(path):
        first, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    header = _header(path, first)
    if header is None:
        return None, [], []
    entries: list[OutsideEntry | LayerEntry] = []
    ends = [checked_line(first.removesuffix(b"\n"), None)[1]]
    for line in lines:
        entry = _entry(line, ends[-1])
        if entry is None:
            break
        entries.append(entry)
        ends.append(checked_line(_json(entry), ends[-1])[1])
    return header, entries, ends


def _header(path: Path, line: bytes) -> JournalHeader | None:
    """None for a line that a kill has torn: then nothing else is finished."""
    try:
        return JournalHeader.model_validate_json(line) if line.endswith(b"\n") else None
    except ValidationError as error:
        if any(problem["type"] == "json_invalid" for problem in error.errors()):
            return None
        raise OutputError(
            f"{path.parent}: holds an unfinished job that this version does not know.",
            hint="Finish it with the version that began it, or begin anew with --restart.",
        ) from None


def _entry(line: bytes, before: End) -> OutsideEntry | LayerEntry | None:
    """None for a line that `Journal.append` did not write here."""
    try:
        entry = ENTRY.validate_json(line.rpartition(_CHECKSUM)[0] + b"}")
    except ValidationError:
        return None
    return entry if checked_line(_json(entry), before)[0] == line else None


def _refuse_other_job(path: Path, found: JournalHeader, wanted: JournalHeader, source: Path) -> None:
    was, changed = found.job.bytes_follow_from(), _changed_files(found, wanted, source)
    now = wanted.job.bytes_follow_from()
    different = [_difference(key, was.get(key), now[key]) for key in now if was.get(key) != now[key]]
    if different:
        raise OutputError(
            f"{path.parent}: holds an unfinished job that differs from this one: {'; '.join(different)}."
            f"{f' {changed}.' if changed else ''}",
            hint="Finish it with the same command and files, or begin anew with --restart.",
        )
    if changed:
        raise OutputError(
            f"{changed}.",
            hint="Finished layers may be of other weights, and a copy counts as changed: begin anew with --restart.",
        )


def _difference(key: str, was: object, now: object) -> str:
    """ "threads (2 then, 1 now)", "memory budget (14 GiB then, 1 GiB now)"; of digests only what they are of."""
    if key == "origin":
        return f"{key} ({was or 'a folder'} then, {now} now)"
    if not isinstance(now, int):
        return key
    then, today = (f"{n / 2**30:.10g} GiB" if key == "memory budget" and isinstance(n, int) else n for n in (was, now))
    return f"{key} ({then} then, {today} now)"


def _changed_files(found: JournalHeader, wanted: JournalHeader, source: Path) -> str:
    """Which shards are not the files that they were, "" if all are."""
    was, now = found.source_files, wanted.source_files
    changed = sorted(file for file in was.keys() | now.keys() if was.get(file) != now.get(file))
    if not changed:
        return ""
    others = f" and {len(changed) - 1:,} other{'s' * (len(changed) > 2)}" if len(changed) > 1 else ""
    return f"{source / printable(changed[0])}{others} changed since this job began"
