"""Scales of ggml's block types, searched for the least importance-weighted squared error of the values as stored.

    minimise  sum importance * (weight - (scale * level[code] + offset))**2

`fit` finds the scales, `encode` the nearest codes for them. Processors run the compiled kernels of
`quantkit.kernels.numba.ggml.fit`, GPUs those of `quantkit.kernels.triton.ggml.fit`; without them, `symmetric`
is the same search in torch, which is also the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantkit.errors import SchemeError
from quantkit.kernels.backend import Backend, backend_of
from quantkit.kernels.ggml_constants import HALF_MAX
from quantkit.schemes.ggml.measure import matters, nearest_codes, shares
from quantkit.schemes.ggml.symmetric import search
from quantkit.schemes.ggml.types import BlockParams, BlockType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from quantkit.kernels.numba.ggml.fit import BlockSearch

POWER_REACH = 1.5 * 2.0**127
"""The largest value of MXFP4 that doesn't overflow float32 when it is decoded."""


def fit(kind: BlockType, weight: Tensor, importance: Tensor | None = None) -> BlockParams:
    """The scales of all blocks, as they will be stored.

    weight (..., out, in) float32, rows of whole blocks; importance (..., in) float32, not negative (the mean square of
    each input), one for each matrix; None: all equal. Raises `SchemeError` for weights that are not finite or too large
    for float16 scales, and for an importance that is negative or not finite.
    """
    backend = backend_of(weight)
    if backend is Backend.TRITON:
        return _fit_on_gpu(kind, weight, importance)
    if backend is Backend.TORCH:
        return fit_in_torch(kind, weight, importance)
    from quantkit.kernels.numba.ggml.fit import fit_blocks

    check(kind, weight, importance)
    matrices = weight.detach().reshape(-1, *weight.shape[-2:]).contiguous()
    normalised = _normalised(matrices, importance).contiguous()
    found = fit_blocks(_block_search(kind), matrices.numpy(), normalised.numpy(), torch.get_num_threads())
    d, dmin, sub_scale, sub_min = (None if values is None else torch.from_numpy(values) for values in found)
    assert d is not None
    return _shaped(BlockParams(d, dmin, sub_scale, sub_min), weight)


def _fit_on_gpu(kind: BlockType, weight: Tensor, importance: Tensor | None) -> BlockParams:
    from quantkit.kernels.triton.ggml.fit import fit_blocks

    check(kind, weight, importance)
    matrices = weight.detach().reshape(-1, *weight.shape[-2:])
    found = fit_blocks(
        matrices,
        _normalised(matrices, importance),
        block=kind.block,
        group=kind.group,
        levels=tuple(sorted(set(kind.levels))),
        shares=shares(kind),
        matters=matters(kind),
        sub_scale=kind.sub_scale,
        sub_min=kind.sub_min,
        has_offset=bool(kind.offset),
        powers_of_two=kind.name == "MXFP4",
    )
    return _shaped(BlockParams(*found), weight)


def fit_in_torch(kind: BlockType, weight: Tensor, importance: Tensor | None = None) -> BlockParams:
    """`fit` on the weight's own device. On a processor it is slow: there the tests compare `fit` with it."""
    check(kind, weight, importance)
    matrices = weight.reshape(-1, *weight.shape[-2:])
    return _shaped(search(kind, matrices, _normalised(matrices, importance)), weight)


def encode(kind: BlockType, weight: Tensor, params: BlockParams) -> Tensor:
    """The nearest level for the stored scales. weight (..., out, in) float32 -> codes (..., out, in) uint8, indices of
    ``kind.levels``; 0 is as good as any in a group whose scale is 0."""
    backend = backend_of(weight)
    if backend is Backend.TRITON:
        from quantkit.kernels.triton.ggml.fit import encode_blocks as encode_on_gpu

        levels = tuple(sorted(set(kind.levels)))
        mirrored = kind.levels[0] != levels[0]
        return encode_on_gpu(levels, weight.detach(), params.scale(), params.offset(), mirrored=mirrored)
    if backend is Backend.TORCH:
        return nearest_codes(kind, weight, params)
    from quantkit.kernels.numba.ggml.fit import encode_blocks

    scale, offset = params.scale(), params.offset()
    codes = encode_blocks(
        _block_search(kind),
        _matrices(weight),
        _matrices(scale),
        None if offset is None else _matrices(offset),
        torch.get_num_threads(),
    )
    return torch.from_numpy(codes).view(weight.shape)


def _block_search(kind: BlockType) -> BlockSearch:
    import numpy as np

    from quantkit.kernels.numba.ggml.fit import BlockSearch

    return BlockSearch(
        kind.block,
        kind.group,
        tuple(sorted(set(kind.levels))),
        np.array(shares(kind), np.float32),
        matters(kind),
        kind.sub_scale,
        kind.sub_min[1] if kind.sub_min else None,
        has_offset=bool(kind.offset),
        powers_of_two=kind.name == "MXFP4",
    )


def _matrices(values: Tensor) -> NDArray[np.float32]:
    """(..., rows, columns) -> (B, rows, columns), contiguous."""
    return values.detach().reshape(-1, *values.shape[-2:]).contiguous().numpy()


def check(kind: BlockType, weight: Tensor, importance: Tensor | None) -> None:
    """Raise `SchemeError` unless all values are finite and within reach of the type's largest scales."""
    assert weight.dtype == torch.float32, f"weight is {weight.dtype}"
    assert weight.shape[-1] % kind.block == 0, f"{weight.shape[-1]} is no multiple of {kind.block}"
    if importance is not None:
        assert importance.shape == (*weight.shape[:-2], weight.shape[-1]), "one importance for each matrix"
        if not bool((importance >= 0).all() & importance.isfinite().all()):
            raise SchemeError(
                "importance: negative or non-finite values.", hint="Calibrate again, or take another imatrix."
            )
    if not weight.numel():
        return
    lowest, highest = torch.aminmax(weight, dim=-1)
    low, high = _reach(kind)
    wrong = ~((lowest >= low) & (highest <= high))  # NaN is wrong, too
    if bool(wrong.any()):
        row = tuple(wrong.nonzero()[0].tolist())
        value = float(lowest[row]) if not float(lowest[row]) >= low else float(highest[row])
        raise SchemeError(
            f"row {row[-1]}: no scale of {kind.name} fits the value {value:g} (needed: {low:g} to {high:g}).",
            hint="Repair the checkpoint, or keep this tensor in F32.",
        )


def _reach(kind: BlockType) -> tuple[float, float]:
    """The lowest and the highest weight that some block of the type decodes to."""
    if kind.name == "MXFP4":
        return -POWER_REACH, POWER_REACH
    largest = HALF_MAX * max(map(abs, kind.sub_scale or (1,))) * max(map(abs, kind.levels))
    lowest = -HALF_MAX * (kind.sub_min or (0, 1))[1] if kind.offset else -largest
    return lowest, largest


def _normalised(matrices: Tensor, importance: Tensor | None) -> Tensor:
    """(B, in) of mean 1, so that products stay within float32. Inputs of no importance get a little of it: among equal
    errors their weights decide."""
    if importance is None:
        return torch.ones_like(matrices[:, 0])
    importance = importance.reshape(-1, importance.shape[-1])
    scaled = importance / importance.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    mean = scaled.mean(-1, keepdim=True)
    return torch.where(mean > 0, scaled / mean + IMPORTANCE_FLOOR, torch.ones_like(scaled))


IMPORTANCE_FLOOR = 1e-16


def _shaped(params: BlockParams, weight: Tensor) -> BlockParams:
    lead = weight.shape[:-1]

    def shaped(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(*lead, -1)

    return BlockParams(
        params.d.reshape(*lead, -1), shaped(params.dmin), shaped(params.sub_scale), shaped(params.sub_min)
    )
