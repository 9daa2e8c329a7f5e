"""How the outputs of one conversion store a layer's linears, and the pure function that quantises them for all of
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.calibrate.inputs import Inputs, InputStats
from quantkit.errors import CalibrationError, SchemeError
from quantkit.quantizers import Method
from quantkit.quantizers.batch import QuantizedBatch, Quantizer
from quantkit.schemes import ChosenScheme


@dataclass(frozen=True, slots=True)
class OutputChoice:
    """How one output stores the linears of a layer. ``methods``: scheme and method of each that it quantises, others it
    keeps or drops; ``importance``: those of which it keeps the importance of their inputs."""

    methods: Mapping[str, tuple[ChosenScheme, Method]]
    importance: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Linears:
    """B linears of one shape that play the same part (one projection of B experts, or B = 1), with their weights (B,
    out, in), float32 or bfloat16. One name for several matrices: the heads of a part."""

    names: tuple[str, ...]
    weight: Tensor


@dataclass(frozen=True, slots=True)
class Quantised:
    """What output number ``output`` stores of some `Linears`. ``n_tokens``: those that each saw."""

    output: int
    names: tuple[str, ...]
    batch: QuantizedBatch
    n_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Importance:
    """What the linear ``name`` reads: importance (B, in) float32, mean squares over ``n_tokens``; B = 1 or its
    heads."""

    name: str
    importance: Tensor
    n_tokens: tuple[int, ...]


def quantize_linears(
    outputs: tuple[OutputChoice, ...],
    group: tuple[Linears, ...],
    stats: Inputs | None,
    shrink: Callable[[Inputs, Method], Inputs] = lambda stats, method: stats,
) -> tuple[Quantised, ...]:
    """Quantise linears that the same inputs feed, for every output.

    The factor of a method is made once for the group. ``shrink(stats, method)``: pulls the statistics of few tokens as
    the method asks for, in place; what one method is given does not depend on the others. ``stats`` is overwritten.
    """
    made: list[Quantised] = []
    work = _by_method(outputs, group)
    # Methods overwrite what they are given, the last one may: so the one with a factor comes last.
    methods = sorted(work, key=lambda method: method.needs_inputs)
    for method in methods:
        own = stats if method == methods[-1] or not method.needs_inputs else _copy(stats)
        try:
            quantize = method.quantizer(None if own is None else shrink(own, method))
        except CalibrationError as error:
            raise CalibrationError(f"{group[0].names[0]}: {error.message}", hint=error.hint) from error
        for (number, scheme), alike in work[method].items():
            try:
                batches = _quantized(quantize, alike, scheme)
            except SchemeError as error:
                raise SchemeError(f"{_largest(alike)}: {error.message}", hint=error.hint) from error
            for linears, batch in zip(alike, batches, strict=True):
                n_tokens = (0,) * len(linears.names) if stats is None else stats.n_tokens
                made.append(Quantised(number, linears.names, batch, n_tokens))
        del own, quantize  # a factor goes before the next is made
    return tuple(made)


def _by_method(
    outputs: tuple[OutputChoice, ...], group: tuple[Linears, ...]
) -> dict[Method, dict[tuple[int, ChosenScheme], list[Linears]]]:
    """Method -> (number of the output, scheme) -> linears."""
    work: dict[Method, dict[tuple[int, ChosenScheme], list[Linears]]] = {}
    for number, output in enumerate(outputs):
        for linears in group:
            if linears.names[0] in output.methods:
                scheme, method = output.methods[linears.names[0]]
                work.setdefault(method, {}).setdefault((number, scheme), []).append(linears)
    return work


def of_first_output(made: tuple[Quantised, ...]) -> Iterator[Quantised]:
    """What the first output stores: the calibrated stream computes with that."""
    return (one for one in made if one.output == 0)


def carried_weights(made: tuple[Quantised, ...], group: tuple[Linears, ...]) -> list[Tensor]:
    """(B, out, in) of each linear: what the first output made of it, float32, or the original where it keeps that."""
    batches = {one.names: one.batch for one in of_first_output(made)}
    return [batches[linears.names].decode() if linears.names in batches else linears.weight for linears in group]


def importance_of(
    outputs: tuple[OutputChoice, ...], group: tuple[Linears, ...], stats: Inputs, kept: tuple[str, ...] = ()
) -> tuple[Importance, ...]:
    """What the linears of a group, and those of the same inputs that every output keeps, read: copies, for those of
    which some output wants it."""
    wanted = frozenset[str]().union(*(output.importance for output in outputs))
    found: list[Importance] = []
    for names in (*(linears.names for linears in group), *((name,) for name in kept)):
        for number, name in enumerate(names):
            # One name has all rows, its heads; of several names each has one.
            rows = slice(None) if len(names) == 1 else slice(number, number + 1)
            if name in wanted:
                found.append(Importance(name, stats.importance[rows].clone(), stats.n_tokens[rows]))
    return tuple(found)


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


def any_quantised(outputs: tuple[OutputChoice, ...], names: tuple[str, ...]) -> bool:
    """Whether some output quantises one of these linears."""
    return any(name in output.methods for output in outputs for name in names)


def any_wanted(outputs: tuple[OutputChoice, ...], names: tuple[str, ...]) -> bool:
    """Whether some output quantises one of these linears, or keeps the importance of its inputs."""
    return any_quantised(outputs, names) or any(name in output.importance for output in outputs for name in names)


def needs_inputs(outputs: tuple[OutputChoice, ...], names: tuple[str, ...]) -> bool:
    """Whether some output chooses the numbers of one of these linears with whole second moments of its inputs."""
    methods = (output.methods[name][1] for output in outputs for name in names if name in output.methods)
    return any(method.needs_inputs for method in methods)
