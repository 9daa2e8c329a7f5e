"""quantkit's presets against llama-quantize: the type of every tensor, for models of several shapes, with and without
an importance matrix.

    python benchmarks/llama_cpp/presets.py [--python .venvs/llama/bin/python] [PRESET ...]

Each shape becomes a file that is header and hole (the whole of DeepSeek V3 takes no room), of which llama.cpp makes its
plan in a dry run. Exits with 1 if any tensor differs. Needs a file system that knows holes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from quantkit.arch import arch_of  # noqa: E402
from quantkit.errors import PlanError  # noqa: E402
from quantkit.runtimes.llama_cpp.presets import PRESETS, downs_before, preset_type  # noqa: E402
from tests.oracles import gguf_writer  # noqa: E402

CHANGES: dict[str, dict[str, Any]] = {
    "DeepSeek V3": {},
    "DeepSeek V3 with its MTP layer": {},
    "384 experts in one group, 64 heads": {"n_routed_experts": 384, "n_group": 1, "topk_group": 1}
    | {"num_attention_heads": 64, "num_key_value_heads": 64},
    "inner widths of DeepSeek V2 Lite": {"intermediate_size": 10944, "moe_intermediate_size": 1408, "hidden_size": 2048}
    | {"n_shared_experts": 2, "first_k_dense_replace": 1},
    "eight experts": {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "20 layers": {"num_hidden_layers": 20},
    "5 layers, rows of 96": {"num_hidden_layers": 5, "hidden_size": 96, "moe_intermediate_size": 96},
}


def config_of(changes: Mapping[str, Any]) -> dict[str, Any]:
    big = ROOT / "examples" / "deepseek-v3-671b" / "config.json"
    return {**json.loads(big.read_text(encoding="utf-8")), **changes}


def write_hole(config: Mapping[str, Any], path: Path, *, mtp: bool) -> dict[str, tuple[int, ...]]:
    """Write the file -> its tensors' shapes in numpy's order."""
    weights = {spec.name: torch.empty(spec.shape, device="meta") for spec in arch_of(config).tensors()}
    tensors = list(gguf_writer.tensors(config, weights, mtp=mtp))
    metadata = {**gguf_writer.metadata(config, mtp=mtp), "tokenizer.ggml.model": "no_vocab"}
    gguf_writer.write_shape(path, metadata, iter(tensors))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def theirs(python: Path, path: Path, preset: str, *, importance: bool) -> dict[str, str] | str:
    """Tensor -> type by llama.cpp, or what it said instead."""
    command = [str(python), str(HERE / "quantize.py"), str(path), "--plan", preset]
    done = subprocess.run(
        [*command, *(["--assume-imatrix"] if importance else [])], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return dict(line.split("\t") for line in done.stdout.splitlines())


def ours(
    preset: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, importance: bool, mtp: bool
) -> dict[str, str] | str:
    types: dict[str, str] = {}
    downs = downs_before(shapes)
    for name, shape in shapes.items():
        try:
            kind = preset_type(
                preset,
                name,
                shape,
                layer=int(name.split(".")[1]) if name.startswith("blk.") else None,
                n_layers=config["num_hidden_layers"] + mtp,
                n_experts=config["n_routed_experts"],
                importance=importance,
                downs=downs.get(name, 0),
            )
        except PlanError as error:
            return error.message
        types[name] = kind or "F32"
    return types


def compare(preset: str, mine: dict[str, str] | str, other: dict[str, str] | str) -> int:
    """Print what differs -> number of tensors; 0 where either side makes no such file."""
    if isinstance(mine, str) or isinstance(other, str):
        print(f"    {preset}: quantkit {mine if isinstance(mine, str) else 'plans it'}, ", end="")
        print(f"llama.cpp {other if isinstance(other, str) else 'plans it'}")
        return 0
    changed = [name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name)]
    for name in sorted(changed)[:5]:
        print(f"    {preset}: {name} is {mine.get(name)}, llama.cpp makes it {other.get(name)}")
    return len(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--python", type=Path, default=ROOT / ".venvs" / "llama" / "bin" / "python")
    args = parser.parse_args()
    differing = 0
    for title, changes in CHANGES.items():
        config, mtp = config_of(changes), "MTP" in title
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "hole.gguf"
            shapes = write_hole(config, path, mtp=mtp)
            print(f"{title}: {len(shapes)} tensors, {len(args.presets)} presets")
            for preset in args.presets:
                for importance in (False, True):
                    mine = ours(preset, config, shapes, importance=importance, mtp=mtp)
                    differing += compare(preset, mine, theirs(args.python, path, preset, importance=importance))
    print(f"{differing} tensors differ.")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
