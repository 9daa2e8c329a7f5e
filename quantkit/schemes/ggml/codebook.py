"""IQ3_XXS and IQ3_S of ggml: vectors of 4 weights from a codebook of magnitudes, signs beside it.

    weight = sign * scale * codeword          scale = unit * d * (2 m + 1), m in 0..15 for each group of 32

IQ3_XXS (unit 1/4, 256 codewords) stores 7 signs of each 8: an even number of them is negative. IQ3_S (unit 1, 512
codewords) stores all. Sources: block_iq3_xxs, block_iq3_s and dequantize_row_* of llama.cpp's ggml; the codebooks are
gguf-py's. Blocks (..., out, row bytes) uint8 enter or leave, weights are (..., out, in) float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.errors import SchemeError
from quantkit.schemes.ggml.types import BlockType

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from quantkit.kernels.numba.ggml.vectors import Book

UNITS = {"IQ3_XXS": 0.25, "IQ3_S": 1.0}
"""Scale of a group with d = 1 and m = 0."""
PAIRS = {"IQ3_XXS": (0, 1), "IQ3_S": (0, 2)}
"""The two positions that the search groups codewords by: those which make the fewest groups of 4."""
HALF_MAX = 65504.0
ROWS_OF_TASK = 32
SLICE_BYTES = 64 << 20
"""Temporaries of one slice of rows."""


@dataclass(frozen=True, slots=True)
class CodebookParts:
    """Blocks taken apart. d (..., out, blocks) float16; sub (..., out, groups) uint8: m; codes (..., out, in / 4)
    int16; signs (..., out, in / 8) uint8: bit i set where weight i of 8 is negative."""

    d: Tensor
    sub: Tensor
    codes: Tensor
    signs: Tensor

    def scale(self, kind: BlockType) -> Tensor:
        """Scale of each group, (..., out, groups) float32; exact."""
        step = self.d.float() * UNITS[kind.name]
        return step.repeat_interleave(kind.groups, -1) * (2 * self.sub.float() + 1)


def codewords(kind: BlockType, device: torch.device | str = "cpu") -> Tensor:
    """The codebook, (n, 4) float32: magnitudes of 4 consecutive weights on scale 1, by code."""
    import torch

    return torch.from_numpy(_grid(kind)).to(device)


def decode_codebook(kind: BlockType, blocks: Tensor) -> Tensor:
    """blocks (..., out, row bytes) uint8 -> weight (..., out, in) float32, bit for bit what llama.cpp decodes."""
    import torch

    rows = blocks.reshape(-1, blocks.shape[-1])
    in_features = blocks.shape[-1] // kind.nbytes * kind.block
    weight = torch.empty(len(rows), in_features, dtype=torch.float32, device=blocks.device)
    # int32 and float32 copies of codes and signs: some 16 bytes of temporaries for each weight.
    step = max(1, SLICE_BYTES // (16 * in_features))
    grid = codewords(kind, blocks.device)
    for start in range(0, len(rows), step):
        parts = unpack(kind, rows[start : start + step])
        weight[start : start + step] = decode_parts(kind, parts, grid)
    return weight.view(*blocks.shape[:-1], in_features)


def decode_parts(kind: BlockType, parts: CodebookParts, grid: Tensor | None = None) -> Tensor:
    """The weight (..., out, in) float32 of parts. ``grid``: the codewords, if they are at hand."""
    import torch

    grid = codewords(kind, parts.codes.device) if grid is None else grid
    bits = torch.arange(8, dtype=torch.uint8, device=parts.signs.device)
    negative = (parts.signs.unsqueeze(-1) >> bits & 1).bool()
    values = grid[parts.codes.int()].view(*parts.sub.shape, 4, 8)
    # d has 11 bits, 2 m + 1 five, a level six: all products are exact, in any order.
    values = values * parts.scale(kind)[..., None, None]
    values = torch.where(negative.view(values.shape), -values, values)
    return values.flatten(-3)


def unpack(kind: BlockType, blocks: Tensor) -> CodebookParts:
    """Take blocks (..., out, row bytes) uint8 apart."""
    import torch

    block = blocks.reshape(*blocks.shape[:-1], -1, kind.nbytes)
    d = block[..., :2].contiguous().view(torch.float16).squeeze(-1)
    codes = block[..., 2:66].short()
    if kind.name == "IQ3_XXS":
        words = block[..., 66:].contiguous().view(torch.int32)
        sub = (words >> 28 & 15).to(torch.uint8)
        shifts = torch.tensor([0, 7, 14, 21], dtype=torch.int32, device=blocks.device)
        seven = words.unsqueeze(-1) >> shifts & 127
        signs = _eight_signs(blocks.device)[seven].flatten(-2)
    else:
        bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        codes = codes | (block[..., 66:74].unsqueeze(-1) >> bits & 1).flatten(-2).short() << 8
        signs = block[..., 74:106]
        sub = torch.stack([block[..., 106:] & 15, block[..., 106:] >> 4], -1).flatten(-2)
    return CodebookParts(d, sub.flatten(-2), codes.flatten(-2), signs.flatten(-2))


def pack(kind: BlockType, parts: CodebookParts) -> Tensor:
    """Blocks (..., out, row bytes) uint8 of parts, the opposite of `unpack`. For IQ3_XXS the eighth sign of each 8 is
    not stored: it must make their number even."""
    import torch

    blocks = (*parts.d.shape, -1)
    d = parts.d.contiguous().unsqueeze(-1).view(torch.uint8)
    codes, signs, sub = parts.codes.reshape(blocks), parts.signs.reshape(blocks), parts.sub.reshape(blocks)
    low = (codes & 255).to(torch.uint8)
    if kind.name == "IQ3_XXS":
        shifts = torch.tensor([0, 7, 14, 21], dtype=torch.int32, device=codes.device)
        words = ((signs & 127).int().unflatten(-1, (-1, 4)) << shifts).sum(-1, dtype=torch.int32)
        columns = [d, low, (words | sub.int() << 28).contiguous().view(torch.uint8)]
    else:
        weights = 1 << torch.arange(8, dtype=torch.int32, device=codes.device)
        high = ((codes >> 8).int().unflatten(-1, (-1, 8)) * weights).sum(-1).to(torch.uint8)
        columns = [d, low, high, signs, sub[..., ::2] | sub[..., 1::2] << 4]
    return torch.cat(columns, -1).flatten(-2)


def quantize_codebook(kind: BlockType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """weight (..., out, in) float32 -> blocks (..., out, row bytes) uint8 of small sum importance * error^2.

    importance (..., in) float32 >= 0, or None for all ones. The search runs on the processor, on as many threads as
    torch uses: tensors of a GPU are moved there and back. Raises `SchemeError` for values that no block holds.
    """
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from quantkit.kernels.numba.ggml.codebook import Found, search_rows

    out_features, in_features = weight.shape[-2:]
    matrices = weight.detach().reshape(-1, out_features, in_features).float().cpu().contiguous()
    if importance is None:
        importance = torch.ones(in_features)
    importance = importance.expand(*weight.shape[:-2], in_features).reshape(-1, in_features).float().cpu()
    _check(kind, matrices.view(weight.shape), importance)
    shape, book = (*matrices.shape[:-1], in_features // kind.block), _book(kind)
    d = torch.zeros(shape)
    sub = torch.zeros(*shape, kind.groups, dtype=torch.uint8)
    codes = torch.zeros(*shape, kind.block // 4, dtype=torch.int16)
    signs = torch.zeros(*shape, kind.block // 8, dtype=torch.uint8)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        tasks = [
            threads.submit(
                search_rows,
                book,
                matrices[i].numpy(),
                importance[i].numpy(),
                (start, min(start + ROWS_OF_TASK, out_features)),
                Found(d[i].numpy(), sub[i].numpy(), codes[i].numpy(), signs[i].numpy()),
            )
            for i in range(len(matrices))
            for start in range(0, out_features, ROWS_OF_TASK)
        ]
        for task in tasks:
            task.result()
    parts = CodebookParts(d.half(), sub.flatten(-2), codes.flatten(-2), signs.flatten(-2))
    return pack(kind, parts).view(*weight.shape[:-1], -1).to(weight.device)


def encode_fixed(
    kind: BlockType, weight: Tensor, scale: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Best codes and signs of weight (..., 8 n) float32 on scales (..., n) float32 that stay, one for each 8 weights.

    What is least is sum importance * error^2 over each 8; importance (..., 8 n), or None for all ones. Returns codes
    (..., 2 n) int16 and signs (..., n) uint8. Exact, in plain torch: the compiled search gives the same on its scales.
    """
    import torch

    grid = codewords(kind, weight.device)
    codes = torch.empty(*scale.shape, 2, dtype=torch.int16, device=weight.device).view(-1, 2)
    signs = torch.empty(codes.shape[0], dtype=torch.uint8, device=weight.device)
    eights = weight.reshape(-1, 8)
    share = torch.ones_like(eights) if importance is None else importance.expand_as(weight).reshape(-1, 8)
    # Two float32 errors for each codeword of both vectors, and as many of one candidate sign.
    step = max(1, SLICE_BYTES // (24 * len(grid)))
    for start in range(0, len(eights), step):
        part = slice(start, start + step)
        codes[part], signs[part] = _encode_eights(kind, eights[part], scale.reshape(-1)[part], share[part], grid)
    return codes.view(*scale.shape[:-1], -1), signs.view(scale.shape)


def _encode_eights(
    kind: BlockType, weight: Tensor, scale: Tensor, importance: Tensor, grid: Tensor
) -> tuple[Tensor, Tensor]:
    """weight, importance (n, 8), scale (n,) -> codes (n, 2) int16, signs (n,) uint8."""
    import torch

    negative = weight < 0
    magnitude, share = weight.abs().view(-1, 2, 4), importance.reshape(-1, 2, 4)
    scale = scale.view(-1, 1, 1)
    # Less sum importance * magnitude^2, which all codewords have.
    right = scale * scale * (share @ grid.square().T) - 2 * scale * ((share * magnitude) @ grid.T)
    error, codes = right.min(-1)
    if kind.name == "IQ3_XXS":
        odd = negative.sum(-1) % 2 == 1
        least = torch.full_like(error[:, 0], torch.inf)
        chosen, flip = codes.clone(), torch.zeros_like(codes[:, 0])
        for i in range(8):
            vector, position = divmod(i, 4)
            cost = 4 * scale[:, 0] * (share * magnitude)[:, vector, position, None] * grid[:, position]
            wrong, code = (right[:, vector] + cost).min(-1)
            better = wrong + error[:, 1 - vector] < least
            least = torch.where(better, wrong + error[:, 1 - vector], least)
            flip = torch.where(better, i, flip)
            other = codes[:, 1 - vector]
            pair = torch.stack([code, other] if vector == 0 else [other, code], -1)
            chosen = torch.where(better[:, None], pair, chosen)
        codes = torch.where(odd[:, None], chosen, codes)
        negative ^= odd[:, None] & (torch.arange(8, device=flip.device) == flip[:, None])
    weights = 1 << torch.arange(8, dtype=torch.int32, device=weight.device)
    return codes.short(), (negative * weights).sum(-1).to(torch.uint8)


def _check(kind: BlockType, weight: Tensor, importance: Tensor) -> None:
    """Raise `SchemeError` unless blocks can hold the weight (..., in) and the importance (matrices, in) is one."""
    import torch

    if weight.shape[-1] % kind.block:
        raise SchemeError(
            f"{kind.name}: in_features {weight.shape[-1]} is not a multiple of {kind.block}.",
            hint="Use a type with blocks of 32 (Q5_0, IQ4_NL...).",
        )
    limit = HALF_MAX * UNITS[kind.name] * 31 * float(_grid(kind).max())
    lowest, highest = weight.aminmax(dim=-1)
    largest = torch.maximum(-lowest, highest)
    wrong = (~(largest <= limit)).nonzero()  # NaN is wrong, too
    if len(wrong):
        row = tuple(wrong[0].tolist())
        raise SchemeError(
            f"row {row[-1]}: no scale of {kind.name} fits the value {float(largest[row]):g} "
            f"(needed: at most {limit:g}).",
            hint="Repair the checkpoint, or keep this tensor in F32.",
        )
    if not bool(((importance >= 0) & importance.isfinite()).all()):
        raise SchemeError(
            "importance: negative or non-finite values.", hint="Calibrate again, or take another imatrix."
        )


def _grid(kind: BlockType) -> NDArray[np.float32]:
    """The codebook, (n, 4)."""
    from gguf import quants

    table = {"IQ3_XXS": quants.IQ3_XXS, "IQ3_S": quants.IQ3_S}[kind.name]
    table.init_grid()
    assert table.grid is not None
    return table.grid.reshape(table.grid_shape)


def _eight_signs(device: torch.device) -> Tensor:
    """All 8 signs by the 7 that are stored, (128,) uint8."""
    import torch
    from gguf import quants

    return torch.tensor(list(quants.IQ2_XXS.ksigns), dtype=torch.uint8, device=device)


def _book(kind: BlockType) -> Book:
    """The codebook in the order of the search."""
    import numpy as np

    from quantkit.kernels.numba.ggml.vectors import Book
    from quantkit.kernels.numba.lanes import ROWS

    pair = PAIRS[kind.name]
    order = np.array([*pair, *(i for i in range(4) if i not in pair)])
    grid = np.ascontiguousarray(_grid(kind)[:, order])
    levels = np.unique(grid)
    places = np.searchsorted(levels, grid)
    first, second = places[:, 0] * 8 + places[:, 1], places[:, 2] * 8 + places[:, 3]
    chunks: list[list[int]] = []
    for row in range(64):
        same = np.flatnonzero(first == row).tolist()
        for start in range(0, len(same), 4):
            four = same[start : start + 4]
            chunks.append(four + four[-1:] * (4 - len(four)))
    code = np.array(chunks)
    unit, even = np.float32(UNITS[kind.name]), kind.name == "IQ3_XXS"
    chunk_places = np.concatenate([first[code[:, :1]], second[code]], 1) * ROWS
    return Book(levels, grid, chunk_places, code, order, unit, even)
