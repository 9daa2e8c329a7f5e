"""Work beside a GPU: reads some tensors ahead of their use, and writes results while the next are computed."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from quantkit.formats.fp8_source import Fp8Source
from quantkit.tensors import TensorInfo

READERS = 4
"""Threads that read and check weights; one of them brings some 3 GB/s from the page cache."""
AHEAD_BYTES = 2 * 2**30
"""What may wait on the GPU, decoded."""
MOST_WAITING = 4
"""Deliveries that may wait: what they hold is GPU memory."""


class AheadSource:
    """Weights on a GPU. Those that were announced are read ahead, by threads into page-locked memory."""

    def __init__(self, source: Fp8Source, device: torch.device) -> None:
        self._source = source
        self._device = device
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._streams = threading.local()
        self._expected: deque[str] = deque()
        self._reading: dict[str, Future[tuple[Tensor, torch.cuda.Event]]] = {}
        self._bytes = 0

    def infos(self) -> Mapping[str, TensorInfo]:
        """See `TensorSource.infos`."""
        return self._source.infos()

    def expect(self, names: Sequence[str]) -> None:
        """These tensors will be read next, in this order. What was expected before and never read is forgotten."""
        self._forget()
        self._expected.extend(names)
        self._advance()

    def read(self, name: str) -> Tensor:
        """The decoded tensor on the GPU. Raises `SourceError` as the source does."""
        future = self._reading.pop(name, None)
        if future is None:
            return self._source.fetch(name, pinned=True).on(self._device)
        tensor, ready = future.result()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(ready)
        tensor.record_stream(current)
        self._bytes -= tensor.nbytes
        self._advance()
        return tensor

    def _fetch(self, name: str) -> tuple[Tensor, torch.cuda.Event]:
        """In a thread: read, then copy and decode on a stream of the thread's own."""
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self._device)
        fetched = self._source.fetch(name, pinned=True)
        with torch.cuda.stream(self._streams.own):
            tensor = fetched.on(self._device)
            return tensor, self._streams.own.record_event()

    def close(self) -> None:
        """End the threads."""
        self._forget()
        self._threads.shutdown(cancel_futures=True)

    def _advance(self) -> None:
        while self._expected and self._bytes < AHEAD_BYTES:
            name = self._expected.popleft()
            self._bytes += self._source.infos()[name].nbytes
            self._reading[name] = self._threads.submit(self._fetch, name)

    def _forget(self) -> None:
        for future in self._reading.values():
            future.cancel()
        self._reading.clear()
        self._expected.clear()
        self._bytes = 0


class Deliveries:
    """Tasks done in order on a thread with a stream of its own on the GPU. A task may read what the GPU has been asked
    to compute before the task was handed over."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: queue.Queue[tuple[Callable[[], None], torch.cuda.Event] | None] = queue.Queue(MOST_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="deliver", daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], None]) -> None:
        """Hand a task over. Raises what an earlier one has raised."""
        self._raise()
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        self._waiting.put((task, ready))

    def drain(self) -> None:
        """Wait until all tasks are done. Raises what one of them has raised."""
        self._waiting.join()
        self._raise()

    def close(self) -> None:
        """Finish the tasks at hand and end the thread. What they raise is lost: `drain` first."""
        self._waiting.put(None)
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        stream = torch.cuda.Stream(self._device)
        while (entry := self._waiting.get()) is not None:
            task, ready = entry
            if self._error is None:
                try:
                    with torch.cuda.stream(stream):
                        stream.wait_event(ready)
                        task()
                        stream.synchronize()
                except BaseException as error:  # noqa: BLE001 -- raised again in the thread that hands tasks over
                    self._error = error
            del entry, task  # the GPU memory that they hold
            self._waiting.task_done()
        self._waiting.task_done()
