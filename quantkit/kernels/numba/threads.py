"""How the kernels for processors share their work among threads.

A tile is sixteen rows of one matrix. Tiles don't depend on each other: results are the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

Run = Callable[[int, int], None]
"""run(first, last): tiles [first, last) of a batch, counted through all of its matrices."""
Spread = Callable[[Run, int], None]
"""spread(run, tiles): all of them, each once."""

_PARTS = 2  # pieces of work for each thread: another program may hold one of them up
_LEAST = 16  # tiles of a piece: handing over fewer takes longer than they do


@contextmanager
def spread_over(threads: int) -> Generator[Spread]:
    """Run tiles in so many threads."""
    if threads <= 1:
        yield lambda run, tiles: run(0, tiles)
        return
    with ThreadPoolExecutor(threads) as pool:

        def spread(run: Run, tiles: int) -> None:
            step = max(_LEAST, -(-tiles // (threads * _PARTS)))
            pieces = [(first, min(first + step, tiles)) for first in range(0, tiles, step)]
            if len(pieces) == 1:
                run(*pieces[0])
                return
            for done in [pool.submit(run, *piece) for piece in pieces]:
                done.result()

        yield spread
