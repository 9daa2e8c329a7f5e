"""The outputs of one walk: which linears each quantises how, and where the results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from quantkit.calibrate.inputs import InputStats
from quantkit.errors import CalibrationError
from quantkit.quantizers import Method
from quantkit.quantizers.batch import QuantizedBatch
from quantkit.schemes import IntScheme, QuantizedTensor


class Sink(Protocol):
    """A checkpoint being written: every tensor at an offset known before the work began, in any order, as often as need
    be."""

    def write(self, tensor: QuantizedTensor) -> None:
        """Store a quantised linear."""
        ...

    def write_kept(self, name: str, start_row: int, tensor: Tensor) -> None:
        """Store rows of a kept tensor, cast to its planned dtype."""
        ...

    def sync(self) -> None:
        """Bring what was written to the disk."""
        ...


@dataclass(frozen=True, slots=True)
class OutputJob:
    """One output. ``methods``: how each quantised linear is to be stored and chosen; other tensors are kept or
    dropped."""

    methods: Mapping[str, tuple[IntScheme, Method]]
    sink: Sink


@dataclass(frozen=True, slots=True)
class Linears:
    """B linears of one shape that play the same part (one projection of B experts, or B = 1), with their weights (B,
    out, in) float32."""

    names: tuple[str, ...]
    weight: Tensor


def quantize_linears(
    outputs: tuple[OutputJob, ...],
    group: tuple[Linears, ...],
    stats: InputStats | None,
    on_tensor: Callable[[int, QuantizedTensor], None],
) -> tuple[QuantizedBatch | None, ...]:
    """Quantise linears that the same inputs feed, for every output, and write them.

    The factor of a method is made once for the group. Returns what the first output made of each, None where it keeps
    the original. ``on_tensor(output, tensor)`` hears of each. ``stats`` is overwritten.
    """
    first: list[QuantizedBatch | None] = [None] * len(group)
    work = [
        (method, number, position, scheme)
        for number, output in enumerate(outputs)
        for position, linears in enumerate(group)
        if linears.names[0] in output.methods
        for scheme, method in [output.methods[linears.names[0]]]
    ]
    methods = list(dict.fromkeys(method for method, *_ in work))
    for method in methods:
        # Methods overwrite what they are given; the last one may.
        own = stats if method == methods[-1] else _copy(stats)
        try:
            quantize = method.quantizer(own)
        except CalibrationError as error:
            raise CalibrationError(f"{group[0].names[0]}: {error.message}", hint=error.hint) from error
        for _, number, position, scheme in (item for item in work if item[0] == method):
            names = group[position].names
            batch = quantize(group[position].weight, scheme)
            for tensor in batch.tensors(names, (0,) * len(names) if stats is None else stats.n_tokens):
                outputs[number].sink.write(tensor)
                on_tensor(number, tensor)
            if number == 0:
                first[position] = batch
    return tuple(first)


def _copy(stats: InputStats | None) -> InputStats | None:
    return None if stats is None else replace(stats, hessian=stats.hessian.clone())


def any_quantised(outputs: tuple[OutputJob, ...], names: tuple[str, ...]) -> bool:
    """Whether some output quantises one of these linears."""
    return any(name in output.methods for output in outputs for name in names)
