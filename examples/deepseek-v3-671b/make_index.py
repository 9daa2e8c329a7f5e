"""Writes model.safetensors.index.json as a DeepSeek V3 checkpoint of this config has it: every name, 163 shards, the
exact total size.

    python examples/deepseek-v3-671b/make_index.py [FOLDER]      default: beside this file

Names, dtypes and sizes are the official ones. Which tensor lies in which shard is not: tensors are dealt out in
order, by size. The index is 6 MB and follows from config.json, so it is generated and not kept in the repository.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantkit.arch import arch_of
from quantkit.plan.headers import headers_from_arch
from quantkit.schemes import Float8Scheme

SHARDS = 163


def stored_tensors(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Name and bytes of every stored tensor in official order; an FP8 weight is followed by its scale."""
    infos, stored = headers_from_arch(arch_of(config), config)
    for name, info in infos.items():
        if name in stored:
            rows, columns = Float8Scheme().scale_shape(info.shape)
            yield name, info.numel
            yield f"{name}_scale_inv", 4 * rows * columns
        else:
            yield name, info.nbytes


def make_index(config: dict[str, Any], shards: int = SHARDS) -> dict[str, Any]:
    """The index as a dict. Shards come out about equally large; the file names have five and six digits, like the
    official ones."""
    tensors = list(stored_tensors(config))
    total = sum(nbytes for _, nbytes in tensors)
    weight_map: dict[str, str] = {}
    before = 0
    for name, nbytes in tensors:
        shard = before * shards // total + 1
        weight_map[name] = f"model-{shard:05d}-of-{shards:06d}.safetensors"
        before += nbytes
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def main() -> None:
    here = Path(__file__).parent
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else here
    index = make_index(json.loads((here / "config.json").read_text(encoding="utf-8")))
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    names, size = len(index["weight_map"]), index["metadata"]["total_size"]
    sys.stdout.write(f"{path}: {names:,} tensors, {size:,} bytes\n")


if __name__ == "__main__":
    main()
