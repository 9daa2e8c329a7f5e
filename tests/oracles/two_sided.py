"""Two-sided LDLQ by its definition, in float64: each weight is rounded near w + sum of R_O[i', i] e[i', k'] R_H[k', k],
over all weights (i', k') that were rounded before it."""

from __future__ import annotations

import numpy as np


def unit_lower(matrix: np.ndarray) -> np.ndarray:
    """R of matrix = R D R^T."""
    lower = np.linalg.cholesky(matrix.astype(np.float64))
    return lower / np.diagonal(lower)


def two_sided_codes(
    weight: np.ndarray,
    hessian: np.ndarray,
    output_hessian: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    top: int,
    layout: np.ndarray,
    block: int,
) -> tuple[np.ndarray, np.ndarray]:
    """weight (out, in), both Hessians damped, scale and zero (out, in) by column -> codes and margins (out, in) in
    storage order. Columns are rounded from the last of ``layout``, rows from the last; rows of one ``block``, counted
    from the last row, do not hear of each other. Margins: as in `tests.oracles.gptq.gptq_codes`."""
    weight, scale, zero = (values[:, layout].astype(np.float64) for values in (weight, scale, zero))
    columns = unit_lower(hessian[np.ix_(layout, layout)])
    rows = unit_lower(output_hessian)
    error, codes, margins = np.zeros_like(weight), np.zeros_like(weight), np.zeros_like(weight)
    height, width = weight.shape
    for i in reversed(range(height)):
        heard = rows[:, i].copy()
        heard[i + 1 : height - (height - 1 - i) // block * block] = 0
        for k in reversed(range(width)):
            wanted = weight[i, k] + (heard @ error[:, k:]) @ columns[k:, k]
            value = wanted / scale[i, k] + zero[i, k]
            codes[i, k] = np.clip(np.rint(value), 0, top)
            margins[i, k] = np.abs(value - np.floor(value) - 0.5)
            error[i, k] = weight[i, k] - (codes[i, k] - zero[i, k]) * scale[i, k]
    back = np.argsort(layout)
    return codes[:, back], margins[:, back]
