"""A GGUF of architecture "deepseek2" read by gguf-py: the way back of tests/oracles/gguf_writer.py, any tensor type.

`read_weights(path)` -> official tensor name to float32 tensor, as a runtime computes with it. Nothing comes from
quantkit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

from tests.oracles.gguf_writer import MLP, PLAIN

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
RENAMED = {name: official for official, name in PLAIN.items()}
EXPERTS = {f"{name}_exps.weight": part for part, name in MLP.items()}


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key with its value (arrays as lists)."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def read_types(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Tensor name -> type, shape in numpy's order, bytes."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), int(t.n_bytes)) for t in tensors}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Every weight decoded, by its official name; kv_b_proj is put together again."""
    reader = gguf.GGUFReader(path)
    return official({tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors})


def official(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Decoded tensors by llama.cpp's names -> the same by official names. Empties ``arrays``."""
    weights = {OUTSIDE[name]: arrays.pop(name) for name in OUTSIDE if name in arrays}
    for layer in sorted({int(name.split(".")[1]) for name in arrays}):
        prefix = f"blk.{layer}."
        held = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        weights.update((f"model.layers.{layer}.{name}", array) for name, array in layer_weights(held))
    return {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in weights.items()}


def layer_weights(held: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    keys, values = held.pop("attn_k_b.weight"), held.pop("attn_v_b.weight")  # (heads, rank, nope), (heads, v, rank)
    yield "self_attn.kv_b_proj.weight", np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, keys.shape[1])
    for name, array in held.items():
        if name in EXPERTS:
            yield from ((f"mlp.experts.{e}.{EXPERTS[name]}.weight", one) for e, one in enumerate(array))
        else:
            yield RENAMED[name], array
