"""The routed experts of a layer in batches of one shape and treatment, and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch

from quantkit.arch.base import ExpertBlock
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.outputs import Linears


def expert_batches(job: LayerJob, block: ExpertBlock) -> Iterator[tuple[int, ...]]:
    """Experts that every output treats alike, at most ``experts_at_once`` together."""

    def treatment(expert: int) -> tuple[object, ...]:
        names = (block.gates[expert], block.ups[expert], block.downs[expert])
        return tuple(output.methods.get(name) for output in job.outputs for name in names)

    for _, alike in groupby(range(block.n_experts), key=treatment):
        experts = tuple(alike)
        for start in range(0, len(experts), job.experts_at_once):
            yield experts[start : start + job.experts_at_once]


def linears_of(job: LayerJob, names: tuple[str, ...], experts: tuple[int, ...]) -> Linears:
    """One projection of some experts, (B, out, in): bfloat16 if the streams compute with all of them in it, else
    float32."""
    found = chosen(names, experts)
    wide = any(job.weights.dtype(name) == torch.float32 for name in found)
    dtype = torch.float32 if wide else torch.bfloat16
    weight = torch.empty(len(found), *job.weights.shape(found[0]), device=job.device, dtype=dtype)
    for one, name in zip(weight, found, strict=True):
        one.copy_(job.weights.from_source(name))
    return Linears(found, weight)


def chosen(names: tuple[str, ...], experts: tuple[int, ...]) -> tuple[str, ...]:
    """The names of some experts."""
    return tuple(names[expert] for expert in experts)
