"""What a method gives back for a batch of matrices of one shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quantkit.schemes import IntScheme, QuantError, QuantizedTensor


@dataclass(frozen=True, slots=True)
class QuantizedBatch:
    """codes (B, out, in) uint8, scale (B, out, groups), zero_point the same or None, relative_loss (B,) float32;
    fallbacks: one for each matrix, as in `QuantError`."""

    scheme: IntScheme
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    relative_loss: Tensor
    fallbacks: tuple[str, ...]

    def decode(self) -> Tensor:
        """(B, out, in) float32, as a runtime will compute with it."""
        return self.scheme.decode(self.codes, self.scale, self.zero_point)

    def tensors(self, names: tuple[str, ...], n_tokens: tuple[int, ...]) -> list[QuantizedTensor]:
        """One `QuantizedTensor` for each matrix, on the CPU."""
        codes, scale = self.codes.cpu(), self.scale.cpu()
        zero = None if self.zero_point is None else self.zero_point.cpu()
        losses = self.relative_loss.tolist()
        return [
            QuantizedTensor(
                name,
                self.scheme,
                codes[i],
                scale[i],
                None if zero is None else zero[i],
                QuantError(losses[i], n, self.fallbacks[i]),
            )
            for i, (name, n) in enumerate(zip(names, n_tokens, strict=True))
        ]


Quantizer = Callable[[Tensor, IntScheme], QuantizedBatch]
"""A method with its inputs: weight (B, out, in) float32 and the scheme to store it in -> codes and scales."""
