"""Scales and codes of ggml's block types on the processor: the compiled searches, spread over threads.

Threads take whole tiles of rows and share nothing: results don't depend on their number. They are Python's own threads
(the kernels release the interpreter), so calls may come from several threads at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.numba.ggml.encode import encode_rows
from quantkit.kernels.numba.ggml.offset import search_offset
from quantkit.kernels.numba.ggml.power import search_power
from quantkit.kernels.numba.ggml.symmetric import search_symmetric
from quantkit.kernels.numba.lanes import ROWS
from quantkit.kernels.numba.tile import STEPS, Floats

TASK_WEIGHTS = 1 << 16
"""A task has at least so many weights, as far as rows go."""


@dataclass(frozen=True)
class BlockSearch:
    """What the kernels know of a type.

    ``levels``: all values, rising; ``shares``: ranges to try, in units of a group's own, which spans the weights that
    have more than the share ``matters`` of its energy; ``sub_scale``: lowest and highest, None if groups have no scale
    of their own; ``sub_min``: the highest.
    """

    block: int
    group: int
    levels: tuple[int, ...]
    shares: Floats = field(default_factory=lambda: np.ones(1, np.float32))
    matters: float = 0.0
    sub_scale: tuple[int, int] | None = None
    sub_min: int | None = None
    has_offset: bool = False
    powers_of_two: bool = False

    @property
    def ends(self) -> Any:
        """The lowest and the highest level, a pair of np.float32 (kernels compute with the type they are given)."""
        return np.float32(self.levels[0]), np.float32(self.levels[-1])

    def table(self) -> Floats:
        """Where each step between levels begins, then the heights of the steps; empty if levels are integers in a
        row."""
        if self.levels == tuple(range(self.levels[0], self.levels[-1] + 1)):
            return np.empty(0, np.float32)
        levels = np.array(self.levels, np.float32)
        steps = np.diff(levels)
        padding = STEPS - len(steps)
        begins = np.pad((levels[1:] + levels[:-1]) / 2, (0, padding), constant_values=np.inf)
        return np.concatenate([begins, np.pad(steps, (0, padding))]).astype(np.float32)


Found = tuple[Floats, "Floats | None", "NDArray[np.int16] | None", "NDArray[np.int16] | None"]
"""d, dmin (B, out, blocks), sub_scale, sub_min (B, out, groups); None what the type has not."""


def fit_blocks(search: BlockSearch, weight: Floats, importance: Floats, threads: int) -> Found:
    """weight (B, out, in), importance (B, in), both float32, contiguous and finite -> the scales as stored."""
    matrices, out, in_features = weight.shape
    d = np.zeros((matrices, out, in_features // search.block), np.float32)
    dmin = np.zeros_like(d) if search.has_offset else None
    integers = (matrices, out, in_features // search.group if search.sub_scale else 0)
    sub, low = np.zeros(integers, np.int16), np.zeros(integers, np.int16)
    table, ends = search.table(), search.ends
    matters: Any = np.float32(search.matters)

    def run(b: int, rows: tuple[int, int]) -> None:
        matrix, h = weight[b], importance[b]
        if search.powers_of_two:
            search_power(matrix, h, rows, search.block, ends, table, matters, d[b])
        elif dmin is not None:
            highest = (search.sub_scale[1], search.sub_min or 1) if search.sub_scale else (1, 1)
            scales = d[b], dmin[b], sub[b], low[b]
            search_offset(
                matrix, h, rows, search.block, search.group, ends[1], search.shares, matters, highest, *scales
            )
        else:
            limits = search.sub_scale or (1, 1)
            scales = d[b], sub[b]
            search_symmetric(
                matrix, h, rows, search.block, search.group, ends, table, search.shares, matters, limits, *scales
            )

    _in_threads(run, weight.shape, threads)
    return d, dmin, sub if search.sub_scale else None, low if search.sub_min else None


def encode_blocks(
    search: BlockSearch, weight: Floats, scale: Floats, offset: Floats | None, threads: int
) -> NDArray[np.uint8]:
    """weight (B, out, in), scale and offset (B, out, groups), float32 and contiguous -> codes (B, out, in): places of
    the nearest levels among ``search.levels``, but sign and magnitude for powers of two."""
    codes = np.empty(weight.shape, np.uint8)
    table = search.table()
    if offset is None:
        offset = np.empty((weight.shape[0], 0, 0), np.float32)

    def run(b: int, rows: tuple[int, int]) -> None:
        encode_rows(weight[b], scale[b], offset[b], rows, search.ends, table, search.powers_of_two, codes[b])

    _in_threads(run, weight.shape, threads)
    return codes


def _in_threads(run: Callable[[int, tuple[int, int]], None], shape: tuple[int, ...], threads: int) -> None:
    """run(matrix, (first row, end)) over all rows."""
    matrices, out, in_features = shape
    rows = max(1, TASK_WEIGHTS // max(1, in_features * ROWS)) * ROWS
    tasks = [(b, (start, min(start + rows, out))) for b in range(matrices) for start in range(0, out, rows)]
    if threads == 1 or len(tasks) <= 1:
        for task in tasks:
            run(*task)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(run, *task) for task in tasks]:
            done.result()
