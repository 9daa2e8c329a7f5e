"""A sound checkpoint, broken in one way: what is changed of its tensors and its config.json, and the faults that are
found then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.errors import QuantkitError

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
EXPERT = "model.layers.1.mlp.experts.3"
ATTENTION = "model.layers.1.self_attn"


def broken(sound: Path, out: Path, change: Callable[[Tensors, Config], None]) -> Path:
    """A copy in one shard after ``change(tensors, config)``, without quantkit.json."""
    shutil.copytree(sound, out)
    tensors: Tensors = {}
    for shard in sorted(out.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    for name in ("model.safetensors.index.json", "quantkit.json"):
        (out / name).unlink(missing_ok=True)
    config = json.loads((out / "config.json").read_text())
    change(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


def faults(folder: Path, runtime: str = "vllm", **options: Any) -> str:
    try:
        found = quantkit.verify(folder, runtimes=runtime, **{"sample": 0, **options})
    except QuantkitError as error:
        return error.message
    return "\n".join(f"{finding.runtime}: {finding.text}" for finding in found.faults)


def section(config: Config) -> dict[str, Any]:
    return config["quantization_config"]


def group(config: Config) -> dict[str, Any]:
    return section(config)["config_groups"]["group_0"]


def drop(*names: str) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        for name in names:
            del tensors[name]

    return change


def rename(old: str, new: str) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        tensors[new] = tensors.pop(old)

    return change


def cast(name: str, dtype: torch.dtype) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        tensors[name] = tensors[name].to(dtype)

    return change


def narrowed(name: str) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        tensors[name] = tensors[name][:, :1]

    return change


def add(name: str, tensor: torch.Tensor) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        tensors[name] = tensor

    return change


def key(name: str, value: Any) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        config[name] = value

    return change


def without(name: str) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        del config[name]

    return change


def stated(name: str, value: Any) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        section(config)[name] = value

    return change


def weights(name: str, value: Any) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        group(config)["weights"][name] = value

    return change


def ignored(*patterns: str) -> Callable[[Tensors, Config], None]:
    """Modules that config.json says are not quantised, with a plain weight in the place of the packed one."""

    def change(tensors: Tensors, config: Config) -> None:
        section(config)["ignore"] += patterns
        for pattern in patterns:
            for part in ("packed", "scale", "shape"):
                del tensors[f"{pattern}.weight_{part}"]
            shape = {"kv_a_proj_with_mqa": (160, 128)}.get(pattern.rpartition(".")[2], (128, 128))
            tensors[f"{pattern}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)

    return change


def own_group(pattern: str, **changes: Any) -> Callable[[Tensors, Config], None]:
    """A second group, whose tensors have the sizes that it says."""

    def change(tensors: Tensors, config: Config) -> None:
        first = group(config)
        second = {**first, "targets": [pattern], "weights": {**first["weights"], **changes}}
        section(config)["config_groups"]["group_1"] = second
        n_out, n_in = tensors[f"{pattern}.weight_shape"].tolist()
        bits, size = second["weights"]["num_bits"], second["weights"]["group_size"]
        tensors[f"{pattern}.weight_packed"] = torch.zeros(n_out, n_in * bits // 32, dtype=torch.int32)
        tensors[f"{pattern}.weight_scale"] = torch.ones(n_out, n_in // size, dtype=torch.bfloat16)
        if not second["weights"]["symmetric"]:
            zero = torch.zeros(n_out * bits // 32, n_in // size, dtype=torch.int32)
            tensors[f"{pattern}.weight_zero_point"] = zero

    return change
