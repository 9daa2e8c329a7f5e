"""The folder of a Fisher pass while it is made: one process at a time, and what an interrupted one had done.

FOLDER/layer-NNNNN.safetensors   in full size from the start
FOLDER/unfinished.json           what is done; gone when sensitivity.json is there
FOLDER/sensitivity.json          the result, written last
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from quantkit.documents.read import document_bytes, parsed_document
from quantkit.documents.sensitivity import (
    PROGRESS,
    SENSITIVITY,
    FisherJob,
    FisherProgress,
    SensitivityDocument,
    read_sensitivity,
)
from quantkit.errors import OutputError, QuantkitError
from quantkit.formats.preallocated import UNFINISHED, disk_errors, sync_directory, write_durably
from quantkit.formats.safetensors.header import printable

_OWN = re.compile(rf"(layer-\d{{5}}\.safetensors|{re.escape(SENSITIVITY)}|{re.escape(PROGRESS)})({UNFINISHED})?")


def refuse_taken(folder: Path, *, restart: bool) -> None:
    """Raise `OutputError` if no pass may begin, or go on, in ``folder``. Touches nothing."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder}: is no folder.", hint="Choose another -o.")
    if not folder.is_dir():
        return
    with disk_errors(folder):
        foreign = sorted(path.name for path in folder.iterdir() if not _OWN.fullmatch(path.name))
        held = any(folder.iterdir())
    if foreign:
        raise OutputError(
            f"{folder}: holds {printable(foreign[0])}, which is of no Fisher pass.", hint="Choose another -o."
        )
    if (folder / SENSITIVITY).exists() and not restart:
        raise OutputError(
            f"{folder}: holds a finished pass {_named(folder)}.",
            hint="Choose another -o, or replace it with --restart.",
        )
    if held and not restart and not (folder / PROGRESS).exists():
        raise OutputError(
            f"{folder}: holds files of a pass that is neither finished nor to be resumed.",
            hint="Choose another -o, or begin anew with --restart.",
        )


def refuse_other_model(folder: Path, fingerprint: str) -> None:
    """Raise `OutputError` if the folder holds a finished pass of another checkpoint than the one with this fingerprint:
    it may have taken hours, and --restart would remove it."""
    if not (folder / SENSITIVITY).exists():
        return
    try:
        found = read_sensitivity(folder)
    except QuantkitError:  # damaged: nothing is lost
        return
    if found.job.source != fingerprint:
        raise OutputError(
            f"{folder}: holds a finished pass of another checkpoint, {found}.",
            hint="Choose another -o, or replace it with --restart --force.",
        )


def _named(folder: Path) -> str:
    """Of which job a finished pass is."""
    try:
        return str(read_sensitivity(folder))
    except QuantkitError:
        return "that cannot be read"


def is_begun(folder: Path) -> bool:
    """Whether the same command would go on with a pass there."""
    return (folder / PROGRESS).exists()


def add_losses(folder: Path, document: SensitivityDocument) -> None:
    """Replace the document of a finished pass by one with more losses; the caller has `locked` the folder. Raises
    `OutputError`."""
    write_durably(folder / SENSITIVITY, document.to_json().encode())


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Keep other processes from changing a folder that exists. Raises `OutputError` if one is at it."""
    with disk_errors(folder):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _take_lock(folder, lock)
        yield
    finally:
        os.close(lock)


def _take_lock(folder: Path, lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise OutputError(f"{folder}: cannot be locked: {error.strerror}.") from error
        raise OutputError(
            f"{folder}: another process is working on it.", hint="Wait for it, or choose another folder."
        ) from None


def _shown(value: object) -> str:
    """A value of a job, in at most a few words."""
    words = printable(str(value))
    return words if len(words) <= 40 else f"{words[:12]}..."


class PassFolder:
    """The folder, locked for this process. Use it in ``with``. ``progress``: of this very job."""

    def __init__(self, folder: Path, job: FisherJob, *, restart: bool) -> None:
        """Begin a pass, or take up the one that is there. Raises `OutputError` as `refuse_taken` does, if another
        process works here, or if the unfinished pass is another job."""
        refuse_taken(folder, restart=restart)
        self.path = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(locked(folder))
            if restart:
                self._clear()
            self.progress = self._progress(job)
            self._open = stack.pop_all()

    def save(self, progress: FisherProgress) -> None:
        """Say what is done, durably."""
        write_durably(self.path / PROGRESS, progress.model_dump_json().encode())
        self.progress = progress

    def finish(self, document: SensitivityDocument) -> None:
        """Write the result; nothing is left to be resumed."""
        write_durably(self.path / SENSITIVITY, document.to_json().encode())
        with disk_errors(self.path):
            (self.path / PROGRESS).unlink()
            sync_directory(self.path)

    def close(self) -> None:
        """Let another process take it up."""
        self._open.close()

    def __enter__(self) -> PassFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _clear(self) -> None:
        """The result goes first, so that what is left of it is not taken for one."""
        with disk_errors(self.path):
            for name in (SENSITIVITY, PROGRESS):
                (self.path / name).unlink(missing_ok=True)
            for path in self.path.iterdir():
                path.unlink()
            sync_directory(self.path)

    def _progress(self, job: FisherJob) -> FisherProgress:
        path = self.path / PROGRESS
        if not path.exists():
            fresh = FisherProgress(job=job)
            self.save(fresh)
            return fresh
        found = parsed_document(path, document_bytes(path), FisherProgress)
        was, now = found.job.model_dump(), job.model_dump()
        different = [
            f"{key.replace('_', ' ')} (found {_shown(was[key])}, needed {_shown(now[key])})"
            for key in now
            if was[key] != now[key]
        ]
        if different:
            raise OutputError(
                f"{self.path}: holds an unfinished pass that differs from this one: {', '.join(different)}.",
                hint="Finish it with the same command and files, or begin anew with --restart.",
            )
        return found
