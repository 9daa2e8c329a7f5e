"""The checkpoint as the rest of quantkit sees it: FP8-block weights appear as BF16, everything else passes through.

DeepSeek V3's release stores ``X.weight`` as FP8 e4m3 and beside it ``X.weight_scale_inv``, one scale for each
128 x 128 block (edge blocks are partial). Decoding follows the official cast (deepseek-ai/DeepSeek-V3,
inference/fp8_cast_bf16.py): code times scale in float32, then rounded to BF16, ties to even. Weight and scale are
paired by name; they may lie in different shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import SourceError
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource, require_finite, row_ranges
from quantkit.formats.stored_in_shards import StoredInShards
from quantkit.formats.zero_runs import ZeroRun, zero_runs
from quantkit.schemes import Float8Scheme
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantkit.schemes.grid import Stored

SCALE_SUFFIX = "_scale_inv"
ZEROS_HINT = (
    "Interrupted downloads look so: fetch the shards again. If the model is so, set allow_zeros: true in the recipe."
)
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
"""What a scale may be stored in: float32 in every official release; the other two convert to float32 exactly."""


class Fp8Source(StoredInShards):
    """A decoded `TensorSource` over stored tensors. Without FP8 tensors it shows exactly what it is given.

    ``block_size``: rows and columns that share one scale. ``config``: the raw config.json ({} if opened without one).
    """

    def __init__(
        self,
        raw: SafetensorsSource,
        block_size: tuple[int, int] = (128, 128),
        config: Mapping[str, object] | None = None,
    ) -> None:
        """Pair weights and scales by name, without reading weights.

        Raises `SourceError` for a pair that is incomplete or does not fit.
        """
        self.raw: SafetensorsSource = raw
        self.block_size = block_size
        self.config: Mapping[str, object] = config or {}
        self._least_zeros: Mapping[str, int] = {}
        stored = raw.infos()
        scales = {name for name in stored if name.endswith(SCALE_SUFFIX)}
        self._float8 = {name for name, info in stored.items() if info.dtype.startswith("F8_") and name not in scales}
        for name in stored:
            if name in self._float8:
                self._check_pair(name)
            elif name in scales:
                self._check_owner(name)
        self._infos = {name: self._decoded(info) for name, info in stored.items() if name not in scales}

    @property
    def directory(self) -> Path:
        """The checkpoint's folder."""
        return self.raw.directory

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, decoded (FP8 as BF16, no scales), in file order."""
        return self._infos

    def share(self, copies: Mapping[str, str]) -> None:
        """Show tensors that are not FP8 under further names: name -> a tensor of `infos`. Nothing is read."""
        assert not self._float8.intersection(copies.values())
        self.raw.share(copies)
        self._infos |= {name: self.raw.infos()[name] for name in copies}

    def refuse_zeros(self, least: Mapping[str, int]) -> None:
        """From now on reading a tensor, or rows of it, raises `SourceError` for ``least[name]`` zeros in a row or more.
        Other tensors may hold any."""
        self._least_zeros = least

    def stored_as(self, name: str) -> Float8Scheme | None:
        """FP8 blocks where a tensor of `infos` is stored so, else None."""
        return Float8Scheme(block_size=self.block_size) if name in self._float8 else None

    def read_on(self, name: str, device: torch.device) -> Tensor:
        """The tensor on a device, which decodes and checks it: the same values as `read` gives. For a GPU through
        page-locked memory and on the current stream, for which this waits. Thread-safe.

        Raises `SourceError` as `read` does.
        """
        stored = self.raw.read_unchecked(name, pinned=device.type == "cuda")
        weight = stored.to(device, non_blocking=True)
        if name in self._float8:
            scale = self.raw.read(name + SCALE_SUFFIX).float()
            self._check_scale(name, scale, stored)
            weight = decode_blocks(weight, scale.to(device), self.block_size)
            self._check_zeros(name, weight, scale)
        else:
            self._check_zeros(name, weight)
        require_finite(name, str(self.raw.path_of(name)), weight)
        return weight

    def read_stored(self, name: str) -> Stored:
        """The stored pair: ``codes`` (out, in) float8_e4m3fn, ``scale`` (out blocks, in blocks) in its stored dtype.

        Raises `SourceError` for a code that is NaN or a scale that is not a positive finite number, nor 0 for a block
        of zeros.
        """
        import torch

        codes, scale = self.raw.read(name), self.read_scale(name)
        self._check_scale(name, scale.float(), codes)
        self._check_zeros(name, codes.view(torch.uint8), scale.float())
        return {"codes": codes, "scale": scale}

    def read_scale(self, name: str) -> Tensor:
        """The scales alone, unchecked, in their stored dtype."""
        return self.raw.read(name + SCALE_SUFFIX)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or rows ``[start, stop)``, on the CPU; FP8 weights as BF16.

        Raises `SourceError` for NaN, infinity and bad scales.
        """
        if name not in self._float8:
            tensor = self.raw.read(name, rows)
            self._check_zeros(name, tensor, first_row=rows[0] if rows else 0)
            return tensor
        block_rows, _ = self.block_size
        start, stop = rows or (0, self._infos[name].shape[0])
        scale = self.raw.read(name + SCALE_SUFFIX, (start // block_rows, math.ceil(stop / block_rows))).float()
        codes, skipped = self.raw.read(name, (start, stop)), start % block_rows
        self._check_scale(name, scale, codes, skipped)
        weight = decode_blocks(codes, scale, self.block_size, skipped)
        require_finite(name, str(self.raw.path_of(name)), weight)
        self._check_zeros(name, weight, scale, start)
        return weight

    def read_rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Rows in the given order, repeats allowed, see `SafetensorsSource.read_rows`. FP8 tables go row by row."""
        if name not in self._float8:
            return self.raw.read_rows(name, indices)
        import torch

        rows = [self.read(name, (row, row + 1)) for row in indices]
        return torch.cat(rows) if rows else self.read(name, (0, 0))

    def chunks(self, name: str, max_bytes: int) -> Iterator[Tensor]:
        """The decoded tensor in consecutive pieces, see `SafetensorsSource.chunks`."""
        for rows in row_ranges(self._infos[name], max_bytes):
            yield self.read(name, rows)

    def prefetch(self, names: list[str]) -> None:
        """Ask the operating system to read these tensors (and their scales) ahead. Returns at once."""
        self.raw.prefetch(names + [name + SCALE_SUFFIX for name in names if name in self._float8])

    def close(self) -> None:
        """Give the file descriptors back."""
        self.raw.close()

    def __enter__(self) -> Fp8Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _decoded(self, info: TensorInfo) -> TensorInfo:
        return TensorInfo(info.name, info.shape, "BF16") if info.name in self._float8 else info

    def _check_zeros(self, name: str, tensor: Tensor, scale: Tensor | None = None, first_row: int = 0) -> None:
        """Raise for more zeros in a row than `refuse_zeros` allows. ``tensor``: rows from ``first_row`` on; ``scale``:
        of their blocks. Blocks with the scale 0 were zeros when they were stored: a hole leaves the scales."""
        least = self._least_zeros.get(name)
        if least is None:
            return
        columns = math.prod(tensor.shape[1:])
        for run in zero_runs(tensor, least):
            rows = first_row + run.start // columns, first_row + (run.stop - 1) // columns
            first_block = first_row // self.block_size[0]
            blocks = slice(rows[0] // self.block_size[0] - first_block, rows[1] // self.block_size[0] - first_block + 1)
            if scale is None or scale[blocks].any():
                raise self._hole(name, run, rows)

    def _hole(self, name: str, run: ZeroRun, rows: tuple[int, int]) -> SourceError:
        problem = f"{run.stop - run.start:,} weights in a row are zero, in rows {rows[0]:,} to {rows[1]:,}"
        return self._refusal(name, problem, ZEROS_HINT)

    def _check_pair(self, name: str) -> None:
        """Raise unless an FP8 tensor is an e4m3 matrix with a scale of the right shape and dtype."""
        stored, scale_name = self.raw.infos(), name + SCALE_SUFFIX
        weight, scale = stored[name], stored.get(scale_name)
        if weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
            found = f"{weight.dtype} {list(weight.shape)}"
            raise self._refusal(name, f"is {found}; FP8 is understood as matrices of F8_E4M3")
        if scale is None:
            raise self._refusal(name, f"is FP8 but {scale_name} is missing", self._missing_scale_hint(name))
        if scale.dtype not in SCALE_DTYPES:
            raise self._refusal(scale_name, f"has dtype {scale.dtype}, one of {', '.join(SCALE_DTYPES)} was needed")
        needed = Float8Scheme(block_size=self.block_size).scale_shape(weight.shape)
        if scale.shape != needed:
            asked = f"{list(needed)} was needed for {list(weight.shape)} in blocks of {list(self.block_size)}"
            hint = "Compare quantization_config.weight_block_size in config.json."
            raise self._refusal(scale_name, f"has shape {list(scale.shape)}, {asked}", hint)

    def _refusal(self, name: str, problem: str, hint: str = "") -> SourceError:
        return SourceError(f"{self.raw.path_of(name)}: {printable(name)}: {problem}.", hint=hint)

    def _missing_scale_hint(self, name: str) -> str:
        if name + SCALE_SUFFIX in self.unlisted:
            return "A shard holds it, but the index does not list it."
        if name.removesuffix(".weight") + ".scale" in self.raw.infos():
            return "Its scale is named as in DeepSeek V4, an architecture that quantkit does not know."
        return "Only FP8 with block scales named weight_scale_inv (as in DeepSeek V3) can be read."

    def _check_owner(self, scale_name: str) -> None:
        """Raise if a scale has no FP8 weight: the weight is lost, or it was decoded and the scale kept."""
        owner = scale_name.removesuffix(SCALE_SUFFIX)
        if owner in self._float8:
            return
        info = self.raw.infos().get(owner)
        found = "is missing" if info is None else f"is {info.dtype}, not FP8"
        raise self._refusal(scale_name, f"is the scale of {printable(owner)}, which {found}")

    def _check_scale(self, name: str, scale: Tensor, codes: Tensor, skipped_rows: int = 0) -> None:
        """Raise for scales that mean nothing. A block of zeros may have the scale 0, as some converters write it; a
        whole matrix of them is no model's, but what a hole in a file looks like."""
        import torch

        good = torch.isfinite(scale) & (scale >= 0)
        if not good.all():
            bad = scale[~good]
            problem = f"{bad.numel():,} scales are not positive finite numbers, such as {float(bad[0])}"
            raise self._refusal(name + SCALE_SUFFIX, problem, "Fetch the file again.")
        zeros = scale == 0
        if not zeros.any():
            return
        if scale.numel() > 1 and zeros.all() and len(codes) == self._infos[name].shape[0]:
            raise self._refusal(name + SCALE_SUFFIX, "holds only zeros", "Fetch the file again.")
        height, width = self.block_size
        for row, column in zeros.nonzero().tolist():
            first = row * height - skipped_rows
            block = codes[max(0, first) : first + height, column * width : (column + 1) * width]
            if block.view(torch.uint8).bitwise_and(0x7F).any():
                problem = f"the scale of block [{row}, {column}] is 0, its weights are not"
                raise self._refusal(name + SCALE_SUFFIX, problem, "Fetch the file again.")


def decode_blocks(
    codes: Tensor, scale: Tensor, block_size: tuple[int, int] = (128, 128), skipped_rows: int = 0
) -> Tensor:
    """FP8 blocks -> BF16: codes (rows, in) float8_e4m3fn, scale (row blocks, in blocks) float32 -> (rows, in) bfloat16.

    ``skipped_rows``: rows of the first row block that ``codes`` does not hold. The product is rounded to float32,
    then to BF16 (ties to even), as the official cast does. One row block at a time, so the float32 temporary stays in
    the cache.
    """
    import torch

    from quantkit.kernels.backend import Backend

    n_rows, in_features = codes.shape
    block_rows, block_columns = block_size
    if Backend.of(codes.device) is Backend.TRITON:
        from quantkit.kernels.triton import decode as decode_triton

        return decode_triton.decode_fp8_blocks(codes, scale, block_size, skipped_rows)
    if codes.is_cuda:
        rows = scale.repeat_interleave(block_rows, 0)[skipped_rows : skipped_rows + n_rows]
        return codes.float().mul_(rows.repeat_interleave(block_columns, 1)[:, :in_features]).bfloat16()
    # torch's own conversion takes 6.1 ns a value on a CPU (2.13), a table of the 256 values 1.4.
    table = torch.arange(256, dtype=torch.uint8, device=codes.device).view(torch.float8_e4m3fn).float()
    weight = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    bits = codes.view(torch.uint8)
    for block, scale_row in enumerate(scale):
        first = block * block_rows - skipped_rows
        rows = slice(max(0, first), min(n_rows, first + block_rows))
        part = torch.index_select(table, 0, bits[rows].reshape(-1).int()).view(-1, in_features)
        weight[rows] = part.mul_(scale_row.repeat_interleave(block_columns)[:in_features])
    return weight
