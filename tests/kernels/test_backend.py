"""Which code computes: decided once by device, replaced by `using`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantkit.kernels.backend import Backend, backend_of, using
from quantkit.plan.machine import Machine

CPU = torch.device("cpu")


def test_a_processor_has_numba() -> None:
    assert Backend.of(CPU) is Backend.NUMBA
    assert Machine(CPU, 2**30).backend is Backend.NUMBA
    assert Machine(CPU, 2**30).scratch_dtype == torch.float32


def test_a_device_without_kernels_has_torch() -> None:
    assert Backend.of(torch.device("meta")) is Backend.TORCH


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.uint8])
def test_kernels_compute_in_float32_only(dtype: torch.dtype) -> None:
    assert backend_of(torch.zeros(2, dtype=dtype)) is Backend.TORCH
    assert backend_of(torch.zeros(2)) is Backend.NUMBA


def test_one_backend_for_all_threads_until_its_block_ends() -> None:
    with ThreadPoolExecutor(1) as pool:
        with using(Backend.TRITON):
            assert pool.submit(Backend.of, CPU).result() is Backend.TRITON
            with using(Backend.TORCH):
                assert backend_of(torch.zeros(2)) is Backend.TORCH
            assert backend_of(torch.zeros(2)) is Backend.TRITON
            assert backend_of(torch.zeros(2).double()) is Backend.TORCH
        assert pool.submit(Backend.of, CPU).result() is Backend.NUMBA


def test_an_error_ends_the_block_too() -> None:
    with pytest.raises(ZeroDivisionError), using(Backend.TORCH):
        raise ZeroDivisionError
    assert Backend.of(CPU) is Backend.NUMBA
