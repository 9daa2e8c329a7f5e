"""The loop: epochs over calibration rows, updates of a few rows each, and held-out rows that say which state is kept.

loss = mean square of (output of the layer with quantised weights - target), the error times a metric's factor
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.hidden_states import RowStore
from quantkit.errors import CalibrationError
from quantkit.plan.tune import Tune
from quantkit.tuning.adam import Adam
from quantkit.tuning.layer import TunedLayer, begin_update, finish_update

HELD_OUT = 10
"""One row of so many decides, and teaches nothing."""
WARM_UP = 8
"""Updates until the steps have their full size; from there they fall to 0 at the end."""


@dataclass(frozen=True, slots=True)
class TuneTask:
    """``x``: what enters the layer, ``target``: what should leave it; ``metric`` (hidden, hidden): errors are
    multiplied with it, None: as they are; ``seed``: of the order of the rows."""

    layer: TunedLayer
    x: RowStore
    target: RowStore
    metric: Tensor | None
    settings: Tune
    seed: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class TuneOutcome:
    """Squared error of the layer's output on held-out rows, relative to what the layer adds: ``before``, and ``after``
    epoch ``epoch``, whose state the layer is in; 0: no epoch was better, nothing is to be changed."""

    before: float
    after: float
    epoch: int


OnStep = Callable[[int, int], None]
"""Updates done, and of all."""


def tune(task: TuneTask, on_step: OnStep) -> TuneOutcome:
    """Move codes, scales and norms of the layer in place. Where an epoch was better than the start, the layer is left
    in the state after the best one. The same task gives the same numbers."""
    with _deterministic(task.device):
        return _tuned(task, on_step)


@contextmanager
def _deterministic(device: torch.device) -> Generator[None]:
    """Let the backward of attention on a GPU add in one order. What has none such only warns: sums here have."""
    if device.type != "cuda":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    settings: Any = import_module("torch.utils.deterministic")
    filled: bool = settings.fill_uninitialized_memory
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        settings.fill_uninitialized_memory = filled


def _tuned(task: TuneTask, on_step: OnStep) -> TuneOutcome:
    held, taught = split_rows(task.x.n_rows)
    energy = _mean(task, held, with_layer=False)
    before = best = _mean(task, held, with_layer=True)
    if not math.isfinite(before):
        raise CalibrationError(
            "the output of the quantised layer is not finite, so it cannot be tuned.",
            hint="Leave tune out, or look with `quantkit evaluate` where numbers overflow.",
        )
    kept = 0
    optimizer = task.layer.optimizer()
    updates = list(_updates(task, taught))
    for number, (epoch, rows) in enumerate(updates):
        fraction = (1 - number / len(updates)) * min(1.0, (number + 1) / WARM_UP)
        _update(task, optimizer, rows, fraction, energy)
        on_step(number + 1, len(updates))
        if number + 1 == len(updates) or updates[number + 1][0] != epoch:
            loss = _mean(task, held, with_layer=True)
            if loss < best:
                best, kept = loss, epoch
                task.layer.keep()
    if kept:
        task.layer.restore()
    scale = max(energy, 1e-30)
    return TuneOutcome(before / scale, best / scale, kept)


def split_rows(n_rows: int) -> tuple[Tensor, Tensor]:
    """Rows that decide, and rows that teach, (n,) int64 each."""
    rows = torch.arange(n_rows)
    decides = rows % HELD_OUT == HELD_OUT - 1 if n_rows >= HELD_OUT else rows == n_rows - 1
    return rows[decides], rows[~decides]


def step_rows(settings: Tune, length: int) -> int:
    """Rows of one update."""
    return max(1, settings.step_tokens // length)


def _updates(task: TuneTask, taught: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Epoch, from 1, and rows of each update. Rows that are too few for one are left out of the epoch."""
    generator = torch.Generator().manual_seed(task.seed)
    count = min(step_rows(task.settings, task.x.length), len(taught))
    for epoch in range(1, task.settings.epochs + 1):
        order = taught[torch.randperm(len(taught), generator=generator)]
        for start in range(0, len(order) - count + 1, count):
            yield epoch, order[start : start + count].sort().values


def _update(task: TuneTask, optimizer: Adam, rows: Tensor, fraction: float, energy: float) -> None:
    settings, layer = task.settings, task.layer
    begin_update(layer.moving, settings.lr * fraction)
    weights = layer.step_weights()
    x, target = (_rows(store, rows, task.device) for store in (task.x, task.target))
    with torch.enable_grad():
        loss = _error(task, layer.forward(x, weights) - target).square().mean() / max(energy, 1e-30)
        loss.backward()
    finish_update(layer, weights)
    optimizer.step(settings.scale_lr * fraction)


def _mean(task: TuneTask, rows: Tensor, *, with_layer: bool) -> float:
    """Mean square of what is wrong in some rows; not ``with_layer``: of what the target adds to the input."""
    begin_update(task.layer.moving, 0.0)
    total, count = 0.0, 0
    with torch.no_grad():
        weights = task.layer.step_weights()
        for part in rows.split(step_rows(task.settings, task.x.length)):
            x, target = (_rows(store, part, task.device) for store in (task.x, task.target))
            out = task.layer.forward(x, weights) if with_layer else x
            error = _error(task, out - target)
            total += float(error.square().sum(dtype=torch.float64))
            count += error.numel()
    return total / count


def _error(task: TuneTask, error: Tensor) -> Tensor:
    return error if task.metric is None else error @ task.metric


def _rows(store: RowStore, rows: Tensor, device: torch.device) -> Tensor:
    """(n, length, width) float32."""
    return torch.cat([store.read(row, row + 1).to(device) for row in rows.tolist()]).float()


def metric_factor(moments: Tensor, damp: float = 0.02) -> Tensor:
    """moments (n, n), sum of g g^T of gradients at a layer's output -> the factor whose product with an error weighs it
    as the model's loss does; a mean diagonal of 1, and ``damp`` added to it. Raises `CalibrationError` if they are not
    finite."""
    mean = moments.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(moments), device=moments.device, dtype=moments.dtype)
    factor, failed = torch.linalg.cholesky_ex(moments / mean + damp * eye)
    if bool(failed) or not bool(factor.isfinite().all()):
        raise CalibrationError(
            "the Fisher pass's gradients at a layer's output overflow or are not numbers.",
            hint="Make the pass again (`quantkit sensitivity --restart`), or leave sensitivity out.",
        )
    return factor


def seed_of(settings: Tune, layer: int) -> int:
    """Of a layer's rows."""
    return settings.seed * 100_003 + layer
