"""Turn a DeepSeek-V3-style checkpoint from BF16 into the official FP8-block form, or back.

    python tools/fp8_cast.py to-fp8  SRC OUT [--shard-bytes N]
    python tools/fp8_cast.py to-bf16 SRC OUT

FP8-block: `X.weight` float8_e4m3fn with `X.weight_scale_inv` float32 of shape (ceil(out/128), ceil(in/128)); value =
code * scale. scale = amax/448 of its 128x128 tile (edge tiles are smaller; a tile of zeros has scale 1), computed in
float32 like the release's.

Round trips. BF16 -> FP8 -> BF16 -> FP8 gives the same bytes for codes and scales: amax is a BF16 number, its code is
448, and 448 * float32(amax/448) rounds back to amax in BF16; any other value moves by at most 2^-8 of itself, less
than the half step of 2^-5 to the next code. FP8 -> BF16 rounds each value to BF16, so the first step back from a
foreign FP8 checkpoint, whose scales were taken from a master of higher precision, may change scales by up to 2^-9 of
themselves; codes still stay where every tile reaches 448.

One shard is in memory at a time. OUT must not exist.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

BLOCK = 128
FP8_MAX = 448.0
SCALE_SUFFIX = "_scale_inv"
INDEX = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 4_300_000_000
# The projections of attention, dense MLP, routed and shared experts; eh_proj, router, embeddings and head stay BF16.
FP8_NAMES = re.compile(
    r"\.(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)|mlp\..*(gate|up|down)_proj)\.weight$"
)
QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}


def expand_scale(scale: Tensor, rows: int, columns: int) -> Tensor:
    """(ceil(rows/128), ceil(columns/128)) -> (rows, columns), each entry repeated over its tile."""
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def quantize_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> (codes float8_e4m3fn (out, in), scale float32 (ceil(out/128), ceil(in/128)))."""
    rows, columns = weight.shape
    grid = math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)
    padded = weight.new_zeros((grid[0] * BLOCK, grid[1] * BLOCK), dtype=torch.float32)
    padded[:rows, :columns] = weight
    amax = padded.view(grid[0], BLOCK, grid[1], BLOCK).abs().amax((1, 3))
    scale = torch.where(amax > 0, amax / FP8_MAX, 1.0)
    codes = (weight.float() / expand_scale(scale, rows, columns)).clamp(-FP8_MAX, FP8_MAX)
    return codes.to(torch.float8_e4m3fn), scale


def dequantize_block(codes: Tensor, scale: Tensor) -> Tensor:
    """codes (out, in) float8_e4m3fn times its tile's scale -> (out, in) bfloat16, rounded once from float32."""
    return (codes.float() * expand_scale(scale, *codes.shape)).to(torch.bfloat16)


class Checkpoint:
    """Tensors of a sharded safetensors folder by name, in the order of its index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if not index.is_file():
            raise SystemExit(f"{folder}: has no {INDEX}; give the folder of a sharded safetensors checkpoint.")
        self.weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _file(self, name: str) -> Any:
        shard = self.weight_map[name]
        if shard not in self._files:
            self._files[shard] = self._stack.enter_context(safe_open(self.folder / shard, framework="pt"))
        return self._files[shard]

    def shape(self, name: str) -> list[int]:
        return self._file(name).get_slice(name).get_shape()

    def read(self, name: str) -> Tensor:
        return self._file(name).get_tensor(name)


def write_config(source: Path, out: Path, quantization_config: dict[str, object] | None) -> None:
    """Copy config.json as raw JSON (sorted keys, as in the release) with `quantization_config` set or removed."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (out / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def write_index(out: Path, weight_map: dict[str, str], total_size: int) -> None:
    document = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def copy_other_files(source: Path, out: Path) -> None:
    """Tokenizer, generation config, licence: everything that is neither weights nor config nor the old model card."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, "config.json", "README.md"):
            shutil.copyfile(path, out / path.name)


def to_bf16(source: Path, out: Path) -> None:
    """Each shard keeps its file name, as in the release's own script; scales are fetched by name from any shard."""
    weight_map: dict[str, str] = {}
    total_size = 0
    with Checkpoint(source) as checkpoint:
        names = [name for name in checkpoint.weight_map if not name.endswith(SCALE_SUFFIX)]
        for shard in sorted(set(checkpoint.weight_map.values())):
            tensors: dict[str, Tensor] = {}
            for name in (name for name in names if checkpoint.weight_map[name] == shard):
                tensor = checkpoint.read(name)
                if tensor.dtype == torch.float8_e4m3fn:
                    if name + SCALE_SUFFIX not in checkpoint.weight_map:
                        raise SystemExit(f"{name}: is float8 in {shard} but the index names no {name + SCALE_SUFFIX}.")
                    tensor = dequantize_block(tensor, checkpoint.read(name + SCALE_SUFFIX))
                tensors[name] = tensor
                total_size += tensor.nbytes
            if tensors:
                save_file(tensors, out / shard, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(tensors, shard)
    write_index(out, {name: weight_map[name] for name in names}, total_size)
    write_config(source, out, None)


def _plan_fp8(checkpoint: Checkpoint, shard_bytes: int) -> list[list[str]]:
    """Names of each output shard.

    A shard ends after the tensor that fills it: if that is an FP8 weight, its scale opens the next shard, which the
    official format allows and readers must expect.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name in checkpoint.weight_map:
        rows = checkpoint.shape(name)
        if not FP8_NAMES.search(name):
            parts = [(name, math.prod(rows) * (4 if name.endswith("e_score_correction_bias") else 2))]
        else:
            tiles = math.ceil(rows[0] / BLOCK) * math.ceil(rows[1] / BLOCK)
            parts = [(name, math.prod(rows)), (name + SCALE_SUFFIX, 4 * tiles)]
        for part, part_bytes in parts:
            if size >= shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(part)
            size += part_bytes
    return shards


def _fp8_tensors(checkpoint: Checkpoint, names: list[str], pending: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one output shard; `pending` carries scales whose weight stood in the shard before."""
    for name in names:
        if name in pending:
            yield name, pending.pop(name)
            continue
        tensor = checkpoint.read(name)
        if FP8_NAMES.search(name):
            if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                raise SystemExit(f"{name}: is {tensor.dtype} already; to-fp8 needs bfloat16, float16 or float32.")
            tensor, pending[name + SCALE_SUFFIX] = quantize_block(tensor)
        yield name, tensor


def to_fp8(source: Path, out: Path, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    weight_map: dict[str, str] = {}
    total_size = 0
    with Checkpoint(source) as checkpoint:
        shards = _plan_fp8(checkpoint, shard_bytes)
        pending: dict[str, Tensor] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
            tensors = dict(_fp8_tensors(checkpoint, names, pending))
            save_file(tensors, out / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
            total_size += sum(tensor.nbytes for tensor in tensors.values())
    write_index(out, weight_map, total_size)
    write_config(source, out, QUANTIZATION_CONFIG)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=("to-bf16", "to-fp8"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--shard-bytes", type=int, default=DEFAULT_SHARD_BYTES, help="to-fp8: a shard ends once it holds this"
    )
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out}: exists already; name a new folder.")
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_other_files(arguments.source, partial)
    if arguments.direction == "to-bf16":
        to_bf16(arguments.source, partial)
    else:
        to_fp8(arguments.source, partial, arguments.shard_bytes)
    partial.rename(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
