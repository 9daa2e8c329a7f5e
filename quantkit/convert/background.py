"""Work beside the computation: tensors are read ahead of their use, and results written while the next are made.

A GPU leaves its processors free for it. On a processor the threads would only take turns with the computation.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from quantkit.formats.model_source import ModelSource
from quantkit.kernels.backend import PRIORITY
from quantkit.plan.phases import MOST_WAITING, READ_AHEAD_BYTES
from quantkit.tensors import TensorInfo

READERS = 4
"""Threads that read weights, each of which waits for its GPU work."""


class DirectSource:
    """Weights that are read when they are asked for, in the processor's memory."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source

    def infos(self) -> Mapping[str, TensorInfo]:
        """See `TensorSource.infos`."""
        return self._source.infos()

    def expect(self, names: Sequence[str]) -> None:
        """Nothing is read ahead."""

    def read(self, name: str) -> Tensor:
        """The decoded tensor. Raises `SourceError` as the source does."""
        return self._source.read(name)


class AheadSource:
    """Weights on the device that computes. Those that were announced are read ahead by threads; for a GPU into
    page-locked memory, copied, decoded and checked on streams of the threads' own."""

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        self._source = source
        self._device = device
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._lanes = threading.local()
        self._expected: deque[str] = deque()
        self._reading: dict[str, Future[tuple[Tensor, torch.cuda.Event | None]]] = {}
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
        """The decoded tensor on the device. Raises `SourceError` as the source does."""
        future = self._reading.pop(name, None)
        if future is None:
            return self._source.read_on(name, self._device)
        tensor, made = future.result()
        _wait_for(made, self._device)
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(self._device))
        self._bytes -= self._source.infos()[name].nbytes
        self._advance()
        return tensor

    def close(self) -> None:
        """End the threads."""
        self._forget()
        self._threads.shutdown(cancel_futures=True)

    def _read_in_thread(self, name: str) -> tuple[Tensor, torch.cuda.Event | None]:
        if not hasattr(self._lanes, "own"):
            self._lanes.own = _lane(self._device)
        with self._lanes.own:
            return self._source.read_on(name, self._device), _mark(self._device)

    def _advance(self) -> None:
        while self._expected and self._bytes < READ_AHEAD_BYTES:
            name = self._expected.popleft()
            self._bytes += self._source.infos()[name].nbytes
            self._reading[name] = self._threads.submit(self._read_in_thread, name)

    def _forget(self) -> None:
        for future in self._reading.values():
            future.cancel()
        self._reading.clear()
        self._expected.clear()
        self._bytes = 0


class Deliveries:
    """Tasks done in order on a thread, for a GPU on a stream of its own. A task may read what the device has been asked
    to compute before the task was handed over."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: queue.Queue[tuple[Callable[[], None], torch.cuda.Event | None] | None] = queue.Queue(
            MOST_WAITING
        )
        self._error: BaseException | None = None
        self._lane = _lane(device)
        self._thread = threading.Thread(target=self._work, name="deliver", daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], None]) -> None:
        """Hand a task over. Raises what an earlier one has raised."""
        self._raise()
        self._waiting.put((task, _mark(self._device)))

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
        with self._lane:
            while (entry := self._waiting.get()) is not None:
                if self._error is None:
                    self._do(*entry)
                del entry  # the GPU memory that it holds
                self._waiting.task_done()
            self._waiting.task_done()

    def _do(self, task: Callable[[], None], ready: torch.cuda.Event | None) -> None:
        try:
            _wait_for(ready, self._device)
            task()
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        except BaseException as error:  # noqa: BLE001 -- raised again in the thread that hands tasks over
            self._error = error


@contextmanager
def foreground(device: torch.device) -> Generator[None]:
    """The computation that the threads work beside: what it asks of a GPU goes before what they ask. It has a stream
    of its own; the memory that torch keeps for that is given back at the end."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device, priority=PRIORITY)):
        yield
    torch.cuda.empty_cache()


def _lane(device: torch.device) -> AbstractContextManager[object]:
    """A stream of its own on a GPU, for the thread that enters it."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """What the current stream has been asked to do so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _wait_for(mark: torch.cuda.Event | None, device: torch.device) -> None:
    """Let the current stream wait; the processor goes on."""
    if mark is not None:
        torch.cuda.current_stream(device).wait_event(mark)
