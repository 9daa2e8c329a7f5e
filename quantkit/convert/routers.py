"""Routers moved by least squares: their logits on the quantised stream come near to the original's on the original one.

With x a token's input of the router in the quantised stream and y that of the same token in the unquantised one, the
weight that takes x where W takes y, in the mean over tokens, is W + W C H^-1, H = E[x x^T], C = E[(y - x) x^T]. It is
the target of output matching (GPTAQ, arXiv 2504.02692) for a tensor that is kept, so nothing is rounded but its dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.arch.base import ExpertBlock
from quantkit.calibrate.chunk_sizes import row_slices
from quantkit.calibrate.inputs import InputMoments, InputStats, combined
from quantkit.calibrate.stream import row_batches
from quantkit.convert.layer_job import LayerJob
from quantkit.errors import CalibrationError

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal of H."""


def fitted_router(job: LayerJob, block: ExpertBlock) -> Tensor:
    """The router's weight (experts, hidden) for the calibrated stream as it is at the block, on the device, in the
    source's dtype: every output stores this, and the stream is routed by it.

    Raises `CalibrationError` for inputs that are not finite.
    """
    assert len(job.hidden.stores()) == 2, "the plan follows the unquantised stream"
    weight = job.weights.from_source(block.router)
    slices = row_slices(job.hidden.x.n_rows)
    (moments,) = combined([_moments(job, block, rows)] for rows in slices)
    stats = moments.stats()
    assert isinstance(stats, InputStats)
    try:
        return least_squares(weight.to(job.device), stats).to(weight.dtype)
    except CalibrationError as error:
        raise CalibrationError(f"{block.router}: {error.message}", hint=error.hint) from error


def least_squares(weight: Tensor, stats: InputStats) -> Tensor:
    """weight (experts, hidden) of any float dtype, stats of one matrix with its cross term -> W + W C H^-1, H damped,
    (experts, hidden) float32. Solved in float64; stats stay as they are.

    Raises `CalibrationError` if H is not finite.
    """
    assert stats.cross is not None, "two streams"
    hessian, cross = stats.hessian[0].double(), stats.cross[0].double()
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if mean == 0:  # no input ever fired: nothing to follow
        return weight.float()
    diagonal += DAMPING * mean
    lower, failed = torch.linalg.cholesky_ex(hessian)
    moved = weight.double() @ cross
    if bool(failed) or not bool(moved.isfinite().all()):
        raise CalibrationError(
            "its inputs overflow or are not numbers.", hint="Take router: keep, or other calibration text."
        )
    return (weight.double() + torch.cholesky_solve(moved.T, lower).T).float()


def _moments(job: LayerJob, block: ExpertBlock, rows: tuple[int, int]) -> InputMoments:
    """Of the router's inputs over one slice of rows, from zero on."""
    stores = job.hidden.stores()
    moments = InputMoments(job.hidden.x.width, cross=True, device=job.device)
    for start, stop in row_batches(job.hidden.x, job.device, rows):
        own, original = (
            block.inputs(weights, store.read(start, stop).to(job.device))
            for weights, store in zip(job.weights.by_stream(2), stores, strict=True)
        )
        moments.add(own, original)
    return moments
