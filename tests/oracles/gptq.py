"""GPTQ as algorithm 1 of arXiv 2210.17323 states it: inverse Hessian, upper Cholesky, one column at a time, float64."""

from __future__ import annotations

import numpy as np


def gptq_codes(
    weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: int, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """weight (out, in), hessian (in, in) damped, scale and zero (out, in) by column -> codes and margins (out, in),
    storage order.

    The margin is the distance of the value that was rounded from its nearest rounding tie, in steps: codes may differ
    where it is 0.
    """
    weight = weight[:, order].astype(np.float64).copy()
    scale, zero = scale[:, order].astype(np.float64), zero[:, order].astype(np.float64)
    inverse = np.linalg.inv(hessian[np.ix_(order, order)].astype(np.float64))
    upper = np.linalg.cholesky(inverse).T
    codes, margins = np.empty_like(weight), np.empty_like(weight)
    for column in range(weight.shape[1]):
        value = weight[:, column] / scale[:, column] + zero[:, column]
        codes[:, column] = np.clip(np.rint(value), 0, top)
        margins[:, column] = np.abs(value - np.floor(value) - 0.5)
        level = (codes[:, column] - zero[:, column]) * scale[:, column]
        error = (weight[:, column] - level) / upper[column, column]
        weight[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    back = np.argsort(order)
    return codes[:, back], margins[:, back]
