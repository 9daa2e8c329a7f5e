"""Rescaled input channels, folded into the model (AWQ, arXiv 2306.00978, section 3.2; SmoothQuant, arXiv 2211.10438).

A method may divide the inputs of some linears by factors and multiply the linears' columns with them: weights that
matter then lie on a finer part of the grid. What makes the inputs (a norm, or rows of an earlier linear, see
`quantkit.arch.base.Producer`) absorb the division, so that the model computes the same and no runtime has to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from quantkit.arch.base import Producer
from quantkit.errors import CalibrationError
from quantkit.schemes import ChosenScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.calibrate.inputs import InputImportance, Inputs


@dataclass(frozen=True, slots=True)
class ChannelReader:
    """M linears of one shape that read rescaled channels and will be quantised: weight (M, out, in), float32 or
    bfloat16, in ``scheme``; ``inputs``: what each of them reads of the tokens that it sees. Nothing of it may be
    changed."""

    scheme: ChosenScheme
    weight: Tensor
    inputs: InputImportance

    @property
    def tokens(self) -> Tensor:
        """(M,) float32: the tokens that each linear sees."""
        return self.inputs.importance.new_tensor(self.inputs.n_tokens)


@dataclass(frozen=True, slots=True)
class Channels:
    """The inputs that B producers of one width make, as a method sees them that may rescale them.

    ``inputs``: what they are over all tokens, (B, n). ``readers()``: what reads them, batch by batch, each read when it
    is asked for: if B > 1 one linear for each producer, in their order; if B = 1 any number.
    """

    producers: tuple[Producer, ...]
    inputs: InputImportance
    readers: Callable[[], Iterator[ChannelReader]]


@runtime_checkable
class RescalingMethod(Protocol):
    """A method that rescales input channels before it chooses codes."""

    def rescale(self, channels: Channels) -> Tensor | None:
        """Factors (B, n) float32, positive and finite, that the inputs are divided by; None: as they are."""
        ...


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

    def extended(self, rescaled: Iterable[Rescaled]) -> Folding:
        """With more rescalings. Raises as the constructor."""
        known = (Rescaled(producer, factors) for producer, factors in self._factors.items())
        return Folding((*known, *rescaled))

    def changes(self, name: str) -> bool:
        """Whether a tensor of the source is stored changed."""
        return name in self._columns or name in self._producers

    def folded(self, name: str, weight: Tensor) -> Tensor:
        """A tensor of the source (out, in) or (n,) as the output stores it, float32; itself if nothing changes."""
        return self._scaled(name, weight, inverse=False)

    def unfolded(self, name: str, weight: Tensor) -> Tensor:
        """The inverse of `folded`: what a stream in the source's channels computes with."""
        return self._scaled(name, weight, inverse=True)

    def rescales(self, producer: Producer) -> bool:
        """Whether the inputs that ``producer`` makes are rescaled."""
        return producer in self._factors

    def importance(self, producers: Sequence[Producer], importance: Tensor) -> Tensor:
        """Mean squares (B, in) of inputs after the division. ``producers``: of each matrix, or one for all."""
        inverse = self._inverse(producers, importance)
        return importance if inverse is None else importance * inverse.square()

    def inputs(self, producers: Sequence[Producer], stats: Inputs) -> Inputs:
        """Statistics of inputs after the division, E[x x^T] -> E[x x^T] / (f f^T), in place. ``producers``: of each
        matrix, or one for all."""
        inverse = self._inverse(producers, stats.importance)
        if inverse is None:
            return stats
        from quantkit.calibrate.inputs import InputImportance

        if isinstance(stats, InputImportance):
            return replace(stats, importance=stats.importance * inverse.square())
        for sums in (stats.hessian, stats.cross):
            if sums is not None:
                sums.mul_(inverse.unsqueeze(-1)).mul_(inverse.unsqueeze(-2))
        return stats

    def _inverse(self, producers: Sequence[Producer], like: Tensor) -> Tensor | None:
        """One over the factors, (B, in) or (1, in); None if none of these inputs is rescaled."""
        if not any(map(self.rescales, producers)):
            return None
        import torch

        ones = like.new_ones(like.shape[-1])
        return torch.stack([self._factors.get(one, ones).to(like.device).reciprocal() for one in producers])

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
