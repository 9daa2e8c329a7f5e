"""The machine that was found: its device and memory budget, and stores for hidden states in the places that it has."""

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

from quantkit.calibrate.hidden_states import CPU, FileRows, MemoryRows, RowStore
from quantkit.errors import PlanError
from quantkit.kernels.backend import Backend
from quantkit.plan.budget import check_device
from quantkit.plan.hardware import Gpu, Hardware, default_budget


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

    @property
    def hardware(self) -> Hardware:
        """The machine as `quantkit.plan.batch_sizes` knows it."""
        if self.device.type != "cuda":
            return Hardware(self.budget)
        kernels = self.backend is Backend.TRITON
        return Hardware(self.budget, Gpu(torch.cuda.get_device_name(self.device), self.device_bytes, kernels))


class Stores:
    """Makes stores for the hidden states of one token set: on the GPU that computes if they fit there, else in memory
    while they fit the budget, and on disk otherwise. ``rank``: of the processes that use ``folder``, this one."""

    def __init__(
        self, folder: Path, budget: int, device: torch.device = CPU, device_budget: int = 0, rank: int = 0
    ) -> None:
        self._folder = folder
        self._rank = rank
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
        return FileRows(self._folder / f"scratch-{self._rank}-{next(self._numbers)}", n_rows, length, width, dtype)


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes(device: torch.device) -> int | None:
    """The most that torch has allocated on a GPU so far; None for a processor."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


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
