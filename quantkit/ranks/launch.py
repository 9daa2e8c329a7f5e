"""``quantkit convert --gpus N``: starts N processes of the same command on this machine, a rank each, and watches them.

One that fails ends all. What a rank has to say it says itself; that one was killed, only who watches it can tell.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from quantkit.ranks.places import LAUNCHED

GRACE_S = 5.0
"""So long a rank has to end by itself when another has failed."""
POLL_S = 0.05
SILENT = 3
"""With this code a launched rank ends that lost another one: it leaves the line to the launcher."""
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the ranks ended: the exit code of all, and what is to be said, "" if a rank has said it."""

    code: int
    message: str = ""


def launch(count: int, arguments: Sequence[str]) -> Outcome:
    """Run ``python -m quantkit`` with these arguments in ``count`` processes. Ctrl-C and SIGTERM reach all of them."""
    port = _free_port()
    ranks = [_started(number, count, port, arguments) for number in range(count)]
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        if number == signal.SIGTERM:  # the terminal sends Ctrl-C to all of them itself
            _signal(ranks, signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        failed = _first_failed(ranks, lambda: bool(stopped))
    finally:
        _end(ranks)
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        return Outcome(INTERRUPTED)
    return Outcome(0) if failed is None else _outcome(failed, ranks[failed].returncode)


def _started(number: int, count: int, port: int, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    place = {
        "RANK": number,
        "WORLD_SIZE": count,
        "LOCAL_RANK": number,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        LAUNCHED: 1,
    }
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    return subprocess.Popen([sys.executable, "-m", "quantkit", *arguments], env=environment)


def _first_failed(ranks: Sequence[subprocess.Popen[bytes]], stopped: Callable[[], bool]) -> int | None:
    """Wait until all are done (None), all are to stop (None), or one has failed: its number. One that was killed goes
    before those that lost it."""
    while not stopped():
        codes = [rank.poll() for rank in ranks]
        failed = [number for number, code in enumerate(codes) if code]
        if failed:
            time.sleep(POLL_S * 4)  # who caused it may be seen a moment after who felt it
            return min(failed, key=lambda number: _blame(ranks[number].poll()))
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL_S)
    return None


def _blame(code: int | None) -> int:
    """0: killed, 1: failed and said why, 2: lost another one."""
    return 2 if code == SILENT else 1 if code is not None and code > 0 else 0


def _outcome(number: int, code: int) -> Outcome:
    if code < 0:
        return Outcome(1, f"rank {number} was killed ({signal.Signals(-code).name}): all ranks were stopped.")
    if code == SILENT:
        return Outcome(1, f"rank {number} waited for another one in vain: all ranks were stopped.")
    return Outcome(code)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that still run, by force if need be: files are such that this harms nothing."""
    _signal(ranks, signal.SIGTERM)
    end = time.monotonic() + GRACE_S
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
        time.sleep(POLL_S)
    _signal(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def _signal(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
