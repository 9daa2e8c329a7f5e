"""The outputs of one walk: which linears each quantises how, and where the results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from quantkit.calibrate.inputs import InputStats
from quantkit.quantizers import Method
from quantkit.schemes import IntScheme, QuantizedTensor


class Sink(Protocol):
    """A checkpoint being written: every tensor at an offset known before the work began, in any order, as often as need be."""

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
    """One output. ``methods``: how each quantised linear is to be stored and chosen; other tensors are kept or dropped."""

    methods: Mapping[str, tuple[IntScheme, Method]]
    sink: Sink


@dataclass(frozen=True, slots=True)
class Linears:
    """B linears of one shape that play the same part (one projection of B experts, or B = 1), with their weights (B, out, in) float32."""

    names: tuple[str, ...]
    weight: Tensor


def quantize_linears(
    outputs: tuple[OutputJob, ...],
    group: tuple[Linears, ...],
    stats: InputStats | None,
    on_tensor: Callable[[int, QuantizedTensor], None],
) -> tuple[Tensor, ...]:
    """Quantise linears that the same inputs feed, for every output, and write them.

    The factor of a method is made once for the group. Returns the weights (B, out, in) float32 that the stream goes on with: those
    of the first output, or the original where the first output keeps the linear. ``on_tensor(output, tensor)`` hears of each.
    ``stats`` is overwritten.
    """
    carried = [linears.weight for linears in group]
    for number, output in enumerate(outputs):
        prepared: dict[Method, object] = {}
        for position, linears in enumerate(group):
            decision = output.methods.get(linears.names[0])
            if decision is None:
                continue
            scheme, method = decision
            if method not in prepared:
                prepared[method] = method.prepare(_copy(stats))
            batch = method.quantize(linears.weight, scheme, prepared[method])  # type: ignore[arg-type]
            n_tokens = (0,) * len(linears.names) if stats is None else stats.n_tokens
            for tensor in batch.tensors(linears.names, n_tokens):
                output.sink.write(tensor)
                on_tensor(number, tensor)
            if number == 0:
                carried[position] = batch.decode()
    return tuple(carried)


def _copy(stats: InputStats | None) -> InputStats | None:
    """Methods overwrite what they are given."""
    return None if stats is None else replace(stats, hessian=stats.hessian.clone())


def any_quantised(outputs: tuple[OutputJob, ...], names: tuple[str, ...]) -> bool:
    """Whether some output quantises one of these linears."""
    return any(name in output.methods for output in outputs for name in names)
