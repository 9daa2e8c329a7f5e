"""What the stored numbers mean: pure maths on tensors, no files, no models.

A new scheme is one file here and one member of `Scheme`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from quantkit.schemes.affine_int import IntScheme
from quantkit.schemes.float8 import Float8Scheme

if TYPE_CHECKING:
    from torch import Tensor

Scheme = Annotated[IntScheme | Float8Scheme, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class QuantError:
    """How far a quantised linear is from its original, as the method saw it.

    ``relative_loss``: tr(E H E^T) / tr(W H W^T) on the calibration inputs, or the relative squared weight error without
    calibration.
    ``n_tokens``: calibration tokens that this linear saw. ``fallback``: why something weaker than the method asked for
    was used, or "".
    """

    relative_loss: float
    n_tokens: int = 0
    fallback: str = ""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A linear after quantisation. Codes are unpacked; packing them is the format's business.

    codes (out, in) uint8 for ``int`` (unsigned), float8_e4m3fn for ``float8``; scale (out, groups) or (out blocks, in
    blocks); zero_point (out, groups) uint8 or None.
    """

    name: str
    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    error: QuantError

    def decode(self) -> Tensor:
        """The weight that a runtime will compute with, (out, in) float32."""
        return self.scheme.decode(self.codes, self.scale, self.zero_point)


__all__ = ["Float8Scheme", "IntScheme", "QuantError", "QuantizedTensor", "Scheme"]
