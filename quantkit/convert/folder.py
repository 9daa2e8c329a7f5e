"""OUT while it is made: everything lies in OUT.partial, under a lock, and one rename gives the finished result its
name.

OUT.partial/lock            held by the living process (flock: the kernel lets go of it however the process dies)
OUT.partial/journal.jsonl   what is done
OUT.partial/replace         present if this job was begun with leave to replace an existing OUT
OUT.partial/hidden/         hidden states at the last layer border
OUT.partial/result/         becomes OUT
OUT.partial/replaced        the older OUT on its way out
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from quantkit.documents.read import CONVERSION
from quantkit.errors import OutputError
from quantkit.formats.preallocated import disk_errors, sync_directory

_JOURNAL, _RESULT, _REPLACE = "journal.jsonl", "result", "replace"


class OutputFolder:
    """The partial folder of one output path, locked for this process."""

    def __init__(self, out: Path, *, restart: bool) -> None:
        """Create or take up ``OUT.partial``. Raises `OutputError` if OUT exists (unless ``restart``, and it is a result
        or empty) or another process works on it."""
        refuse_taken(out, restart=restart)
        self.out = out
        self.partial = _partial(out)
        self._lock = self._locked()
        with disk_errors(self.partial):
            if restart:
                self._clear()
                self._replace.touch()
            for folder in (self.result, self.hidden):
                folder.mkdir(exist_ok=True)

    @property
    def result(self) -> Path:
        """The folder that becomes OUT."""
        return self.partial / _RESULT

    @property
    def hidden(self) -> Path:
        """Hidden states at the last finished layer, and scratch."""
        return self.partial / "hidden"

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.partial / _JOURNAL

    @property
    def reserved_bytes(self) -> int:
        """Disk that the result takes already."""
        return sum(path.stat().st_blocks * 512 for path in self.result.rglob("*") if path.is_file())

    def publish(self) -> None:
        """Give the result its final name. An older OUT is replaced only now."""
        with disk_errors(self.out):
            if self._replace.exists() and _exists(self.out):
                _remove(self._replaced)
                self.out.rename(self._replaced)
            self.result.rename(self.out)
            sync_directory(self.out.parent)
        # OUT is complete. What cannot be removed now, or after a kill, does no harm.
        shutil.rmtree(self.partial, ignore_errors=True)

    def close(self) -> None:
        """Let another process take it up."""
        os.close(self._lock)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _replace(self) -> Path:
        return self.partial / _REPLACE

    @property
    def _replaced(self) -> Path:
        return self.partial / "replaced"

    def _locked(self) -> int:
        """Descriptor of the lock file of this folder, which exists from now on."""
        while True:
            try:
                self.partial.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.partial / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise OutputError(
                    f"{self.partial}: cannot be created: {error.strerror}.", hint="Choose another -o."
                ) from error
            self._take_lock(lock)
            if _is_file_of(lock, self.partial / "lock"):
                return lock
            os.close(lock)  # its last holder finished, and removed the folder, between our open and our lock

    def _take_lock(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OutputError(f"{self.partial}: cannot be locked: {error.strerror}.") from error
            raise OutputError(
                f"{self.partial}: another process is working on it.", hint="Wait for it, or choose another -o."
            ) from None

    def _clear(self) -> None:
        # The journal goes first: without it a folder that is half cleared is nobody's unfinished job.
        self.journal.unlink(missing_ok=True)
        for entry in self.partial.iterdir():
            if entry.name != "lock":
                _remove(entry)


def refuse_to_lose(out: Path, *kept: Path) -> None:
    """Raise `OutputError` if OUT, which may be replaced, is or holds one of ``kept``: source, texts, the user."""
    for path in kept:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise OutputError(
                f"{out}: is or holds {path.resolve()}, which would be replaced.", hint="Choose another -o."
            )


def refuse_taken(out: Path, *, restart: bool) -> None:
    """Raise `OutputError` if no job may begin, or go on, at OUT: it names no folder, or stands there already (unless
    ``restart``, and it is a result or empty). Touches nothing."""
    if out.name in ("", ".."):
        raise OutputError(f"{out}: names no new folder.", hint="Give the folder a name, -o NAME.")
    if not _exists(out):
        return
    partial = _partial(out)
    # A restarted job may replace OUT, also after it was killed and taken up again.
    published = (partial / _JOURNAL).exists() and not (partial / _RESULT).exists()
    if not restart and (published or not (partial / _REPLACE).exists()):
        raise OutputError(f"{out}: exists already.", hint="Choose another -o, or replace it with --restart.")
    if restart and not _is_result(out):
        raise OutputError(
            f"{out}: is no folder that quantkit made, and --restart would delete it.",
            hint="Choose another -o, or remove it yourself.",
        )


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _exists(path: Path) -> bool:
    """Whether the name is taken, be it by a link that leads nowhere."""
    return os.path.lexists(path)


def _is_result(out: Path) -> bool:
    """Whether a folder is a result: of one output, or a folder for each of several. So is one without anything, and a
    link, of which only the name goes."""
    if out.is_symlink():
        return True
    if not out.is_dir():
        return False
    return (out / CONVERSION).is_file() or all((entry / CONVERSION).is_file() for entry in out.iterdir())


def _is_file_of(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
