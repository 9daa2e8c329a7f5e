"""Which code does a tensor's work, and the precision of the products around the kernels.

Every kernel has a twin in plain torch: GPUs without Triton run it, and the tests compare with it.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from enum import Enum
from functools import cache
from importlib.util import find_spec
from shutil import which
from typing import Protocol

import torch
from torch import Tensor

PRIORITY = -1
"""The priority of CUDA streams that compute: their kernels go before those of threads that read and write, which have
the default, 0."""


@cache
def _has_triton() -> bool:
    """Triton, and the C compiler that it builds its launchers with (the ones it looks for, in its order)."""
    compilers = (os.environ.get("CC"), "clang", "gcc", "cc")
    return find_spec("triton") is not None and any(name and which(name) for name in compilers)


def _has_wide_sums() -> bool:
    """Whether this torch multiplies bfloat16 into float32 (from about 2.8 on)."""
    return "dtype" in torch.ops.aten.bmm.overloads()


class Backend(Enum):
    """Code that computes: plain torch, the numba kernels for processors, or the Triton kernels for GPUs."""

    TORCH = "torch"
    NUMBA = "numba"
    TRITON = "triton"

    @classmethod
    def of(cls, device: torch.device) -> Backend:
        """What `using` asks for, else the fastest that runs on the device: Triton needs a GPU with tensor cores for
        TF32 (Ampere or later) and a C compiler."""
        return _forced[-1] if _forced else _fastest(device)


def backend_of(tensor: Tensor) -> Backend:
    """What computes with a tensor's numbers: the backend of its device for float32, torch for any other dtype."""
    return Backend.of(tensor.device) if tensor.dtype == torch.float32 else Backend.TORCH


_forced: list[Backend] = []


@contextmanager
def using(backend: Backend) -> Generator[None]:
    """Let one backend compute everything in this process, in all of its threads: for tests and benchmarks, which
    compare a kernel with its twin, or run Triton's kernels on a processor in Triton's interpreter."""
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


@cache
def _fastest(device: torch.device) -> Backend:
    if device.type == "cpu":
        return Backend.NUMBA
    if device.type != "cuda" or torch.version.hip is not None or not (_has_triton() and _has_wide_sums()):
        return Backend.TORCH
    return Backend.TRITON if torch.cuda.get_device_capability(device) >= (8, 0) else Backend.TORCH


@cache
def constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that never change, copied to a device once. Do not write to them."""
    return torch.tensor(values, dtype=dtype, device=device)


@contextmanager
def tensor_float32(enabled: bool = True) -> Generator[None]:
    """Let float32 matrix products on a GPU round their factors to TF32 (10 bits of mantissa); sums stay float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def narrow_product(left: Tensor, right: Tensor) -> Tensor:
    """left (B, m, k) @ right (B, k, n), rounded to bfloat16 first, with float32 sums -> (B, m, n) float32."""
    left, right = left.bfloat16(), right.bfloat16()
    if not left.is_cuda:
        return left.float() @ right.float()
    return torch.bmm(left, right, out_dtype=torch.float32)


class FixedScales(Protocol):
    """What the kernels read of a `quantkit.schemes.grid.Grid`, which says what each of it means."""

    @property
    def scale(self) -> Tensor: ...
    @property
    def scale_dtype(self) -> torch.dtype | None: ...
    @property
    def zero(self) -> Tensor | float: ...
    @property
    def offset(self) -> Tensor | None: ...
    @property
    def top(self) -> int: ...
    @property
    def table(self) -> Tensor | None: ...
    def nearest_scale(self, group: int, wanted: Tensor) -> Tensor: ...
    def nearest_offset(self, group: int, wanted: Tensor) -> Tensor: ...
