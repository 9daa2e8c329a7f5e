"""OUT while it is made: everything lies in OUT.partial, under a lock, and one rename gives the finished result its
name.

OUT.partial/lock            held by the living process (flock: the kernel lets go of it however the process dies)
OUT.partial/journal.jsonl   what is done
OUT.partial/replace         present if the job of the journal was begun with leave to replace an existing OUT
OUT.partial/hidden/         hidden states at the last layer border
OUT.partial/scores.json     scores of the experts, if some are pruned
OUT.partial/result/         becomes OUT; gone when it did
OUT.partial/replaced        the older OUT on its way out

When OUT.partial is emptied, the leave to replace goes first: what is left of it never replaces anything.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from quantkit.convert.replaceable import refuse_foreign, results_of, why_foreign
from quantkit.errors import OutputError
from quantkit.formats.preallocated import disk_errors, sync_directory
from quantkit.formats.safetensors.header import printable

_JOURNAL, _RESULT, _REPLACE, _REPLACED, _HIDDEN, _SCORES, _LOCK = (
    "journal.jsonl", "result", "replace", "replaced", "hidden", "scores.json", "lock"
)  # fmt: skip
_EMPTIED = (_REPLACE, _REPLACED, _RESULT, _HIDDEN, _SCORES, _JOURNAL)
"""In this order, so that a folder that is half emptied has no leave to replace."""


class OutputFolder:
    """The partial folder of one output path, locked for this process.

    ``finished``: OUT is complete, and an earlier process was stopped while it removed OUT.partial. Then nothing else is
    made here: see `discard`.
    """

    def __init__(self, out: Path, outputs: Sequence[str], *, restart: bool) -> None:
        """Create or take up ``OUT.partial`` of a job with these outputs. Raises `OutputError` as `refuse_taken` does,
        or if another process works on it."""
        refuse_taken(out, outputs, restart=restart)
        self.out = out
        self.partial = _partial(out)
        self._outputs = tuple(outputs)
        self._lock: int | None = self._locked()
        self.finished = not restart and _exists(out) and not self.result.exists()
        try:
            with disk_errors(self.partial):
                self._begin(restart=restart)
        except OutputError:
            self.close()
            raise

    @classmethod
    def of_first_rank(cls, out: Path, outputs: Sequence[str]) -> OutputFolder:
        """The same folder for another rank of the job, which the first one has locked and prepares. Touches nothing."""
        folder = cls.__new__(cls)
        folder.out, folder.partial, folder.finished = out, _partial(out), False
        folder._outputs, folder._lock = tuple(outputs), None
        return folder

    @property
    def result(self) -> Path:
        """The folder that becomes OUT."""
        return self.partial / _RESULT

    @property
    def hidden(self) -> Path:
        """Hidden states at the last finished layer, and scratch."""
        return self.partial / _HIDDEN

    @property
    def scores(self) -> Path:
        """Scores of the experts, as far as they are known."""
        return self.partial / _SCORES

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self.partial / _JOURNAL

    @property
    def reserved_bytes(self) -> int:
        """Disk that the result takes already."""
        with disk_errors(self.result):
            return sum(path.stat().st_blocks * 512 for path in self.result.rglob("*") if path.is_file())

    def publish(self) -> None:
        """Give the result its final name. An older OUT is replaced only now."""
        if self._replace.exists() and _exists(self.out):
            refuse_foreign(self.out, self._outputs)
        with disk_errors(self.out):
            if self._replace.exists() and _exists(self.out):
                _remove(self._replaced)
                self.out.rename(self._replaced)
            self.result.rename(self.out)
            sync_directory(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Remove OUT.partial when OUT is complete. What cannot be removed now, or after a kill, does no harm: the same
        command removes it."""
        with suppress(OSError):
            for name in _EMPTIED:
                _remove(self.partial / name)
            shutil.rmtree(self.partial)

    def close(self) -> None:
        """Let another process take it up."""
        if self._lock is not None:
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
        return self.partial / _REPLACED

    def _begin(self, *, restart: bool) -> None:
        if restart:
            self._clear()
            self._replace.touch()
        for folder in () if self.finished else (self.result, self.hidden):
            folder.mkdir(exist_ok=True)
        sync_directory(self.partial)
        sync_directory(self.partial.parent)

    def _locked(self) -> int:
        """Descriptor of the lock file of this folder, which exists from now on."""
        while True:
            try:
                self.partial.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise OutputError(
                    f"{self.partial}: cannot be created: {error.strerror}.", hint="Choose another -o."
                ) from error
            self._take_lock(lock)
            if _is_file_of(lock, self.partial / _LOCK):
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
        if self._replaced.exists() and not _exists(self.out):
            self._replaced.rename(self.out)  # a kill came between the two renames of `publish`
        _remove(self._replace)
        sync_directory(self.partial)
        for name in _EMPTIED:
            _remove(self.partial / name)


def refuse_to_lose(out: Path, *kept: Path) -> None:
    """Raise `OutputError` if OUT, which may be replaced, is or holds one of ``kept``: source, texts, the user."""
    for path in kept:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise OutputError(
                f"{out}: is or holds {path.resolve()}, which would be replaced.", hint="Choose another -o."
            )


def refuse_taken(out: Path, outputs: Sequence[str], *, restart: bool) -> None:
    """Raise `OutputError` if no job with these outputs may begin, or go on, at OUT. Touches nothing.

    OUT must name a new folder. One that stands there may be replaced if ``restart``, or if the unfinished job was begun
    so, and it is empty or what a job with the same outputs made. A finished OUT beside what is left of its OUT.partial
    is let pass: whether it is this job's is known when the job is.
    """
    if out.name in ("", ".."):
        raise OutputError(f"{out}: names no new folder.", hint="Give the folder a name, -o NAME.")
    partial = _partial(out)
    with disk_errors(out):
        _refuse_links(out, partial)
        _refuse_mount_point(out)
        _refuse_foreign_partial(partial)
        if not _exists(out):
            return
        may_replace = restart or _may_replace(partial)
    if may_replace:
        refuse_foreign(out, outputs)
    elif not partial.exists() or (partial / _RESULT).exists() or not results_of(out, outputs):
        raise exists_already(out, outputs)


def is_begun(out: Path) -> bool:
    """Whether a job was begun for ``out`` that the same command would take up."""
    return os.path.lexists(_partial(out) / _JOURNAL)


def exists_already(out: Path, outputs: Sequence[str]) -> OutputError:
    """What is said of an OUT that may not be replaced. --restart is named only if it would replace it."""
    problem = why_foreign(out, outputs)
    if problem:
        return OutputError(f"{out}: exists already, and {problem}.", hint="Choose another -o, or remove it yourself.")
    return OutputError(f"{out}: exists already.", hint="Choose another -o, or replace it with --restart.")


def _refuse_links(out: Path, partial: Path) -> None:
    """The rename at the end must stay on one file system, and must not put a folder in the place of a link."""
    for path in (out, partial, partial / _RESULT):
        if path.is_symlink():
            raise OutputError(
                f"{path}: is a link to {path.readlink()}, a folder was needed.",
                hint="Give the folder itself, -o FOLDER: work and result stay on its disk.",
            )
    if partial.is_dir() and partial.stat().st_dev != partial.parent.stat().st_dev:
        raise OutputError(
            f"{partial}: is on another file system than {partial.parent}, where the result gets its name.",
            hint="Choose an -o on the file system that has the space.",
        )


def _refuse_mount_point(out: Path) -> None:
    """A folder that a container was given cannot be replaced by a rename, and its neighbours lie on another disk."""
    if _is_mount_point(out):
        raise OutputError(
            f"{out}: is a mount point, which no finished result can replace.",
            hint=f"Choose a folder in it, -o {shlex.quote(str(out / 'NAME'))}.",
        )


def _is_mount_point(path: Path) -> bool:
    """Also of a folder of the same file system, where `os.path.ismount` sees nothing (mountinfo: proc(5))."""
    if os.path.ismount(path):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return False  # not Linux
    return str(path.resolve()).replace(" ", r"\040") in {mount.split()[4] for mount in mounts}


def _refuse_foreign_partial(partial: Path) -> None:
    """OUT.partial is emptied at the end: it may hold only what a job puts there."""
    known = {_LOCK, *_EMPTIED}
    strangers = sorted(path.name for path in partial.iterdir() if path.name not in known) if partial.is_dir() else []
    if strangers:
        raise OutputError(
            f"{partial}: holds {printable(strangers[0])}, which quantkit did not make.", hint="Choose another -o."
        )


def _may_replace(partial: Path) -> bool:
    """Whether a job was begun here with leave to replace OUT, and is not finished."""
    if not (partial / _REPLACE).exists() or not (partial / _RESULT).exists() or not (partial / _JOURNAL).exists():
        return False
    with (partial / _JOURNAL).open("rb") as journal:
        return journal.readline().endswith(b"\n")


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _exists(path: Path) -> bool:
    """Whether the name is taken, be it by a link that leads nowhere."""
    return os.path.lexists(path)


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
