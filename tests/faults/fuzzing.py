"""Many damaged files for one reader, each of which it must read or refuse: a `QuantkitError` in one printable message,
5 s of CPU time and 500 MB at most.

The reader runs in a forked process, so that a crash of a library is found too. Case number n depends on the seed, the
reader's name and n alone.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

from quantkit.errors import QuantkitError

CPU_SECONDS = 5.0
EXTRA_BYTES = 500_000_000
HARD_BYTES = 2_000_000_000
"""Address space beyond what the process has: a bomb fails in here, and not the machine."""
MESSAGE_CHARACTERS = 4000
_NOT_BEGUN = bytes([255] * 8)


@dataclass(frozen=True, slots=True)
class Reader:
    """Something that reads files of strangers.

    ``file``: where a case lies; ``damaged(draw)``: the bytes of one; ``sound``: bytes that are read without complaint;
    ``read()``: reads the file as a command would. ``binary``: of numbers, not of text.
    """

    name: str
    file: Path
    sound: bytes
    damaged: Callable[[Random], bytes]
    read: Callable[[], object]
    binary: bool


@dataclass(slots=True)
class Found:
    """What became of the cases. ``problems``: what was wrong -> the numbers of the first cases."""

    cases: int = 0
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest_cpu_seconds: float = 0.0
    extra_bytes: int = 0
    problems: dict[str, list[int]] = field(default_factory=dict)

    def problem(self, what: str, case: int) -> None:
        cases = self.problems.setdefault(what, [])
        if len(cases) < 5:
            cases.append(case)


class TooSlow(BaseException):
    """Five seconds of CPU time have passed. No reader's own handler catches it."""


def fuzz(reader: Reader, seed: int, cases: range) -> Found:
    """Try the ``cases``; a process that dies is a problem of the case that it was at, and the next one goes on."""
    found = Found()
    start = time.monotonic()
    at = mmap.mmap(-1, 8)
    while cases:
        at[:8] = _NOT_BEGUN
        part = _in_child(reader, seed, cases, at)
        if part is None:
            if at[:8] == _NOT_BEGUN:
                raise AssertionError(f"{reader.name}: the sound file was not read")
            reached = int.from_bytes(at[:8], "little")
            part = Found(cases=cases.index(reached) + 1)
            part.problem("the process died", reached)
        cases = cases[part.cases :]
        _add(found, part)
    found.seconds = round(time.monotonic() - start, 1)
    return found


def case_of(reader: Reader, seed: int, number: int) -> bytes:
    """The bytes of a case."""
    return reader.damaged(Random(f"{seed} {reader.name} {number}"))


def _in_child(reader: Reader, seed: int, cases: range, at: mmap.mmap) -> Found | None:
    """None if the process did not come to its end."""
    answer, asked = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()  # pytest's: a crash is told as a problem, not as a dump of every thread
            os.close(answer)
            with os.fdopen(asked, "w") as pipe:
                json.dump(asdict(_cases(reader, seed, cases, at)), pipe)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - said here, because nothing may return into the parent's frames
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(asked)
    with os.fdopen(answer) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return Found(**json.loads(text)) if status == 0 else None


def _cases(reader: Reader, seed: int, cases: range, at: mmap.mmap) -> Found:
    found = Found()
    reader.file.write_bytes(reader.sound)
    reader.read()  # what is loaded at the first call is no case's doing
    _limit_memory()
    signal.signal(signal.SIGPROF, _too_slow)
    before = _peak_bytes()
    for number in cases:
        at[:8] = number.to_bytes(8, "little")
        _try(reader, case_of(reader, seed, number), number, found)
        extra = _peak_bytes() - before
        if extra > EXTRA_BYTES >= found.extra_bytes:
            found.problem("memory", number)
        found.extra_bytes = extra
    return found


def _try(reader: Reader, content: bytes, number: int, found: Found) -> None:
    _replace(reader.file, content)
    found.cases += 1
    start = time.process_time()
    try:
        _in_time(reader.read)
        found.read += 1
    except QuantkitError as error:
        found.refused += 1
        if said := _unprintable(error):
            found.problem(said, number)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what this looks for
        found.problem(_place(error), number)
    found.slowest_cpu_seconds = max(found.slowest_cpu_seconds, round(time.process_time() - start, 2))


def _in_time(read: Callable[[], object]) -> None:
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        read()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _replace(file: Path, content: bytes) -> None:
    """A new file each time: what a case left open, or mapped, is not changed."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def _unprintable(error: QuantkitError) -> str:
    """What is wrong with a message, "" if nothing is. A recipe's or plan's faults are lines."""
    text = str(error)
    if not all(line.isprintable() for line in text.split("\n")):
        return "control characters in a message"
    return "a long message" if len(text) > MESSAGE_CHARACTERS else ""


def _place(error: BaseException) -> str:
    """ "KeyError at quantkit/plan/headers.py:12: 'x'": the last frame of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/quantkit/" in frame.filename and "site-packages" not in frame.filename]
    frame = (ours or frames)[-1]
    inside = frame.filename.rpartition("/quantkit/")[2]
    return f"{type(error).__name__} at {inside}:{frame.lineno}: {ascii(str(error))[:100]}"


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + HARD_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow(f"no end after {CPU_SECONDS} s")


def _add(found: Found, part: Found) -> None:
    found.cases += part.cases
    found.read += part.read
    found.refused += part.refused
    found.slowest_cpu_seconds = max(found.slowest_cpu_seconds, part.slowest_cpu_seconds)
    found.extra_bytes = max(found.extra_bytes, part.extra_bytes)
    for what, numbers in part.problems.items():
        for case in numbers:
            found.problem(what, case)


def empty_folder(path: Path) -> Path:
    """Made anew."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path
