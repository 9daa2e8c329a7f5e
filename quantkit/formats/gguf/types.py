"""Every tensor type that a GGUF file may name: its number, and how many bytes a run of weights takes. Plain data.

quantkit writes `PLAIN` and the block types of `schemes.ggml.types`; the rest is known so that foreign files can be
listed and measured. Source: enum ggml_type of ggml/include/ggml.h, block structs of ggml/src/ggml-common.h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantkit.schemes.ggml.types import BLOCK_TYPES


@dataclass(frozen=True, slots=True)
class TensorType:
    """``id``: enum ggml_type; ``nbytes`` bytes hold ``block`` weights of one row."""

    name: str
    id: int
    block: int
    nbytes: int

    def data_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor whose rows (last dimension of ``shape``) are whole blocks."""
        assert shape[-1] % self.block == 0, f"{self.name}: rows of {shape[-1]} are no multiple of {self.block}"
        return math.prod(shape) // self.block * self.nbytes


PLAIN = tuple(
    TensorType(name, number, 1, nbytes)
    for name, number, nbytes in (
        ("F32", 0, 4),
        ("F16", 1, 2),
        ("I8", 24, 1),
        ("I16", 25, 2),
        ("I32", 26, 4),
        ("I64", 27, 8),
        ("F64", 28, 8),
        ("BF16", 30, 2),
    )
)
"""Types of one element each."""

_FOREIGN = (
    TensorType("Q8_1", 9, 32, 36),
    TensorType("Q8_K", 15, 256, 292),
    TensorType("TQ1_0", 34, 256, 54),
    TensorType("TQ2_0", 35, 256, 66),
    TensorType("NVFP4", 40, 64, 36),
    TensorType("Q1_0", 41, 128, 18),
)

_BLOCKS = tuple(TensorType(kind.name, kind.id, kind.block, kind.nbytes) for kind in BLOCK_TYPES.values())

WRITABLE: dict[str, TensorType] = {kind.name: kind for kind in (*PLAIN, *_BLOCKS)}
"""What quantkit writes, by ggml's name."""

TYPES_BY_ID: dict[int, TensorType] = {kind.id: kind for kind in (*PLAIN, *_BLOCKS, *_FOREIGN)}
"""All known types by the number that stands in files."""
