"""The block types of ggml that quantkit writes: sizes, level grids, and what the scales of a block are made of.

A row is cut into blocks; a block into groups that share one effective scale (and, for some types, one offset):

    weight ~ scale * level[code] + offset          scale = d * sub_scale (or d)
                                                   offset = -dmin * sub_min (or dmin; or nothing)

Sources: ggml/src/ggml-common.h and dequantize_row_* of ggml-quants.c in llama.cpp. Plain data, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""kvalues_iq4nl."""
E2M1_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of FP4 (e2m1), kvalues_mxfp4; code 8 is minus zero."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """One type of ggml. ``id``: enum ggml_type; ``block``: weights of a block; ``nbytes``: bytes of a block; ``group``:
    weights that share an effective scale.

    ``levels``: value of each code, rising except for MXFP4. ``sub_scale``, ``sub_min``: lowest and highest integer
    stored for a group, None if groups have none of their own. ``offset``: "" none, "added" (dmin is added: Q4_1, Q5_1),
    "subtracted" (dmin * sub_min is subtracted: Q2_K, Q4_K, Q5_K). A type without ``levels`` has a codebook of vectors
    (`codebook_types`).
    """

    name: str
    id: int
    block: int
    nbytes: int
    group: int
    levels: tuple[int, ...]
    sub_scale: tuple[int, int] | None = None
    sub_min: tuple[int, int] | None = None
    offset: str = ""

    @property
    def groups(self) -> int:
        """Groups in a block."""
        return self.block // self.group

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.block

    @property
    def uniform(self) -> bool:
        """Whether levels are integers in a row: then the nearest one is found by rounding."""
        return bool(self.levels) and self.levels == tuple(range(self.levels[0], self.levels[0] + len(self.levels)))

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one row of ``in_features`` weights, a multiple of ``block``."""
        assert in_features % self.block == 0, f"{in_features} is no multiple of {self.block}"
        return in_features // self.block * self.nbytes


def _integers(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


BLOCK_TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 2, 32, 18, 32, _integers(-8, 7)),
        BlockType("Q4_1", 3, 32, 20, 32, _integers(0, 15), offset="added"),
        BlockType("Q5_0", 6, 32, 22, 32, _integers(-16, 15)),
        BlockType("Q5_1", 7, 32, 24, 32, _integers(0, 31), offset="added"),
        BlockType("Q8_0", 8, 32, 34, 32, _integers(-128, 127)),
        BlockType("Q2_K", 10, 256, 84, 16, _integers(0, 3), (0, 15), (0, 15), "subtracted"),
        BlockType("Q3_K", 11, 256, 110, 16, _integers(-4, 3), (-32, 31)),
        BlockType("Q4_K", 12, 256, 144, 32, _integers(0, 15), (0, 63), (0, 63), "subtracted"),
        BlockType("Q5_K", 13, 256, 176, 32, _integers(0, 31), (0, 63), (0, 63), "subtracted"),
        BlockType("Q6_K", 14, 256, 210, 16, _integers(-32, 31), (-128, 127)),
        BlockType("IQ2_XXS", 16, 256, 66, 32, ()),
        BlockType("IQ2_XS", 17, 256, 74, 16, ()),
        BlockType("IQ3_XXS", 18, 256, 98, 32, ()),
        BlockType("IQ1_S", 19, 256, 50, 32, ()),
        BlockType("IQ4_NL", 20, 32, 18, 32, IQ4_LEVELS),
        BlockType("IQ3_S", 21, 256, 110, 32, ()),
        BlockType("IQ2_S", 22, 256, 82, 16, ()),
        BlockType("IQ4_XS", 23, 256, 136, 32, IQ4_LEVELS, (-32, 31)),
        BlockType("IQ1_M", 29, 256, 56, 16, ()),
        BlockType("MXFP4", 39, 32, 17, 32, E2M1_LEVELS),
        BlockType("Q2_0", 42, 64, 18, 64, _integers(-1, 2)),
    )
}
"""By ggml's name."""


@dataclass(frozen=True, slots=True)
class BlockParams:
    """The scales of blocks, exactly as they will be stored. Leading dimensions ``...`` are free (matrices of a batch).

    d (..., out, blocks) float32, a value that float16 represents (MXFP4: a power of two); dmin the same or None;
    sub_scale, sub_min (..., out, groups) int16 or None.
    """

    d: Tensor
    dmin: Tensor | None = None
    sub_scale: Tensor | None = None
    sub_min: Tensor | None = None

    def scale(self) -> Tensor:
        """Effective scale of each group, (..., out, groups) float32, multiplied in the order of the C code."""
        if self.sub_scale is None:
            return self.d
        return self._per_group(self.d, self.sub_scale) * self.sub_scale.float()

    def offset(self) -> Tensor | None:
        """What is added to scale * level in each group, (..., out, groups) float32, or None."""
        if self.dmin is None:
            return None
        if self.sub_min is None:
            return self.dmin
        return -(self._per_group(self.dmin, self.sub_min) * self.sub_min.float())

    @staticmethod
    def _per_group(values: Tensor, groups: Tensor) -> Tensor:
        return values.repeat_interleave(groups.shape[-1] // values.shape[-1], -1)
