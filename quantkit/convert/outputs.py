"""How the outputs of one conversion store a layer's linears, and the pure function that quantises them for all of
them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantkit.arch.base import Producer
from quantkit.calibrate.inputs import InputImportance, Inputs, InputStats
from quantkit.errors import CalibrationError, SchemeError
from quantkit.quantizers import Method
from quantkit.quantizers.batch import QuantizedBatch, Quantizer
from quantkit.quantizers.ldlq.two_sided import OutputFactor, one_under_the_other
from quantkit.quantizers.rescaling import NO_FOLDING, Folding
from quantkit.schemes import ChosenScheme


@dataclass(frozen=True, slots=True)
class OutputChoice:
    """How one output stores the linears of a layer. ``methods``: scheme and method of each that it quantises, others it
    keeps or drops; ``importance``: those of which it keeps the importance of their inputs; ``verbatim``: tensors whose
    stored bytes it takes over, which nothing can be folded into; ``folding``: input channels that it rescales."""

    methods: Mapping[str, tuple[ChosenScheme, Method]]
    importance: frozenset[str] = frozenset()
    verbatim: frozenset[str] = frozenset()
    folding: Folding = NO_FOLDING


@dataclass(frozen=True, slots=True)
class Linears:
    """B linears of one shape that play the same part (one projection of B experts, or B = 1), with their weights (B,
    out, in), float32 or bfloat16. One name for several matrices: the heads of a part.

    ``producers``: what makes the inputs of each, one for all, or () if nothing can absorb a rescaling of them.
    ``folded``: by number of the output, the weights of a part, which is cut from the folded linear. ``reach`` (B,): the
    largest |weight| of each and of the linears that share a scale with it, where these are not quantised together.
    ``output_factor``: of the Hessian of the model's loss in their outputs, None if it is not known. ``to_residual``:
    whether their outputs are added to the residual stream.
    """

    names: tuple[str, ...]
    weight: Tensor
    producers: tuple[Producer, ...] = ()
    folded: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    reach: Tensor | None = None
    output_factor: OutputFactor | None = None
    to_residual: bool = False

    def as_stored(self, number: int, folding: Folding) -> Linears:
        """The linears as an output has them before they are quantised: the same, or folded in float32. Of folded rows
        no output Hessian is known."""
        if number in self.folded:
            return replace(self, weight=self.folded[number], output_factor=None)
        if len(self.names) != len(self.weight) or not any(map(folding.changes, self.names)):
            return self
        pairs = zip(self.names, self.weight, strict=True)
        folded = torch.stack([folding.folded(name, weight).float() for name, weight in pairs])
        return replace(self, weight=folded, output_factor=None)


@dataclass(frozen=True, slots=True)
class Quantised:
    """What output number ``output`` stores of some `Linears`. ``n_tokens``: those that each saw; ``folding``: what the
    output did to the channels before."""

    output: int
    names: tuple[str, ...]
    batch: QuantizedBatch
    n_tokens: tuple[int, ...]
    folding: Folding = NO_FOLDING

    def decode(self) -> Tensor:
        """(B, out, in) float32 in the source's channels: what the streams compute with. Not for parts, which are
        unfolded as a whole."""
        decoded = self.batch.decode()
        if len(self.names) != len(decoded) or not any(map(self.folding.changes, self.names)):
            return decoded
        pairs = zip(self.names, decoded, strict=True)
        return torch.stack([self.folding.unfolded(name, weight) for name, weight in pairs])


@dataclass(frozen=True, slots=True)
class Importance:
    """What the linear ``name`` of output number ``output`` reads: importance (B, in) float32, mean squares over
    ``n_tokens``; B = 1 or its heads."""

    output: int
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
    work = _by_inputs(outputs, group)
    # Methods and foldings overwrite what they are given, the last one may: so the one with a factor comes last.
    order = sorted(work, key=lambda key: key.method.needs_hessian)
    for key in order:
        own = stats if key == order[-1] or stats is None else copied(stats, whole=key.method.needs_hessian)
        folding = NO_FOLDING if key.folded is None else outputs[key.folded].folding
        try:
            own = None if own is None else folding.inputs(group[0].producers, shrink(own, key.method))
            quantize = key.method.quantizer(own)
        except CalibrationError as error:
            raise CalibrationError(f"{_overflowing(group[0], own)}: {error.message}", hint=error.hint) from error
        for (number, scheme), linears in work[key].items():
            alike = [one.as_stored(number, outputs[number].folding) for one in linears]
            try:
                batches = _quantized(quantize, alike, scheme, output_aware=key.method.output_aware)
            except SchemeError as error:
                raise SchemeError(f"{_largest(alike)}: {error.message}", hint=error.hint) from error
            for one, batch in zip(alike, batches, strict=True):
                n_tokens = (0,) * len(one.names) if stats is None else stats.n_tokens
                made.append(Quantised(number, one.names, batch, n_tokens, outputs[number].folding))
        del own, quantize  # a factor goes before the next is made
    return tuple(made)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What shares a factor: a method, and the number of the output whose input channels are rescaled, if they are."""

    method: Method
    folded: int | None


def _by_inputs(
    outputs: tuple[OutputChoice, ...], group: tuple[Linears, ...]
) -> dict[_Prepared, dict[tuple[int, ChosenScheme], list[Linears]]]:
    """What shares a factor -> (number of the output, scheme) -> linears."""
    work: dict[_Prepared, dict[tuple[int, ChosenScheme], list[Linears]]] = {}
    for number, output in enumerate(outputs):
        rescaled = any(map(output.folding.rescales, group[0].producers))
        for linears in group:
            if linears.names[0] in output.methods:
                scheme, method = output.methods[linears.names[0]]
                key = _Prepared(method, number if rescaled else None)
                work.setdefault(key, {}).setdefault((number, scheme), []).append(linears)
    return work


def of_first_output(made: tuple[Quantised, ...]) -> Iterator[Quantised]:
    """What the first output stores: the calibrated stream computes with that."""
    return (one for one in made if one.output == 0)


def carried_weights(made: tuple[Quantised, ...], group: tuple[Linears, ...]) -> list[Tensor]:
    """(B, out, in) of each linear: what the first output made of it, float32, or the original where it keeps that."""
    carried = {one.names: one for one in of_first_output(made)}
    return [carried[linears.names].decode() if linears.names in carried else linears.weight for linears in group]


def importance_of(
    outputs: tuple[OutputChoice, ...], group: tuple[Linears, ...], stats: Inputs, kept: tuple[str, ...] = ()
) -> tuple[Importance, ...]:
    """What the linears of a group, and those of the same inputs that every output keeps, read, for each output that
    wants it: copies, in the channels of that output."""
    found: list[Importance] = []
    for number, output in enumerate(outputs):
        folded = output.folding.importance(group[0].producers if group else (), stats.importance)
        for names in (*(linears.names for linears in group), *((name,) for name in kept)):
            for place, name in enumerate(names):
                # One name has all rows, its heads; of several names each has one.
                rows = slice(None) if len(names) == 1 else slice(place, place + 1)
                if name in output.importance:
                    found.append(Importance(number, name, folded[rows].clone(), stats.n_tokens[rows]))
    return tuple(found)


def _quantized(
    quantize: Quantizer, alike: list[Linears], scheme: ChosenScheme, *, output_aware: bool
) -> list[QuantizedBatch]:
    """Each of the linears in ``scheme``. A GPU takes them one under the other: columns follow one another, so a sweep
    over more rows takes hardly longer."""
    reach = _reach(alike) if scheme.shares_scale else None
    factors = [linears.output_factor if output_aware else None for linears in alike]
    if len(alike) == 1 or not alike[0].weight.is_cuda or len({_block_shape(one) for one in factors}) > 1:
        pairs = zip(alike, factors, strict=True)
        return [
            quantize(one.weight.float(), scheme, reach=reach, output_factor=factor, to_residual=one.to_residual)
            for one, factor in pairs
        ]
    known = [one for one in factors if one is not None]
    joined = one_under_the_other(known) if known else None
    assert not any(one.to_residual for one in alike), "what is added to the residual reads inputs of its own"
    batch, start = quantize(_stacked(alike), scheme, reach=reach, output_factor=joined), 0
    parts: list[QuantizedBatch] = []
    for linears in alike:
        stop = start + linears.weight.shape[1]
        parts.append(batch.rows(start, stop))
        start = stop
    return parts


def _block_shape(factor: OutputFactor | None) -> tuple[int, ...]:
    """() without one. Equal blocks of several linears can go through a sweep together."""
    return () if factor is None else tuple(factor.lower.shape[2:])


def _reach(alike: list[Linears]) -> Tensor:
    """(B,): the largest |weight| of linears that read the same, which runtimes join."""
    found = (reach_of(one.weight) if one.reach is None else one.reach for one in alike)
    return torch.stack(list(found)).amax(0)


def reach_of(weight: Tensor) -> Tensor:
    """weight (B, out, in) -> the largest |weight| of each (B,) float32. One pass, no copy."""
    lowest, highest = torch.aminmax(weight.flatten(1), dim=1)
    return torch.maximum(-lowest, highest).float()


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
    return max(sizes, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])[1]


def _overflowing(linears: Linears, stats: Inputs | None) -> str:
    """Name of the linear whose inputs are not finite, or the first one."""
    if stats is None or len(linears.names) != len(stats.importance):
        return linears.names[0]  # one name for several matrices
    finite = stats.importance.isfinite().all(-1).tolist()
    return next((name for name, good in zip(linears.names, finite, strict=True) if not good), linears.names[0])


def copied(stats: Inputs, *, whole: bool) -> Inputs:
    """A copy of statistics, for a method that may overwrite them; not ``whole``: of their diagonal."""
    if not whole or not isinstance(stats, InputStats):
        return InputImportance(stats.importance.clone(), stats.n_tokens)
    return replace(stats, hessian=stats.hessian.clone(), cross=None if stats.cross is None else stats.cross.clone())


def any_quantised(outputs: tuple[OutputChoice, ...], names: tuple[str, ...]) -> bool:
    """Whether some output quantises one of these linears."""
    return any(name in output.methods for output in outputs for name in names)


def any_wanted(outputs: tuple[OutputChoice, ...], names: tuple[str, ...]) -> bool:
    """Whether some output quantises one of these linears, or keeps the importance of its inputs."""
    return any_quantised(outputs, names) or any(name in output.importance for output in outputs for name in names)


def output_aware(outputs: tuple[OutputChoice, ...], names: tuple[str, ...]) -> bool:
    """Whether some output chooses the numbers of one of these linears by what they do to the model's loss."""
    methods = (output.methods[name][1] for output in outputs for name in names if name in output.methods)
    return any(method.output_aware for method in methods)


def needs_hessian(outputs: tuple[OutputChoice, ...], names: tuple[str, ...]) -> bool:
    """Whether some output chooses the numbers of one of these linears with whole second moments of its inputs."""
    methods = (output.methods[name][1] for output in outputs for name in names if name in output.methods)
    return any(method.needs_hessian for method in methods)
