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


def gptq_values(
    weight: np.ndarray, hessian: np.ndarray, values: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same for any grid: values (out, in, n), what each weight may become -> what it becomes, and margins, both
    (out, in) in storage order.

    The margin: how much farther the second nearest of the values is, as a share of its distance from the nearest one.
    """
    weight = weight[:, order].astype(np.float64).copy()
    values = values[:, order].astype(np.float64)
    inverse = np.linalg.inv(hessian[np.ix_(order, order)].astype(np.float64))
    upper = np.linalg.cholesky(inverse).T
    chosen, margins = np.empty_like(weight), np.empty_like(weight)
    rows = np.arange(len(weight))
    for column in range(weight.shape[1]):
        distance = np.abs(weight[:, column, None] - values[:, column])
        best = distance.argmin(1)
        chosen[:, column] = values[rows, column, best]
        apart = np.abs(values[:, column] - chosen[:, column, None])
        others = np.where(apart > 0, distance, np.inf)
        second = others.argmin(1)
        step = np.where(np.isinf(others.min(1)), 1.0, apart[rows, second])
        margins[:, column] = (others.min(1) - distance[rows, best]) / step
        error = (weight[:, column] - chosen[:, column]) / upper[column, column]
        weight[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    back = np.argsort(order)
    return chosen[:, back], margins[:, back]
