"""Block types of ggml as a scheme: Q8_0, Q4_0, Q4_K, IQ4_XS... what llama.cpp computes with.

This file joins the parts: the table of types (`types`), the search for scales (`fit`), the bits
(`layout`) and the types with a codebook (`codebook`). A quantised matrix is its blocks, (out, row bytes)
uint8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from quantkit.errors import SchemeError
from quantkit.schemes.ggml.types import BLOCK_TYPES, BlockParams, BlockType

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.ggml.codebook_layout import CodebookParts
    from quantkit.schemes.grid import Stored
    from quantkit.schemes.tunable import Tunable

BlockTypeName = Literal[
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4", "Q3_K", "IQ3_S",
    "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "Q2_0", "IQ2_XXS", "IQ1_M", "IQ1_S",
]  # fmt: skip


class GgmlScheme(BaseModel, frozen=True, extra="forbid"):
    """A block type of ggml. Rows never share blocks."""

    kind: Literal["ggml"] = "ggml"
    type: BlockTypeName = Field(description="ggml's name of the type.")

    @property
    def block(self) -> BlockType:
        """Sizes and levels of the type."""
        return BLOCK_TYPES[self.type]

    @property
    def has_grid(self) -> bool:
        """Whether single weights have levels of their own, so that a method can choose them one by one."""
        return bool(self.block.levels)

    @property
    def fits_tables(self) -> bool:
        """Blocks also store matrices that no calibration input reaches (vocabulary, MTP), as llama.cpp's files do."""
        return True

    @property
    def shares_scale(self) -> bool:
        """Whether one number belongs to whole matrices, and to those that runtimes join with them."""
        return False

    @property
    def label(self) -> str:
        """ggml's name of the type."""
        return self.type

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `SchemeError` unless rows of a tensor of this shape (..., in_features) are whole blocks."""
        if len(shape) < 2:
            raise SchemeError(
                f"{name}: shape {list(shape)} is not a matrix.", hint="Add a rule that keeps this tensor."
            )
        if shape[-1] % self.block.block:
            raise SchemeError(
                f"{name}: in_features {shape[-1]} is not a multiple of {self.block.block}, the block of {self.type}.",
                hint="Use a type with blocks of 32 (Q8_0, Q5_0, IQ4_NL...), or a rule that keeps this tensor.",
            )

    def bpw(self, shape: tuple[int, ...]) -> float:
        """Stored bits per weight."""
        return self.block.bpw

    def grid(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> BlockGrid:
        """Fitted scales of weight (B, out, in) float32 under importance (B, in). ggml's types have a search of their
        own: ``points`` and ``signed`` are for other schemes. Raises `SchemeError` for values that no block holds."""
        from quantkit.schemes.ggml.fit import fit

        return BlockGrid(self.block, fit(self.block, weight, importance))

    def vector_grid(self, weight: Tensor, importance: Tensor | None) -> CodebookGrid:
        """Fitted scales of weight (B, out, in) for the types with a codebook. Raises `SchemeError` as `grid`."""
        from quantkit.schemes.ggml.codebook import quantize_codebook
        from quantkit.schemes.ggml.codebook_layout import unpack

        return CodebookGrid(self.block, unpack(self.block, quantize_codebook(self.block, weight, importance)))

    def rounded(
        self, weight: Tensor, importance: Tensor | None, *, points: int, signed: bool, reach: Tensor | None = None
    ) -> Stored:
        """Fitted scales and nearest codes of weight (..., out, in), as `decode` takes them."""
        from quantkit.schemes.ggml.codebook import quantize_codebook
        from quantkit.schemes.ggml.fit import encode, fit
        from quantkit.schemes.ggml.layout import pack

        if not self.has_grid:
            return {"blocks": quantize_codebook(self.block, weight, importance)}
        params = fit(self.block, weight, importance)
        return {"blocks": pack(self.block, encode(self.block, weight, params), params)}

    def tunable(self, stored: Stored) -> Tunable | None:
        """What gradients may change of stored matrices (B, out, in); None for types with a codebook."""
        from quantkit.schemes.ggml.layout import unpack
        from quantkit.schemes.tunable import TunableBlocks

        return TunableBlocks(self.block, *unpack(self.block, stored["blocks"])) if self.has_grid else None

    def decode(self, blocks: Tensor) -> Tensor:
        """blocks (..., out, row bytes) uint8 -> weight (..., out, in) float32, bit for bit what llama.cpp decodes."""
        from quantkit.schemes.ggml.codebook import decode_codebook
        from quantkit.schemes.ggml.layout import decode

        return decode(self.block, blocks) if self.has_grid else decode_codebook(self.block, blocks)

    @property
    def takes_row_gains(self) -> bool:
        """See `quantkit.quantizers.row_gains`: a block's d is a float16, but of MXFP4 a power of two."""
        return self.type != "MXFP4"

    def with_row_gains(self, stored: Stored, gains: Tensor) -> Stored:
        """Blocks with d and dmin times gains (..., out) float32, rounded to float16; integers stay."""
        from quantkit.schemes.ggml import codebook_layout, layout

        blocks, gain = stored["blocks"], gains.unsqueeze(-1)
        if not self.has_grid:
            parts = codebook_layout.unpack(self.block, blocks)
            d = (parts.d.float() * gain).half()
            return {"blocks": codebook_layout.pack(self.block, replace(parts, d=d))}
        codes, params = layout.unpack(self.block, blocks)
        d, dmin = (None if one is None else (one * gain).half().float() for one in (params.d, params.dmin))
        assert d is not None
        return {"blocks": layout.pack(self.block, codes, replace(params, d=d, dmin=dmin))}


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """A `Grid` over the groups of blocks. The scale of a group moves in steps of its block's d, which stays."""

    kind: BlockType
    params: BlockParams

    @property
    def scale(self) -> Tensor:
        """(B, out, groups) float32."""
        return self.params.scale()

    @property
    def scale_dtype(self) -> None:
        """None: scales move in steps of their block's d."""
        return None

    @property
    def offset(self) -> Tensor | None:
        """(B, out, groups) float32, or None."""
        return self.params.offset()

    @property
    def zero(self) -> float:
        """Code of level 0."""
        return -float(self.kind.levels[0])

    @property
    def top(self) -> int:
        """The highest code."""
        return len(set(self.kind.levels)) - 1

    @property
    def table(self) -> Tensor | None:
        """Levels that are no integers in a row."""
        import torch

        from quantkit.kernels.backend import constants

        if self.kind.uniform:
            return None
        return constants(tuple(sorted(set(self.kind.levels))), torch.float32, self.params.d.device)

    def nearest_scale(self, group: int, wanted: Tensor) -> Tensor:
        """A multiple of the block's d, or any float16 where a group is a block (MXFP4: it stays)."""
        if self.kind.name == "MXFP4":
            return self.params.d[..., group]
        if self.kind.sub_scale is None:
            return _half(wanted)
        return _multiple(wanted, self.params.d[..., group // self.kind.groups], self.kind.sub_scale)

    def nearest_offset(self, group: int, wanted: Tensor) -> Tensor:
        """A multiple of the block's dmin, or any float16 where a group is a block."""
        assert self.params.dmin is not None, f"{self.kind.name} has no offsets"
        if self.kind.sub_min is None:
            return _half(wanted)
        return -_multiple(-wanted, self.params.dmin[..., group // self.kind.groups], self.kind.sub_min)

    def stored(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Stored:
        """The blocks of codes (B, out, in) uint8."""
        import torch

        from quantkit.schemes.ggml.layout import pack

        if not self.kind.uniform:  # the grid counts levels from the lowest, the file as ggml's table has them
            own = [self.kind.levels.index(level) for level in sorted(set(self.kind.levels))]
            codes = torch.tensor(own, dtype=torch.uint8, device=codes.device)[codes.int()]
        d, dmin, sub_scale, sub_min = self.params.d, self.params.dmin, None, None
        if self.kind.sub_scale is None:
            d = scale
        else:
            sub_scale = _multiples(scale, d)
        if offset is not None and dmin is not None:
            if self.kind.sub_min is None:
                dmin = offset
            else:
                sub_min = _multiples(-offset, dmin)
        return {"blocks": pack(self.kind, codes, BlockParams(d, dmin, sub_scale, sub_min))}


@dataclass(frozen=True, slots=True)
class CodebookGrid:
    """A `VectorGrid`: the scales of ``parts`` stay, its codes and signs are filled anew."""

    kind: BlockType
    parts: CodebookParts
    width: int = 8

    def encode(self, values: Tensor, start: int, importance: Tensor) -> Tensor:
        """See `VectorGrid.encode`. Signs and codewords of each row's eight weights."""
        import torch

        from quantkit.schemes.ggml.codebook import encode_fixed
        from quantkit.schemes.ggml.codebook_types import CODEBOOKS, codewords

        width = CODEBOOKS[self.kind.name].width
        stored = self.parts.codes[..., start // width : (start + 8) // width]
        scale = self.parts.scale(self.kind)[..., start // self.kind.group, None]
        codes, signs = encode_fixed(self.kind, values, scale, importance.unsqueeze(-2), stored)
        stored.copy_(codes)
        self.parts.signs[..., start // 8 : start // 8 + 1] = signs
        negative = signs >> torch.arange(8, dtype=torch.uint8, device=signs.device) & 1
        levels = codewords(self.kind.name, codes.device)[codes.int()].flatten(-2)
        return levels * scale * (1 - 2 * negative.float())

    def stored(self) -> Stored:
        """The blocks."""
        from quantkit.schemes.ggml.codebook_layout import pack

        return {"blocks": pack(self.kind, self.parts)}


def _half(wanted: Tensor) -> Tensor:
    return wanted.clamp(-65504, 65504).half().float()


def _multiple(wanted: Tensor, unit: Tensor, limits: tuple[int, int]) -> Tensor:
    """The integer multiple of ``unit`` within limits that is nearest to ``wanted``; 0 where the unit is 0."""
    return _ratio(wanted, unit).round_().clamp_(*limits) * unit


def _multiples(values: Tensor, units: Tensor) -> Tensor:
    """values (..., groups) that are exact multiples of units (..., blocks) -> the integers, int16."""
    import torch

    return _ratio(values, units.repeat_interleave(values.shape[-1] // units.shape[-1], -1)).round_().to(torch.int16)


def _ratio(values: Tensor, units: Tensor) -> Tensor:
    return values / units.masked_fill(units == 0, float("inf"))
