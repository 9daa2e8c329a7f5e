"""Ranks as forks of the test's process: torch is loaded already, so a test of four of them takes seconds."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.ranks.connect import connected
from quantkit.ranks.places import RankPlace
from quantkit.ranks.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Ended:
    """How a rank ended: what its function gave, the error that it was refused with, or the signal that killed it."""

    value: Any = None
    error: QuantkitError | None = None
    signal: int | None = None


def on_ranks(count: int, work: Callable[[Ranks], Any], timeout: timedelta = timedelta(seconds=60)) -> list[Ended]:
    """Run ``work`` on so many ranks, gloo between them -> how each ended."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = [_forked(RankPlace(n, count, n, count, "127.0.0.1", port), work, timeout, Path(folder))
                    for n in range(count)]  # fmt: skip
        statuses = [os.waitpid(child, 0)[1] for child in children]
        return [_ended(Path(folder) / str(number), status) for number, status in enumerate(statuses)]


def _forked(place: RankPlace, work: Callable[[Ranks], Any], timeout: timedelta, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        ended = _done(place, work, timeout)
        (folder / str(place.number)).write_bytes(pickle.dumps((ended.value, _told(ended.error))))
    except BaseException:  # noqa: BLE001 -- a fork must not go on as the test
        traceback.print_exc()
    finally:
        os._exit(0)


def _done(place: RankPlace, work: Callable[[Ranks], Any], timeout: timedelta) -> Ended:
    try:
        if place.count == 1:
            return Ended(work(ALONE))
        with connected(place, "cpu", timeout) as ranks:
            return Ended(work(ranks))
    except QuantkitError as error:
        return Ended(error=error)


def _told(error: QuantkitError | None) -> tuple[type[QuantkitError], str, str] | None:
    return None if error is None else (type(error), error.message, error.hint)


def _ended(path: Path, status: int) -> Ended:
    if os.WIFSIGNALED(status):
        return Ended(signal=os.WTERMSIG(status))
    assert path.exists(), "a rank failed: see its traceback"
    value, told = pickle.loads(path.read_bytes())
    return Ended(value, None if told is None else told[0](told[1], hint=told[2]))


def values(ended: Sequence[Ended]) -> list[Any]:
    """What the ranks gave, none of which may have failed."""
    for one in ended:
        assert one.error is None, one.error
        assert one.signal is None
    return [one.value for one in ended]
