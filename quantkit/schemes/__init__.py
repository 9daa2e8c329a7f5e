"""What the stored numbers mean: pure maths on tensors, no files, no models.

A new scheme is one file here and one member of `Scheme`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from quantkit.schemes.affine_int import IntScheme
from quantkit.schemes.bnb4 import Bnb4Scheme
from quantkit.schemes.float8 import Float8Scheme
from quantkit.schemes.ggml.scheme import GgmlScheme
from quantkit.schemes.mxfp4 import Mxfp4Scheme
from quantkit.schemes.mxfp8 import Mxfp8Scheme
from quantkit.schemes.nvfp4 import Nvfp4Scheme
from quantkit.schemes.w4afp8 import W4AFp8Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.grid import Stored

ChosenScheme = Annotated[
    IntScheme | GgmlScheme | Nvfp4Scheme | Mxfp4Scheme | Mxfp8Scheme | W4AFp8Scheme | Bnb4Scheme,
    Field(discriminator="kind"),
]
"""Schemes whose codes a method chooses."""
Scheme = Annotated[
    IntScheme | GgmlScheme | Nvfp4Scheme | Mxfp4Scheme | Mxfp8Scheme | W4AFp8Scheme | Bnb4Scheme | Float8Scheme,
    Field(discriminator="kind"),
]


@dataclass(frozen=True, slots=True)
class QuantError:
    """How far a quantised linear is from its original, as the method saw it.

    ``relative_loss``: tr(E H E^T) / tr(W H W^T) on the calibration inputs, or the relative squared weight error without
    calibration.
    ``output_loss``: tr(H_O E H E^T) / tr(diag(H_O) W H W^T) with the Hessian of the model's loss in the linear's
    outputs, where a method lowers that in place of ``relative_loss``; else None.
    ``n_tokens``: calibration tokens that this linear saw. ``fallback``: why something weaker than the method asked for
    was used, or "".
    """

    relative_loss: float
    n_tokens: int = 0
    fallback: str = ""
    output_loss: float | None = None


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A linear after quantisation.

    ``stored``: what its scheme keeps, by the names of the arguments of the scheme's ``decode``.
    ``int``: codes (out, in) uint8 (unsigned, unpacked: packing is the format's business), scale (out, groups) and, if
    asymmetric, zero_point (out, groups) uint8. ``float8``: codes (out, in) float8_e4m3fn, scale (out blocks, in
    blocks). ``ggml``: blocks (out, row bytes) uint8. ``nvfp4``, ``mxfp4``: codes (out, in) uint8, sign and e2m1, scale
    (out, groups) float8_e4m3fn or uint8 exponents; ``nvfp4`` also global_scale (out, 1) float32. ``mxfp8``: codes (out,
    in) uint8, the bits of e4m3, scale (out, groups) uint8 exponents. ``w4afp8``: as ``int``. ``bnb4``: codes (out, in)
    uint8, scale (out, blocks) float32, or uint8 codes with nested_absmax (out, 1) float32.
    """

    name: str
    scheme: Scheme
    stored: Stored
    error: QuantError

    def decode(self) -> Tensor:
        """The weight that a runtime will compute with, (out, in) float32."""
        return self.scheme.decode(**self.stored)


def describe(scheme: Scheme | None) -> str:
    """A scheme in a few words: "int4 g128", "int8 channel asymmetric", "fp8 block", "Q4_K", "unquantised"."""
    return "unquantised" if scheme is None else scheme.label


__all__ = [
    "Bnb4Scheme",
    "ChosenScheme",
    "Float8Scheme",
    "GgmlScheme",
    "IntScheme",
    "Mxfp4Scheme",
    "Mxfp8Scheme",
    "Nvfp4Scheme",
    "QuantError",
    "QuantizedTensor",
    "Scheme",
    "W4AFp8Scheme",
    "describe",
]
