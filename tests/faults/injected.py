"""One call that writes fails, or the process ends at it: everything under OUT and OUT.partial, in the order of a run.

Calls are counted where Python hands them to the operating system, so the N-th call of a run is the same in the next.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from quantkit.convert import hidden as hidden_module
from quantkit.errors import QuantkitError
from quantkit.plan.recipe import Recipe
from tests.convert.jobs import files_of, run

FAULTS = ("EIO", "ENOSPC", "short write", "killed before", "killed after")
BY_NAME = ("rename", "replace", "unlink", "rmdir", "mkdir")
BY_FD = ("pwrite", "fsync", "posix_fallocate", "ftruncate")
NEED_SPACE = ("pwrite", "fsync", "posix_fallocate", "mkdir")


def _flip(file: Path, draw: Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def _cut(file: Path, draw: Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def _remove(file: Path, draw: Random) -> None:
    file.unlink()


DAMAGES: dict[str, Callable[[Path, Random], None]] = {"flip": _flip, "cut": _cut, "remove": _remove}
"""What may become of a file while no process works on it."""


@dataclass(slots=True)
class Injected:
    """Counts the calls below ``out``; the one with number ``at`` (never if negative) suffers ``fault``. A full disk
    stays full to the end of the run."""

    out: Path
    at: int = -1
    fault: str = ""
    seen: list[str] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Generator[None]:
        """While this is open, calls are counted and fail. Hidden states are saved after every layer."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hidden_module, "SAVING_PAUSE", 0)
            for name in (*BY_FD, *BY_NAME):
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            yield

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            path = self._place(target)
            if path is None:
                return real(target, *arguments, **options)
            self.seen.append(f"{name} {path}")
            number = len(self.seen) - 1
            if number == self.at and self.fault == "short write" and name == "pwrite":
                return real(target, memoryview(arguments[0])[: max(1, len(arguments[0]) // 2)], *arguments[1:])
            self._fail(number, name)
            try:
                return real(target, *arguments, **options)
            finally:
                if number == self.at and self.fault == "killed after":
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    def _fail(self, number: int, name: str) -> None:
        if number == self.at and self.fault == "killed before":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.at and self.fault == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if number >= self.at >= 0 and self.fault == "ENOSPC" and name in NEED_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _place(self, target: Any) -> str | None:
        """The path below OUT's parent, or None for what is elsewhere."""
        path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(target)
        for root in (self.out, self.out.with_name(self.out.name + ".partial")):
            if path.is_absolute() and path.is_relative_to(root):
                return str(path.relative_to(self.out.parent))
        return None


@dataclass(frozen=True, slots=True)
class FaultyJob:
    """A conversion, the files of an unbroken run, and the calls in which it made them."""

    source: Path
    recipe: Recipe
    files: dict[str, bytes]
    calls: tuple[str, ...]

    @classmethod
    def of(cls, source: Path, recipe: Recipe, out: Path) -> FaultyJob:
        """Run it once, unbroken, into ``out``, after a run that leaves what is measured of the machine in its cache:
        all later runs make the same calls."""
        run(source, recipe, out.with_name("before"))
        watcher = Injected(out)
        with watcher.watching():
            run(source, recipe, out)
        return cls(source, recipe, files_of(out), tuple(watcher.seen))

    def problem(self, out: Path, at: int, fault: str) -> str:
        """Run with one fault, then without: what was wrong, "" if nothing."""
        watcher = Injected(out, at, fault)
        said = self._killed(out, watcher) if fault.startswith("killed") else self._refused(out, watcher)
        if said:
            return said
        if out.exists() and files_of(out) != self.files:
            return "OUT has its name and is not complete"
        return self._finished(out)

    def chain(self, out: Path, draw: Random, most: int = 6) -> tuple[int, str]:
        """Killed at random calls, up to ``most`` times in a row, then run to the end: the kills, and what was wrong."""
        kills = 0
        for _ in range(draw.randrange(1, most + 1)):
            watcher = Injected(out, draw.randrange(len(self.calls)), draw.choice(("killed before", "killed after")))
            if self._killed(out, watcher):
                break  # it came to its end before that call
            kills += 1
            if out.exists() and files_of(out) != self.files:
                return kills, "OUT has its name and is not complete"
        return kills, self._finished(out)

    def tampered(self, out: Path, draw: Random) -> tuple[str, str]:
        """Killed at a random call, then one file of OUT.partial is damaged: what was done, and what was wrong. A
        refusal is right, other bytes in OUT are not."""
        self._killed(out, Injected(out, draw.randrange(len(self.calls)), "killed after"))
        partial = out.with_name(out.name + ".partial")
        files = [path for path in sorted(partial.rglob("*")) if path.is_file() and path.stat().st_size]
        if not files or out.exists():
            return "nothing", ""
        file, damage = draw.choice(files), draw.choice(tuple(DAMAGES))
        DAMAGES[damage](file, draw)
        said = f"{damage} {file.relative_to(partial)}"
        try:
            run(self.source, self.recipe, out)
        except QuantkitError as error:
            return said, f"several lines: {error}" if "\n" in str(error) else ""
        return said, "" if files_of(out) == self.files else "other bytes, without a word"

    def _finished(self, out: Path) -> str:
        """Run once more: what is wrong with what is there then."""
        if not out.exists() or out.with_name(out.name + ".partial").exists():
            try:
                run(self.source, self.recipe, out)
            except QuantkitError as error:
                return f"refused when run again: {error}"
        if out.with_name(out.name + ".partial").exists():
            return "OUT.partial is left"
        found = files_of(out)
        return ", ".join(sorted(name for name in found | self.files if found.get(name) != self.files.get(name)))

    def _refused(self, out: Path, watcher: Injected) -> str:
        """What is wrong with what the run said."""
        try:
            with watcher.watching():
                run(self.source, self.recipe, out)
        except QuantkitError as error:
            return f"several lines: {error}" if "\n" in str(error) else ""
        except OSError as error:
            return f"raised {error!r}"
        return "" if out.exists() else "no error and no OUT"

    def _killed(self, out: Path, watcher: Injected) -> str:
        child = os.fork()
        if child == 0:
            try:
                with watcher.watching():
                    run(self.source, self.recipe, out)
            finally:
                os._exit(1)  # not reached if the kill came
        _, status = os.waitpid(child, 0)
        return "" if os.WIFSIGNALED(status) else "the call was never reached"
