"""Types of ggml with a codebook (`codebook_types`): decoding, the search for scales and codes, codes on fixed scales.

Blocks (..., out, row bytes) uint8 enter or leave, weights are (..., out, in) float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import SchemeError
from quantkit.schemes.ggml.codebook_types import CODEBOOKS, Codebook, codewords, plain_grid
from quantkit.schemes.ggml.types import BlockType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from quantkit.kernels.numba.ggml.vectors import Book
    from quantkit.schemes.ggml.codebook_layout import CodebookParts

HALF_MAX = 65504.0
ROWS_OF_TASK = 32
SLICE_BYTES = 64 << 20
"""Temporaries of one slice of rows."""


def decode_codebook(kind: BlockType, blocks: Tensor) -> Tensor:
    """blocks (..., out, row bytes) uint8 -> weight (..., out, in) float32, bit for bit what llama.cpp decodes."""
    import torch

    from quantkit.schemes.ggml.codebook_layout import unpack

    rows = blocks.reshape(-1, blocks.shape[-1])
    in_features = blocks.shape[-1] // kind.nbytes * kind.block
    weight = torch.empty(len(rows), in_features, dtype=torch.float32, device=blocks.device)
    # int32 and float32 copies of codes and signs: some 16 bytes of temporaries for each weight.
    step = max(1, SLICE_BYTES // (16 * in_features))
    grid = codewords(kind.name, blocks.device)
    for start in range(0, len(rows), step):
        parts = unpack(kind, rows[start : start + step])
        weight[start : start + step] = decode_parts(kind, parts, grid)
    return weight.view(*blocks.shape[:-1], in_features)


def decode_parts(kind: BlockType, parts: CodebookParts, grid: Tensor | None = None) -> Tensor:
    """The weight (..., out, in) float32 of parts. ``grid``: the codewords, if they are at hand."""
    import torch

    grid = codewords(kind.name, parts.codes.device) if grid is None else grid
    values = grid[parts.codes.int()].view(*parts.sub.shape, kind.group)
    # d has 11 bits, 2 m + 1 five, a level six: all products are exact, in any order.
    values = values * parts.scale(kind).unsqueeze(-1)
    if CODEBOOKS[kind.name].signs != "none":
        bits = torch.arange(8, dtype=torch.uint8, device=parts.signs.device)
        negative = (parts.signs.unsqueeze(-1) >> bits & 1).bool()
        values = torch.where(negative.view(values.shape), -values, values)
    return values.flatten(-2)


def quantize_codebook(kind: BlockType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """weight (..., out, in) float32 -> blocks (..., out, row bytes) uint8 of small sum importance * error^2.

    importance (..., in) float32 >= 0, or None for all ones. The search runs on the processor, on as many threads as
    torch uses: tensors of a GPU are moved there and back. Raises `SchemeError` for values that no block holds.
    """
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from quantkit.kernels.numba.ggml.codebook import search_rows
    from quantkit.kernels.numba.ggml.codebook_tile import Found
    from quantkit.schemes.ggml.codebook_layout import CodebookParts, pack

    out_features, in_features = weight.shape[-2:]
    matrices = weight.detach().reshape(-1, out_features, in_features).float().cpu().contiguous()
    if importance is None:
        importance = torch.ones(in_features)
    importance = importance.expand(*weight.shape[:-2], in_features).reshape(-1, in_features).float().cpu()
    _check(kind, matrices.view(weight.shape), importance)
    own, book = CODEBOOKS[kind.name], _book(kind)
    shape = (*matrices.shape[:-1], in_features // kind.block)
    d = torch.zeros(shape)
    sub = torch.zeros(*shape, kind.groups, dtype=torch.uint8)
    codes = torch.zeros(*shape, kind.block // own.width, dtype=torch.int16)
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
    kind: BlockType, weight: Tensor, scale: Tensor, importance: Tensor | None = None, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Best codes and signs of weight (..., 8 n) float32 on scales (..., n) float32 that stay, one for each 8 weights.

    What is least is sum importance * error^2 over each 8; importance (..., 8 n), or None for all ones. ``before``
    (..., codes) int16, needed for IQ1_S: codes whose shifts stay, which belong to more than 8 weights. Returns codes
    (..., 8 n / width) int16 and signs (..., n) uint8. Exact, in plain torch: the compiled search gives the same on its
    scales.
    """
    import torch

    book, grid = CODEBOOKS[kind.name], codewords(kind.name, weight.device)
    codes = torch.empty(scale.numel(), 8 // book.width, dtype=torch.int16, device=weight.device)
    signs = torch.zeros(codes.shape[0], dtype=torch.uint8, device=weight.device)
    eights, scale_of = weight.reshape(-1, 8), scale.reshape(-1)
    share = torch.ones_like(eights) if importance is None else importance.expand_as(weight).reshape(-1, 8)
    # Two float32 errors for each codeword of the vectors, and as many of one candidate sign.
    step = max(1, SLICE_BYTES // (24 * len(grid)))
    for start in range(0, len(eights), step):
        part = slice(start, start + step)
        if book.signs != "none":
            codes[part], signs[part] = _signed_eights(book, eights[part], scale_of[part], share[part], grid)
        elif book.shared == 8:
            codes[part] = _costs(eights[part], scale_of[part], share[part], grid).argmin(-1).short()
        else:
            assert before is not None, f"{kind.name}: shifts belong to {book.shared} weights"
            half = len(grid) // 2
            down = before.reshape(-1, 1)[part] >= half
            shifted = eights[part] + torch.where(down, book.shift, -book.shift) * scale_of[part, None]
            found = _costs(shifted, scale_of[part], share[part], grid[:half] - book.shift).argmin(-1)
            codes[part] = (found + half * down).short()
    return codes.view(*scale.shape[:-1], -1), signs.view(scale.shape)


def _costs(values: Tensor, scale: Tensor, importance: Tensor, grid: Tensor) -> Tensor:
    """values, importance (n, 8), scale (n,) -> (n, vectors, codewords): errors, less sum importance * value^2, which
    all codewords have."""
    shape = len(values), 8 // grid.shape[-1], grid.shape[-1]
    values, share, scale = values.view(shape), importance.view(shape), scale.view(-1, 1, 1)
    return scale * scale * (share @ grid.square().T) - 2 * scale * ((share * values) @ grid.T)


def _signed_eights(
    book: Codebook, weight: Tensor, scale: Tensor, importance: Tensor, grid: Tensor
) -> tuple[Tensor, Tensor]:
    """weight, importance (n, 8), scale (n,) -> codes (n, vectors) int16, signs (n,) uint8."""
    import torch

    negative = weight < 0
    magnitude = weight.abs()
    costs = _costs(magnitude, scale, importance, grid)
    error, codes = costs.min(-1)
    if book.signs == "even":
        odd = negative.sum(-1) % 2 == 1
        least = torch.full_like(error[:, 0], torch.inf)
        chosen, flip = codes.clone(), torch.zeros_like(codes[:, 0])
        for i in range(8):
            vector, position = divmod(i, book.width)
            wrong = 4 * scale[:, None] * (importance * magnitude)[:, i, None] * grid[:, position]
            wrong, code = (costs[:, vector] + wrong).min(-1)
            wrong = wrong + error.sum(-1) - error[:, vector]
            better = wrong < least
            least, flip = torch.where(better, wrong, least), torch.where(better, i, flip)
            changed = codes.clone()
            changed[:, vector] = code
            chosen = torch.where(better[:, None], changed, chosen)
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
    book = CODEBOOKS[kind.name]
    limit = HALF_MAX * book.unit * (2 * book.top + 1) * float(codewords(kind.name).max())
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


def _book(kind: BlockType) -> Book:
    """The codebook in the order of the search."""
    import numpy as np

    from quantkit.kernels.numba.ggml import vectors
    from quantkit.kernels.numba.lanes import ROWS

    own = CODEBOOKS[kind.name]
    order = np.array([*own.first, *(i for i in range(own.width) if i not in own.first)])
    grid = np.ascontiguousarray(plain_grid(kind.name)[:, order])
    levels = np.unique(grid)
    powers = len(levels) ** np.arange(own.width // 2)[::-1]
    first, second = (np.searchsorted(levels, half) @ powers for half in np.split(grid, 2, 1))
    code = np.array(_chunks(first))
    if own.signs == "none":
        signs = vectors.SHIFTED if own.shared == 8 else vectors.SHIFTED_TOGETHER
    else:
        signs = vectors.EVEN if own.signs == "even" else vectors.FREE
    return vectors.Book(
        levels,
        grid,
        np.concatenate([first[code[:, :1]], second[code]], 1) * ROWS,
        code,
        order,
        unit=np.float32(own.unit),
        signs=signs,
        shift=np.float32(own.shift),
        group=kind.group,
        top=own.top,
        lowest=np.float32(own.lowest),
        step=np.float32(own.step),
    )


def _chunks(first: NDArray[np.int64]) -> list[list[int]]:
    """Codewords in fours that share their first half; where there are fewer, the last is repeated. An even number."""
    import numpy as np

    chunks: list[list[int]] = []
    for place in np.unique(first):
        same = np.flatnonzero(first == place).tolist()
        for start in range(0, len(same), 4):
            four = same[start : start + 4]
            chunks.append(four + four[-1:] * (4 - len(four)))
    return chunks + chunks[-1:] * (len(chunks) % 2)
