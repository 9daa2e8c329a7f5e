"""What a method gives back for a batch of matrices of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quantkit.schemes import ChosenScheme, QuantError, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.quantizers.ldlq.two_sided import OutputFactor
    from quantkit.schemes.grid import Stored


SLICE_BYTES = 128 * 2**20
"""Float32 bytes of the rows that are quantised at once; about six buffers of this size exist meanwhile."""
SHORT_SLICE_BYTES = 16 * 2**20
"""The same for methods that go through each weight a few times only. The C library hands out buffers of up to 32 MiB
again and again; larger ones are new pages each time, and zeroing them took longer than rounding to nearest."""
DEVICE_SLICE_BYTES = 3 * 2**29
"""Float32 bytes of the rows that a GPU quantises at once: there short slices cost launches."""

ALIGNED = 64
"""Slices have a multiple of so many rows: matrix products with odd sides miss the tensor cores (6 times as long)."""


def in_slices(weight: Tensor, *, short: bool = False) -> tuple[Tensor, ...]:
    """weight (B, out, in) float32 as slices of rows, which do not depend on each other; ``short`` ones on a
    processor."""
    nbytes = DEVICE_SLICE_BYTES if weight.is_cuda else SHORT_SLICE_BYTES if short else SLICE_BYTES
    rows = nbytes // (4 * weight.shape[-1] * len(weight))
    return weight.split(max(1, rows if rows < ALIGNED else rows // ALIGNED * ALIGNED), dim=1)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """A slice. ``stored``: each (B, rows, ...); ``loss`` and ``norm`` (B, rows): of error and weight, as the method
    weighs them."""

    stored: Stored
    loss: Tensor
    norm: Tensor


@dataclass(frozen=True, slots=True)
class QuantizedBatch:
    """``stored``: as in `QuantizedTensor`, each with a leading dimension B; loss and norm (B, out) float32: of error
    and weight, as the method weighs them; fallbacks: one for each matrix, as in `QuantError`.

    ``output_loss`` and ``output_norm`` (B, out) float32: of error and weight under the output Hessian too, of the
    weight as if outputs were independent; None without one."""

    scheme: ChosenScheme
    stored: Stored
    loss: Tensor
    norm: Tensor
    fallbacks: tuple[str, ...]
    output_loss: Tensor | None = None
    output_norm: Tensor | None = None

    @classmethod
    def of(cls, scheme: ChosenScheme, slices: Sequence[QuantizedRows], fallbacks: tuple[str, ...]) -> QuantizedBatch:
        """Slices of rows joined."""
        import torch

        stored = {key: torch.cat([part.stored[key] for part in slices], 1) for key in slices[0].stored}
        loss, norm = (torch.cat(values, 1) for values in zip(*((s.loss, s.norm) for s in slices), strict=True))
        return cls(scheme, stored, loss, norm, fallbacks)

    @property
    def relative_loss(self) -> Tensor:
        """(B,) float32: see `QuantError.relative_loss`."""
        return self.loss.sum(1) / self.norm.sum(1).clamp_min(1e-30)

    @property
    def relative_output_losses(self) -> list[float] | list[None]:
        """Of each matrix: see `QuantError.output_loss`."""
        if self.output_loss is None or self.output_norm is None:
            return [None] * len(self.loss)
        return (self.output_loss.sum(1) / self.output_norm.sum(1).clamp_min(1e-30)).tolist()

    def rows(self, start: int, stop: int) -> QuantizedBatch:
        """The linears that are rows [start, stop) of each matrix."""
        stored = {key: value[:, start:stop] for key, value in self.stored.items()}
        loss, norm = self.loss[:, start:stop], self.norm[:, start:stop]
        output = (None if one is None else one[:, start:stop] for one in (self.output_loss, self.output_norm))
        return QuantizedBatch(self.scheme, stored, loss, norm, self.fallbacks, *output)

    def decode(self) -> Tensor:
        """(B, out, in) float32, as a runtime will compute with it."""
        return self.scheme.decode(**self.stored)

    def tensors(self, names: tuple[str, ...], n_tokens: tuple[int, ...]) -> list[QuantizedTensor]:
        """One `QuantizedTensor` for each matrix, where it was made; a single name for several matrices (the heads of
        one tensor) gets them one under the other."""
        stored = self.stored
        if len(names) == 1:
            fallback = next((text for text in self.fallbacks if text), "")
            known = [one for one in self.relative_output_losses if one is not None]
            output_loss = sum(known) / len(known) if known else None
            error = QuantError(float(self.relative_loss.mean()), max(n_tokens), fallback, output_loss)
            return [QuantizedTensor(names[0], self.scheme, {k: v.flatten(0, 1) for k, v in stored.items()}, error)]
        losses, output_losses = self.relative_loss.tolist(), self.relative_output_losses
        return [
            QuantizedTensor(
                name,
                self.scheme,
                {key: value[i] for key, value in stored.items()},
                QuantError(losses[i], n, self.fallbacks[i], output_losses[i]),
            )
            for i, (name, n) in enumerate(zip(names, n_tokens, strict=True))
        ]


class Quantizer(Protocol):
    """A method with its inputs."""

    def __call__(
        self,
        weight: Tensor,
        scheme: ChosenScheme,
        *,
        reach: Tensor | None = None,
        output_factor: OutputFactor | None = None,
        to_residual: bool = False,
    ) -> QuantizedBatch:
        """weight (B, out, in) float32 and the scheme to store it in -> what is stored. ``reach`` (B,): see `grid` of
        schemes that have ``shares_scale``. ``output_factor``: of what errors of the outputs cost, for
        methods that are ``output_aware``. ``to_residual``: whether the linears' outputs are added to the residual
        stream."""
        ...
