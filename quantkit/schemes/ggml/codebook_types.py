"""The types of ggml with a codebook as data: IQ3, IQ2 and IQ1, where some neighbouring weights share one code.

    weight = sign * scale * codeword                scale = unit * d * (2 m + 1), m for each group
    weight = scale * (codeword + shift or - shift)  (IQ1: codewords of -1, 0 and 1 have signs themselves)

Sources: block_iq* and dequantize_row_iq* of llama.cpp's ggml; the codebooks are gguf-py's. A type is one line here, one
in `types.BLOCK_TYPES`; which bits lie where is part of the line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bits:
    """Where the numbers of one kind lie in a block: ``count`` little-endian words of ``word`` bytes from byte
    ``start``, in each of them ``each`` neighbours of ``bits`` bits, the first at bit ``at``. They are the numbers' bits
    [shift, shift + bits); ``spread``: one of them belongs to so many numbers.

    ``of``: d, the float16; sub, the m of groups; codes; signs of 8 weights, bit i of weight i, of which IQ3_XXS and
    others store 7.
    """

    of: Literal["d", "sub", "codes", "signs"]
    start: int
    word: int
    count: int
    bits: int
    each: int = 1
    at: int = 0
    shift: int = 0
    spread: int = 1


@dataclass(frozen=True)
class Codebook:
    """``unit``: scale of a group with d = 1 and m = 0. ``first``: half of the positions in a vector, by which the
    search groups codewords: those that make the fewest groups of 4. ``signs``: of 8 weights "free" or "even" (an even
    number is negative); "none" where codewords have signs. ``shift``: what is added to a codeword, or subtracted: then
    a code has a bit more, at the top, which says so; ``shared``: weights that have one shift. ``lowest``, ``step``: see
    `quantkit.kernels.numba.ggml.vectors.Book`."""

    unit: float
    first: tuple[int, ...]
    signs: Literal["free", "even", "none"]
    layout: tuple[Bits, ...]
    shift: float = 0.0
    shared: int = 8
    lowest: float = 0.4
    step: float = 0.075

    @property
    def width(self) -> int:
        """Weights of a codeword."""
        return 2 * len(self.first)

    @cached_property
    def top(self) -> int:
        """The highest m."""
        return (1 << next(bits.bits for bits in self.layout if bits.of == "sub")) - 1


def _half(start: int) -> Bits:
    return Bits("d", start, 2, 1, 16)


CODEBOOKS: dict[str, Codebook] = {
    "IQ3_S": Codebook(
        1.0,
        (0, 2),
        "free",
        (
            _half(0),
            Bits("codes", 2, 1, 64, 8),
            Bits("codes", 66, 1, 8, 1, each=8, shift=8),
            Bits("signs", 74, 1, 32, 8),
            Bits("sub", 106, 1, 4, 4, each=2),
        ),
        lowest=0.6,
        step=0.065,
    ),
    "IQ3_XXS": Codebook(
        0.25,
        (0, 1),
        "even",
        (
            _half(0),
            Bits("codes", 2, 1, 64, 8),
            Bits("signs", 66, 4, 8, 7, each=4),
            Bits("sub", 66, 4, 8, 4, at=28),
        ),
        lowest=0.6,
        step=0.065,
    ),
    "IQ2_S": Codebook(
        0.125,
        (3, 4, 5, 7),
        "free",
        (
            _half(0),
            Bits("codes", 2, 1, 32, 8),
            Bits("codes", 66, 1, 8, 2, each=4, shift=8),
            Bits("signs", 34, 1, 32, 8),
            Bits("sub", 74, 1, 8, 4, each=2),
        ),
    ),
    "IQ2_XS": Codebook(
        0.125,
        (0, 2, 5, 7),
        "even",
        (
            _half(0),
            Bits("codes", 2, 2, 32, 9),
            Bits("signs", 2, 2, 32, 7, at=9),
            Bits("sub", 66, 1, 8, 4, each=2),
        ),
    ),
    "IQ2_XXS": Codebook(
        0.125,
        (0, 1, 2, 4),
        "even",
        (
            _half(0),
            Bits("codes", 2, 8, 8, 8, each=4),
            Bits("signs", 2, 8, 8, 7, each=4, at=32),
            Bits("sub", 2, 8, 8, 4, at=60),
        ),
    ),
    "IQ1_M": Codebook(
        1.0,
        (3, 4, 5, 6),
        "none",
        (
            *(Bits("d", 48 + 2 * i, 2, 1, 4, at=12, shift=4 * i) for i in range(4)),
            Bits("codes", 0, 1, 32, 8),
            Bits("codes", 32, 1, 16, 4, each=2, shift=8),
            Bits("sub", 48, 2, 4, 3, each=4),
        ),
        shift=0.125,
        lowest=0.3,
        step=0.08,
    ),
    "IQ1_S": Codebook(
        1.0,
        (3, 4, 5, 6),
        "none",
        (
            _half(0),
            Bits("codes", 2, 1, 32, 8),
            Bits("codes", 34, 2, 8, 3, each=4, shift=8),
            Bits("codes", 34, 2, 8, 1, at=15, shift=11, spread=4),
            Bits("sub", 34, 2, 8, 3, at=12),
        ),
        shift=0.125,
        lowest=0.3,
        step=0.08,
        shared=32,
    ),
}
"""By ggml's name."""


def plain_grid(name: str) -> NDArray[np.float32]:
    """The codebook of a type as gguf-py has it, (n, width)."""
    from gguf import quants

    tables = {
        "IQ3_S": quants.IQ3_S,
        "IQ3_XXS": quants.IQ3_XXS,
        "IQ2_S": quants.IQ2_S,
        "IQ2_XS": quants.IQ2_XS,
        "IQ2_XXS": quants.IQ2_XXS,
        "IQ1_M": quants.IQ1_M,
        "IQ1_S": quants.IQ1_S,
    }
    table = tables[name]
    table.init_grid()
    assert table.grid is not None
    return table.grid.reshape(table.grid_shape)


def codewords(name: str, device: torch.device | str = "cpu") -> Tensor:
    """All that a code may mean, (codes, width) float32: consecutive weights on scale 1, without their signs."""
    import torch

    grid, shift = torch.from_numpy(plain_grid(name)), CODEBOOKS[name].shift
    return (torch.cat([grid + shift, grid - shift]) if shift else grid).to(device)


def all_signs(device: torch.device) -> Tensor:
    """8 signs by the 7 that are stored, (128,) uint8."""
    import torch
    from gguf import quants

    return torch.tensor(list(quants.IQ2_XXS.ksigns), dtype=torch.uint8, device=device)
