"""What the machine grants a conversion: device, memory budget, and what follows from it for stores and expert
batches."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from weakref import WeakSet

import torch

from quantkit.arch.base import ModelArch
from quantkit.calibrate.hidden_states import CPU, FileRows, MemoryRows, RowStore
from quantkit.errors import PlanError
from quantkit.kernels.backend import Backend
from quantkit.plan.budget import check_device, default_budget
from quantkit.quantizers.batch import DEVICE_SLICE_BYTES

DEVICE_SHARE = 0.6
"""Of a GPU's memory, for hidden states, if the rest is at least `DEVICE_WORK_BYTES`."""
DEVICE_WORK_BYTES = 24 * 10**9
"""What quantising DeepSeek V3's experts takes on a GPU beside them."""
DEVICE_EXPERTS_SHARE = 0.25
"""Of a GPU's memory, for experts that are quantised as one batch."""
DEVICE_CACHE_SHARE = 0.05
"""Of a GPU's memory, for weights of dense linears."""
MOST_EXPERTS = 32
"""More experts at once gain nothing: a batch of this size fills the matrix products."""


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes for hidden states in memory and on the GPU, for weights kept between batches of rows, and for the experts
    beside the first that are quantised as one batch (on the GPU, if ``on_gpu``)."""

    on_gpu: bool
    stores: int
    device_stores: int
    cache: int
    experts: int

    def experts_at_once(self, arch: ModelArch, inter: int) -> int:
        """Experts of one shape (inter, hidden) that are quantised as a batch."""
        hidden = arch.hidden_size
        # Hessian, cross term, factor, and what making them copies; originals, targets, sweep state, codes, results.
        if self.on_gpu:
            one_slice = DEVICE_SLICE_BYTES // (4 * 2 * hidden * inter)  # of gate and up together
            fits = 1 + self.experts // (4 * (4 * hidden * hidden + 4 * 3 * hidden * inter))
            return max(1, min(MOST_EXPERTS, one_slice, fits))
        return min(MOST_EXPERTS, 1 + self.experts // (4 * (6 * hidden * hidden + 8 * 3 * hidden * inter)))


_LEAST_CACHE = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Machine:
    """``budget``: bytes that the process should stay under, interpreter and torch apart."""

    device: torch.device
    budget: int

    @classmethod
    def of(cls, device: str, memory_budget: int | None) -> Machine:
        """``device``: "auto", "cpu" or "cuda"; ``memory_budget``: bytes or None. Raises `PlanError` for another device,
        or one that is not there."""
        check_device(device)
        if device == "cuda" and not torch.cuda.is_available():
            raise PlanError(
                "device cuda: torch sees no GPU.", hint="Use --device cpu, or install a CUDA build of torch."
            )
        found = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        return cls(torch.device(found), memory_budget or default_budget())

    @property
    def device_name(self) -> str:
        """cpu, or the GPU's model and whether compiled kernels run on it: another one may round a code differently."""
        if self.device.type != "cuda":
            return str(self.device)
        kernels = " with Triton" if self.backend is Backend.TRITON else ""
        return f"{torch.cuda.get_device_name(self.device)}{kernels}"

    @property
    def backend(self) -> Backend:
        """The code that computes with float32 on the device."""
        return Backend.of(self.device)

    @property
    def scratch_dtype(self) -> torch.dtype:
        """In which the streams compute with a source in BF16, and keep what a block reads: bfloat16 with Triton, as
        runtimes do."""
        return torch.bfloat16 if self.backend is Backend.TRITON else torch.float32

    @property
    def device_bytes(self) -> int:
        """Memory of the GPU that computes; nothing without one."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.get_device_properties(self.device).total_memory

    def share(self, working_bytes: int) -> Share:
        """Divide what the budget leaves beside ``working_bytes``, the least that the work needs."""
        spare = self.budget - working_bytes
        assert spare >= 0, f"a budget of {self.budget:,} bytes for {working_bytes:,}"
        experts, cache = int(spare * 0.3), _LEAST_CACHE + int(spare * 0.15)
        if self.device_bytes:
            experts, cache = int(self.device_bytes * DEVICE_EXPERTS_SHARE), int(self.device_bytes * DEVICE_CACHE_SHARE)
        on_device = max(0, min(int(self.device_bytes * DEVICE_SHARE), self.device_bytes - DEVICE_WORK_BYTES))
        return Share(self.device_bytes > 0, int(spare * 0.5), on_device, cache, experts)


class Stores:
    """Makes stores for the hidden states of one token set: on the GPU that computes if they fit there, else in memory
    while they fit the budget, and on disk otherwise."""

    def __init__(self, folder: Path, budget: int, device: torch.device = CPU, device_budget: int = 0) -> None:
        self._folder = folder
        self._places = ((device, device_budget), (CPU, budget))
        self._made: WeakSet[MemoryRows] = WeakSet()
        self._numbers = count()

    def new(self, n_rows: int, length: int, width: int, dtype: torch.dtype = torch.float32) -> RowStore:
        """A store in the best place that has room beside those still open."""
        nbytes = n_rows * length * width * dtype.itemsize
        for device, budget in self._places:
            if nbytes + sum(store.nbytes for store in self._made if store.device == device) <= budget:
                store = MemoryRows(n_rows, length, width, device, dtype)
                self._made.add(store)
                return store
        return FileRows(self._folder / f"scratch-{next(self._numbers)}", n_rows, length, width, dtype)


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Timer:
    """Wall seconds by stage, in the order in which stages first began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Count the time of the block to ``name``."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
