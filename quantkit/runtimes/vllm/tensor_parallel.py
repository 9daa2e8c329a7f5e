"""Over how many GPUs vLLM's tensor parallelism can cut a plan: heads are shared out, and row-parallel linears are cut
along their inputs, where a group of a scheme must stay whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import IntScheme, Mxfp4Scheme, Mxfp8Scheme, Nvfp4Scheme, W4AFp8Scheme
from quantkit.tensors import Projection

_ROW_PARALLEL = (Projection.OUT, Projection.DOWN)
"""Linears whose inputs are cut; others are cut along their outputs."""

Cuts = Mapping[tuple[int, int], str]
"""(in_features, group_size) of linears whose inputs are cut, with one's name."""


def cuts_of(planned: Iterable[PlannedTensor]) -> Cuts:
    """Of all row-parallel linears; without groups their size is 1."""
    cuts: dict[tuple[int, int], str] = {}
    for tensor in planned:
        cut = cut_of(tensor)
        if cut is not None:
            cuts.setdefault(cut, tensor.name)
    return cuts


def cut_of(tensor: PlannedTensor) -> tuple[int, int] | None:
    """(in_features, group_size) of a row-parallel linear, None of other tensors."""
    spec, scheme = tensor.spec, tensor.scheme
    if spec is None or spec.projection not in _ROW_PARALLEL:
        return None
    grouped = isinstance(scheme, IntScheme | Nvfp4Scheme | Mxfp4Scheme | Mxfp8Scheme | W4AFp8Scheme)
    return spec.shape[1], (scheme.group_size if grouped else None) or 1


def most_ranks(cut: tuple[int, int]) -> int:
    """The most ranks that get whole groups."""
    in_features, group = cut
    return in_features // group if in_features % group == 0 else 1


def cut_problem(cuts: Cuts, heads: int, size: int, kv_heads: int = 1) -> str | None:
    """Why a model with so many attention heads, and keys and values for them, cannot be cut into ``size`` ranks, None
    if it can. Ranks may hold the same keys and values, but all equally many."""
    if heads % size:
        return f"{heads} attention heads are not divisible by {size}"
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} heads of keys and values cannot be shared out evenly over {size} ranks"
    for (in_features, group), name in cuts.items():
        if in_features % size or in_features // size % group:
            return f"{name}: {in_features} inputs over {size} ranks are no multiple of group_size {group}"
    return None
