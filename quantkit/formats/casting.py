"""Kept tensors on their way to a file: the planned dtype, and the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import SchemeError
from quantkit.tensors import DTYPES

if TYPE_CHECKING:
    from torch import Tensor


def cast_to(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in ``dtype``, a key of `DTYPES` (round to nearest even). Raises `SchemeError` if a finite value would
    become infinite."""
    import torch

    cast = tensor.to(getattr(torch, DTYPES[dtype][1]))
    # Only a narrower exponent can overflow; the check costs a pass, so it is made where it can fail.
    if tensor.is_floating_point() and torch.finfo(cast.dtype).max < torch.finfo(tensor.dtype).max and tensor.numel():
        lost = int((torch.isinf(cast) & torch.isfinite(tensor)).sum())
        if lost:
            raise SchemeError(
                f"{name}: {lost:,} values are too large for {dtype} (the largest is {float(tensor.abs().max()):.6g}).",
                hint="Keep this tensor in bf16, f32 or as the source has it.",
            )
    return cast


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's elements in row order, without a copy if they already lie so on the CPU."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_cuda:
        # Page-locked memory, which torch keeps for the next: several times as fast.
        flat = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat)
    return flat.view(torch.uint8).numpy().data
