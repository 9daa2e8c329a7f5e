"""The routed experts of a layer in batches of one shape and treatment, and their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

import torch

from quantkit.arch.base import ExpertBlock
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.outputs import Linears


def experts_alike(job: LayerJob, block: ExpertBlock) -> Iterator[tuple[int, ...]]:
    """Neighbouring experts that every output treats alike."""

    def treatment(expert: int) -> tuple[object, ...]:
        names = (block.gates[expert], block.ups[expert], block.downs[expert])
        return tuple(output.methods.get(name) for output in job.outputs for name in names)

    for _, alike in groupby(range(block.n_experts), key=treatment):
        yield tuple(alike)


def expert_batches(job: LayerJob, block: ExpertBlock) -> Iterator[tuple[int, ...]]:
    """Experts that every output treats alike, at most ``experts_at_once`` together."""
    return _in_batches(job, experts_alike(job, block))


def own_expert_batches(job: LayerJob, block: ExpertBlock) -> Iterator[tuple[int, ...]]:
    """The same of this rank's share, where experts need nothing of other ranks."""
    rank, ranks = job.ranks.number, job.ranks.count
    spans = (
        experts[len(experts) * rank // ranks : len(experts) * (rank + 1) // ranks]
        for experts in experts_alike(job, block)
    )
    return _in_batches(job, spans)


def _in_batches(job: LayerJob, alike: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    for experts in alike:
        for start in range(0, len(experts), job.experts_at_once):
            yield experts[start : start + job.experts_at_once]


def linears_of(job: LayerJob, names: tuple[str, ...], experts: tuple[int, ...]) -> Linears:
    """One projection of some experts, (B, out, in): bfloat16 if the streams compute with all of them in it, else
    float32."""
    found = chosen(names, experts)
    dtype = joint_dtype(job, found)
    weight = torch.empty(len(found), *job.weights.shape(found[0]), device=job.device, dtype=dtype)
    for one, name in zip(weight, found, strict=True):
        one.copy_(job.weights.from_source(name))
    return Linears(found, weight)


def joint_dtype(job: LayerJob, names: tuple[str, ...]) -> torch.dtype:
    """bfloat16 if the streams compute with all of these weights in it, else float32."""
    wide = any(job.weights.dtype(name) == torch.float32 for name in names)
    return torch.float32 if wide else torch.bfloat16


def chosen(names: tuple[str, ...], experts: tuple[int, ...]) -> tuple[str, ...]:
    """The names of some experts."""
    return tuple(names[expert] for expert in experts)
