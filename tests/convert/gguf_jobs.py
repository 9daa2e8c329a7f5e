"""GGUF conversions small enough for a unit test, and what gguf-py, which is not ours, reads from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from quantkit.plan.recipe import Recipe
from tests.convert.jobs import small_config
from tests.oracles.gguf_reader import read_weights

RTN = {"kind": "rtn"}
GPTQ = {"kind": "gptq", "polish": 1}


def wide_config(**changes: Any) -> dict[str, Any]:
    """`small_config` with rows of 256, a whole block of every type, and heads of 128, of blocks of 32 only."""
    sizes = {name: 256 for name in ("hidden_size", "q_lora_rank", "kv_lora_rank", "moe_intermediate_size")}
    return small_config(**{**sizes, "qk_nope_head_dim": 128, "v_head_dim": 64, **changes})


def gguf_output(*rules: dict[str, Any], name: str = "main", **options: Any) -> dict[str, Any]:
    """One output; rules and options such as preset."""
    return {"name": name, "format": "gguf", "rules": list(rules), **options}


def gguf_recipe(*outputs: dict[str, Any], tokens: int | None = None, least: int = 0, **changes: Any) -> Recipe:
    """Outputs in this order; ``tokens`` of "calibration.txt" beside the source, or data-free. ``least``: tokens of an
    expert."""
    calibration = None
    if tokens is not None:
        calibration = {"data": ["calibration.txt"], "tokens": tokens, "sequence_length": 32, "min_expert_tokens": least}
    return Recipe.model_validate({"version": 1, "calibration": calibration, "outputs": list(outputs), **changes})


def compressed(*rules: dict[str, Any], name: str = "ct") -> dict[str, Any]:
    """A compressed-tensors output that keeps what no rule names."""
    rest = {"match": "*", "keep": "source"}
    return {"name": name, "format": "compressed-tensors", "max_shard_size": "1MiB", "rules": [*rules, rest]}


def model_files(folder: Path) -> list[Path]:
    """The files of the model in a finished output, imatrix.gguf apart."""
    return sorted(path for path in folder.glob("*.gguf") if path.name != "imatrix.gguf")


def stored_bytes(folder: Path) -> dict[str, bytes]:
    """GGUF name -> bytes of the tensor, over all files of the model."""
    tensors = [tensor for path in model_files(folder) for tensor in gguf.GGUFReader(path).tensors]
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    return {tensor.name: tensor.data.tobytes() for tensor in tensors}


def stored_types(folder: Path) -> dict[str, str]:
    """GGUF name -> ggml's name of the type, over all files of the model."""
    readers = [gguf.GGUFReader(path) for path in model_files(folder)]
    return {tensor.name: tensor.tensor_type.name for reader in readers for tensor in reader.tensors}


def decoded_gguf(folder: Path) -> dict[str, torch.Tensor]:
    """Official name -> float32, as gguf-py decodes it; kv_b_proj put together again. One file only."""
    (path,) = model_files(folder)
    return read_weights(path)


def read_imatrix(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """GGUF name of a weight -> sums of squares (matrices, in) and counts (matrices or 1,), by gguf-py."""
    data = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder / "imatrix.gguf").tensors}
    names = [name.removesuffix(".counts") for name in data if name.endswith(".counts")]
    assert sorted(data) == sorted(name + end for name in names for end in (".in_sum2", ".counts"))
    return {name: (data[f"{name}.in_sum2"], data[f"{name}.counts"].ravel()) for name in names}
