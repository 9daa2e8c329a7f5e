"""Threads that fetch pieces: those that a reader waits for first, then those that were announced, in their order.

What was announced is fetched while pieces that were read make room for it, and waits otherwise. What fails ahead of its
use is forgotten: who needs it asks again, and hears why.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future

from quantkit.errors import SourceError
from quantkit.formats.remote.fetch import Fetcher
from quantkit.formats.remote.files import RemoteFile
from quantkit.formats.remote.pieces import FilePiece, Pieces

READERS = 16
"""Requests at once. One connection to a hub or bucket brings 50 to 100 MB a second."""


class Ahead:
    """An open resource: `close` ends the threads. ``files``: by identity, may grow."""

    def __init__(
        self, fetcher: Fetcher, pieces: Pieces, files: Mapping[str, RemoteFile], readers: int = READERS
    ) -> None:
        self._fetcher = fetcher
        self._pieces = pieces
        self._files = files
        self._changed = threading.Condition()
        self._urgent: deque[FilePiece] = deque()
        self._announced: OrderedDict[FilePiece, None] = OrderedDict()
        self._waiting: dict[FilePiece, Future[bytearray]] = {}
        self._ended = False
        self._threads = [threading.Thread(target=self._work, name="fetch", daemon=True) for _ in range(readers)]
        for thread in self._threads:
            thread.start()

    def want(self, piece: FilePiece) -> Future[bytearray]:
        """The piece's bytes, soon. The future raises `SourceError`, or `OutputError` for a full disk."""
        with self._changed:
            future = self._waiting.get(piece)
            if future is None:
                future = self._waiting[piece] = Future()
                self._announced.pop(piece, None)
                self._urgent.append(piece)
                self._changed.notify()
            return future

    def announce(self, pieces: Iterable[FilePiece]) -> None:
        """These will be wanted, in this order. Returns at once."""
        with self._changed:
            for piece in pieces:
                if piece not in self._waiting and not self._pieces.has(piece):
                    self._announced[piece] = None
            self._changed.notify_all()

    def is_coming(self, piece: FilePiece) -> bool:
        """Whether it is being fetched, or announced."""
        with self._changed:
            return piece in self._waiting or piece in self._announced

    def made_room(self) -> None:
        """Pieces were read, which may go now."""
        with self._changed:
            if self._announced:
                self._changed.notify()

    def close(self) -> None:
        """End the threads. Who still waits hears that it was closed."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._fetcher.stop()
        for thread in self._threads:
            thread.join()
        for future in self._waiting.values():
            future.set_exception(SourceError("the source was closed while it was read."))

    def _work(self) -> None:
        while (piece := self._next()) is not None:
            data, problem = bytearray(), None
            try:
                data = self._got(piece)
            except BaseException as error:  # noqa: BLE001 -- raised again in the thread that waits
                problem = error
            with self._changed:
                future = self._waiting.pop(piece)
                self._changed.notify_all()
            if problem is None:
                future.set_result(data)
            else:
                future.set_exception(problem)

    def _next(self) -> FilePiece | None:
        """The next piece, with room for it, as one that is waited for; None at the end."""
        with self._changed:
            while not self._ended:
                if self._urgent:
                    piece = self._urgent.popleft()
                    self._pieces.reserve(piece.nbytes, urgent=True)
                    return piece
                if self._announced:
                    piece = next(iter(self._announced))
                    if self._pieces.reserve(piece.nbytes, urgent=False):
                        del self._announced[piece]
                        self._waiting[piece] = Future()
                        return piece
                self._changed.wait()
            return None

    def _got(self, piece: FilePiece) -> bytearray:
        try:
            data = self._fetcher.fetch(self._files[piece.identity], piece.start, piece.stop)
        except BaseException:
            self._pieces.release(piece.nbytes)
            raise
        self._pieces.put(piece, data)
        return data
