"""FP8 (e4m3) with one float32 scale for each 128 x 128 block: DeepSeek V3's own storage, carried over byte for byte.

weight ~ codes * scale of its block          edge blocks are partial
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from quantkit.errors import SchemeError

if TYPE_CHECKING:
    from torch import Tensor


class Float8Scheme(BaseModel, frozen=True, extra="forbid"):
    """FP8 e4m3 blocks as the source stores them. quantkit keeps such weights; it does not choose them anew."""

    kind: Literal["float8"] = "float8"
    block_size: tuple[int, int] = (128, 128)

    @property
    def has_grid(self) -> bool:
        """No method chooses codes: the source's are kept."""
        return False

    @property
    def fits_tables(self) -> bool:
        """Tables are never FP8 in a source."""
        return False

    @property
    def label(self) -> str:
        """What tables and messages call it."""
        return "fp8 block"

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `SchemeError` unless the tensor is a matrix (out_features, in_features)."""
        if len(shape) != 2:
            raise SchemeError(
                f"{name}: shape {list(shape)} is not a matrix.", hint="Add a rule that keeps this tensor."
            )

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(ceil(out / block rows), ceil(in / block columns))."""
        return math.ceil(shape[0] / self.block_size[0]), math.ceil(shape[1] / self.block_size[1])

    def bpw(self, shape: tuple[int, ...]) -> float:
        """Bits per weight of codes and scales for a matrix (out_features, in_features)."""
        return 8 + 32 * math.prod(self.scale_shape(shape)) / math.prod(shape)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """codes (out, in) float8_e4m3fn, scale (out blocks, in blocks) float32 -> weight (out, in) float32."""
        out_features, in_features = codes.shape
        rows, columns = self.block_size
        per_weight = scale.repeat_interleave(rows, 0)[:out_features].repeat_interleave(columns, 1)[:, :in_features]
        return codes.float() * per_weight
