"""Rescaled input channels, folded into the model (AWQ, arXiv 2306.00978, section 3.2; SmoothQuant, arXiv 2211.10438).

A method may divide the inputs of some linears by factors and multiply the linears' columns with them: weights that
matter then lie on a finer part of the grid. What makes the inputs (a norm, or rows of an earlier linear, see
`quantkit.arch.base.Producer`) absorb the division, so that the model computes the same and no runtime has to know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantkit.calibrate.inputs import InputImportance, InputStats
from quantkit.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.arch.base import Producer
    from quantkit.calibrate.inputs import Inputs


@dataclass(frozen=True, slots=True, eq=False)
class Rescaled:
    """The inputs that ``producer`` makes are divided by ``factors`` (n,) float32, the columns of its readers multiplied
    with them."""

    producer: Producer
    factors: Tensor


class Folding:
    """The rescalings of one output in one layer: every tensor and every statistic as that output has them.

    The calibration streams know nothing of it: they compute with unfolded weights, in the source's channels.
    """

    def __init__(self, rescaled: Iterable[Rescaled] = ()) -> None:
        """Raises `CalibrationError` for factors that are not positive and finite."""
        self._factors: dict[Producer, Tensor] = {}
        self._columns: dict[str, Tensor] = {}
        self._producers: dict[str, Producer] = {}
        for one in rescaled:
            _check(one)
            self._factors[one.producer] = one.factors
            self._columns.update(dict.fromkeys(one.producer.readers, one.factors))
            self._producers[one.producer.tensor] = one.producer

    def __bool__(self) -> bool:
        """Whether anything is rescaled."""
        return bool(self._factors)

    def changes(self, name: str) -> bool:
        """Whether a tensor of the source is stored changed."""
        return name in self._columns or name in self._producers

    def folded(self, name: str, weight: Tensor) -> Tensor:
        """A tensor of the source (out, in) or (n,) as the output stores it, float32; itself if nothing changes."""
        return self._scaled(name, weight, inverse=False)

    def unfolded(self, name: str, weight: Tensor) -> Tensor:
        """The inverse of `folded`: what a stream in the source's channels computes with."""
        return self._scaled(name, weight, inverse=True)

    def inputs(self, producer: Producer | None, stats: Inputs) -> Inputs:
        """Statistics of the inputs that ``producer`` makes, after the division: E[x x^T] -> E[x x^T] / (f f^T)."""
        factors = None if producer is None else self._factors.get(producer)
        if factors is None:
            return stats
        inverse = factors.reciprocal().to(stats.importance.device)
        if isinstance(stats, InputImportance):
            return replace(stats, importance=stats.importance * inverse.square())
        outer = inverse.unsqueeze(-1) * inverse
        cross = None if stats.cross is None else stats.cross * outer
        return InputStats(stats.hessian * outer, cross, stats.n_tokens)

    def _scaled(self, name: str, weight: Tensor, *, inverse: bool) -> Tensor:
        columns, producer = self._columns.get(name), self._producers.get(name)
        if columns is not None:
            columns = columns.to(weight.device)
            weight = weight.float() * (columns.reciprocal() if inverse else columns)
        if producer is not None:
            factors = self._factors[producer].to(weight.device)
            weight = producer.divided(weight.float(), factors.reciprocal() if inverse else factors)
        return weight


NO_FOLDING = Folding()


def _check(rescaled: Rescaled) -> None:
    factors = rescaled.factors
    if not bool(((factors > 0) & factors.isfinite()).all()):
        raise CalibrationError(
            f"{rescaled.producer.tensor}: a factor of its channels is zero, negative or no number.",
            hint="Take a method that does not rescale (gptq), or other calibration text.",
        )
