"""OUT while it is made: everything lies in OUT.partial, under a lock, and one rename gives the finished result its
name.

OUT.partial/lock            held by the living process (flock: the kernel lets go of it when the process dies, however
it dies) OUT.partial/journal.jsonl   what is done
OUT.partial/replace         present if this job was begun with leave to replace an existing OUT
OUT.partial/hidden/         hidden states at the last layer border
OUT.partial/result/         becomes OUT
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from quantkit.errors import OutputError


class OutputFolder:
    """The partial folder of one output path, locked for this process."""

    def __init__(self, out: Path, *, restart: bool) -> None:
        """Create or take up ``OUT.partial``. Raises `OutputError` if OUT exists (unless ``restart``) or another process
        works on it."""
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self._replace = (
            self.partial / "replace"
        )  # a restarted job may replace OUT, also after it was killed and taken up again
        if (out.exists() or out.is_symlink()) and not (restart or self._replace.exists()):
            raise OutputError(f"{out}: exists already.", hint="Choose another -o, or replace it with --restart.")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.partial / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(
                f"{self.partial}: cannot be created: {error.strerror}.", hint="Choose another -o."
            ) from error
        self._take_lock()
        if restart:
            self._clear()
            self._replace.touch()
        for folder in (self.result, self.hidden):
            folder.mkdir(exist_ok=True)

    @property
    def result(self) -> Path:
        """The folder that becomes OUT."""
        return self.partial / "result"

    @property
    def hidden(self) -> Path:
        """Hidden states at the last finished layer, and scratch."""
        return self.partial / "hidden"

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.partial / "journal.jsonl"

    def publish(self) -> None:
        """Give the result its final name. An older OUT is replaced only now."""
        old = self.out.with_name(self.out.name + ".old")
        if self._replace.exists() and self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.result.rename(self.out)
        _sync_folder(self.out.parent)
        shutil.rmtree(self.partial)
        shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """Let another process take it up."""
        os.close(self._lock)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OutputError(f"{self.partial}: cannot be locked: {error.strerror}.") from error
            raise OutputError(
                f"{self.partial}: another process is working on it.", hint="Wait for it, or choose another -o."
            ) from None

    def _clear(self) -> None:
        for entry in self.partial.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
