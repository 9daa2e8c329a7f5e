# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportIndexIssue=false
"""The loss of each row of an error, tr(E H E^T), on a GPU: H is symmetric, so half of the product does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from quantkit.kernels.backend import narrow_product

_PANEL = 1024


@triton.jit
def _add_row_dots(product, rows, loss, in_features, first, width, COLUMNS: tl.constexpr):
    """loss[row] += 2 sum of product[row] * rows[row, first : first + width]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    left = tl.load(product + row * width + columns, mask=inside, other=0.0)
    right = tl.load(rows + row * in_features + first + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(loss + row, tl.load(loss + row) + 2.0 * tl.sum(left * right, axis=0))


def row_loss(error: Tensor, hessian: Tensor) -> Tensor:
    """error (B, out, in), hessian (B, in, in) symmetric, both float32, rounded to bfloat16 here -> (B, out) float32.

    A figure for reports: what rounding does to single products averages out.
    """
    assert hessian.dtype == torch.float32, f"a copy is scaled, and {hessian.dtype} would not be one"
    n_matrices, out_features, in_features = error.shape
    rows = error.bfloat16().contiguous()
    loss = error.new_zeros(n_matrices, out_features)
    for start in range(0, in_features, _PANEL):
        stop = min(start + _PANEL, in_features)
        above = hessian[:, :stop, start:stop].bfloat16()
        above[:, start:] *= 0.5  # the block on the diagonal is whole: everything else counts twice
        product = narrow_product(rows[..., :stop], above)
        with device_of(error):
            _add_row_dots[(n_matrices * out_features,)](
                product, rows, loss, in_features, start, stop - start, COLUMNS=_PANEL, num_warps=4
            )
    return loss
