"""Weights that are zero one after the other: what a piece of a download that never came leaves in the middle of a file.

Enters: a tensor as it was read. Leaves: its runs of zeros of at least so many weights. Only every 2048th weight is
looked at, and all of them only around those that are zero, so a tensor without such a run costs next to nothing. Every
tensor that leaves here is as it came.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

STEP = 2048
"""Weights from one that is looked at to the next: a page of 4 KiB of BF16."""


class ZeroRun(NamedTuple):
    """Zeros in a row: weights ``[start, stop)`` of the tensor laid out flat."""

    start: int
    stop: int


def zero_runs(tensor: Tensor, least: int) -> Iterator[ZeroRun]:
    """Of each place with at least ``least`` zeros in a row the longest run, in order. The tensor is of any dtype that
    compares with 0, on any device; -0 is a zero for FP8 codes only once they are decoded."""
    if tensor.numel() < least:
        return
    flat = tensor.flatten()
    zero = flat[::STEP] == 0
    needed = max(1, least // STEP)
    if int(zero.sum()) < needed:
        return
    for first, last in _stretches(zero, needed):
        run = _longest(flat, max(0, (first - 1) * STEP), min(len(flat), (last + 1) * STEP))
        if run.stop - run.start >= least:
            yield run


def _stretches(zero: Tensor, needed: int) -> Iterator[tuple[int, int]]:
    """First and last number of each stretch of at least ``needed`` True in a vector of bool."""
    import torch

    edge = zero.new_zeros(1)
    steps = torch.diff(torch.cat((edge, zero, edge)).to(torch.int8))
    starts, stops = (steps == 1).nonzero().flatten(), (steps == -1).nonzero().flatten()
    long = stops - starts >= needed
    for start, stop in zip(starts[long].tolist(), stops[long].tolist(), strict=True):
        yield start, stop - 1


def _longest(flat: Tensor, start: int, stop: int) -> ZeroRun:
    """The longest run of zeros among weights ``[start, stop)``."""
    import torch

    others = flat[start:stop].nonzero().flatten().cpu() + start
    ends = torch.cat((torch.tensor([start - 1]), others, torch.tensor([stop])))
    lengths = torch.diff(ends) - 1
    longest = int(lengths.argmax())
    first = int(ends[longest]) + 1
    return ZeroRun(first, first + int(lengths[longest]))
