"""The outputs of one walk: which linears each quantises how, and where the results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.calibrate.inputs import Inputs, InputStats
from quantkit.errors import CalibrationError, SchemeError
from quantkit.plan.targets import Sink
from quantkit.quantizers import Method
from quantkit.quantizers.batch import QuantizedBatch, Quantizer
from quantkit.schemes import ChosenScheme

Deliver = Callable[[int, QuantizedBatch, tuple[str, ...], tuple[int, ...]], None]
"""(number of the output, what was made, names of the linears, tokens that each saw) -> to the output's sink."""


@dataclass(frozen=True, slots=True)
class OutputJob:
    """One output. ``methods``: how each quantised linear is to be stored and chosen; other tensors are kept or
    dropped."""

    methods: Mapping[str, tuple[ChosenScheme, Method]]
    sink: Sink


@dataclass(frozen=True, slots=True)
class Linears:
    """B linears of one shape that play the same part (one projection of B experts, or B = 1), with their weights (B,
    out, in), float32 or bfloat16. One name for several matrices: the heads of a part."""

    names: tuple[str, ...]
    weight: Tensor


def quantize_linears(
    outputs: tuple[OutputJob, ...],
    group: tuple[Linears, ...],
    stats: Inputs | None,
    deliver: Deliver,
    shrink: Callable[[Inputs, Method], Inputs] = lambda stats, method: stats,
) -> tuple[QuantizedBatch | None, ...]:
    """Quantise linears that the same inputs feed, for every output, and ``deliver`` them.

    The factor of a method is made once for the group. Returns what the first output made of each, None where it keeps
    the original. ``shrink(stats, method)``: pulls the statistics of few tokens as the method asks for, in place; what
    one method is given does not depend on the others. ``stats`` is overwritten.
    """
    first: list[QuantizedBatch | None] = [None] * len(group)
    work: dict[Method, dict[tuple[int, ChosenScheme], list[int]]] = {}
    for number, output in enumerate(outputs):
        for position, linears in enumerate(group):
            if linears.names[0] in output.methods:
                scheme, method = output.methods[linears.names[0]]
                work.setdefault(method, {}).setdefault((number, scheme), []).append(position)
    # Methods overwrite what they are given, the last one may: so the one with a factor comes last.
    methods = sorted(work, key=lambda method: method.needs_inputs)
    for method in methods:
        own = stats if method == methods[-1] or not method.needs_inputs else _copy(stats)
        try:
            quantize = method.quantizer(None if own is None else shrink(own, method))
        except CalibrationError as error:
            raise CalibrationError(f"{group[0].names[0]}: {error.message}", hint=error.hint) from error
        for (number, scheme), positions in work[method].items():
            alike = [group[position] for position in positions]
            try:
                batches = _quantized(quantize, alike, scheme)
            except SchemeError as error:
                raise SchemeError(f"{_largest(alike)}: {error.message}", hint=error.hint) from error
            for position, linears, batch in zip(positions, alike, batches, strict=True):
                deliver(number, batch, linears.names, (0,) * len(linears.names) if stats is None else stats.n_tokens)
                if number == 0:
                    first[position] = batch
        del own, quantize  # a factor goes before the next is made
    return tuple(first)


def _quantized(quantize: Quantizer, alike: list[Linears], scheme: ChosenScheme) -> list[QuantizedBatch]:
    """Each of the linears in ``scheme``. A GPU takes them one under the other: columns follow one another, so a sweep
    over more rows takes hardly longer."""
    if len(alike) == 1 or not alike[0].weight.is_cuda:
        return [quantize(linears.weight.float(), scheme) for linears in alike]
    batch, start = quantize(_stacked(alike), scheme), 0
    parts: list[QuantizedBatch] = []
    for linears in alike:
        stop = start + linears.weight.shape[1]
        parts.append(batch.rows(start, stop))
        start = stop
    return parts


def _stacked(alike: list[Linears]) -> Tensor:
    """(B, rows of all, in) float32: widened and joined in one pass."""
    count, _, in_features = alike[0].weight.shape
    heights = [linears.weight.shape[1] for linears in alike]
    stacked = torch.empty(count, sum(heights), in_features, device=alike[0].weight.device)
    for part, linears in zip(stacked.split(heights, 1), alike, strict=True):
        part.copy_(linears.weight)
    return stacked


def _largest(alike: list[Linears]) -> str:
    """Name of the linear with the largest weight: what a scheme cannot hold is too large."""
    # One name for several matrices (the heads of a part) is the name of all of them.
    sizes = [(float(one.weight[i].abs().max()), name) for one in alike for i, name in enumerate(one.names)]
    return max(sizes)[1]


def _copy(stats: Inputs | None) -> Inputs | None:
    if not isinstance(stats, InputStats):
        return stats
    return replace(stats, hessian=stats.hessian.clone(), cross=None if stats.cross is None else stats.cross.clone())


def any_quantised(outputs: tuple[OutputJob, ...], names: tuple[str, ...]) -> bool:
    """Whether some output quantises one of these linears."""
    return any(name in output.methods for output in outputs for name in names)


def any_wanted(outputs: tuple[OutputJob, ...], names: tuple[str, ...]) -> bool:
    """Whether some output quantises one of these linears, or keeps the importance of its inputs."""
    return any_quantised(outputs, names) or any(o.sink.wants_importance(name) for o in outputs for name in names)


def needs_inputs(outputs: tuple[OutputJob, ...], names: tuple[str, ...]) -> bool:
    """Whether some output chooses the numbers of one of these linears with whole second moments of its inputs."""
    methods = (output.methods[name][1] for output in outputs for name in names if name in output.methods)
    return any(method.needs_inputs for method in methods)
