"""GGUF files of any shape for a test: headers written by gguf-py, and holes where the tensors would be."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.oracles.gguf_writer import add, metadata, new_writer, tensors
from tests.tiny_models import random_weights, tiny_config

Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Name -> shape in numpy's order and ggml's name of the type."""


def tokenizer_keys(vocab_size: int) -> dict[str, Any]:
    """A tokenizer, as far as headers are concerned."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(vocab_size)],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.chat_template": "{{ messages }}",
    }


def tiny_file(*, mtp: bool = False, **changes: Any) -> tuple[dict[str, Any], Shapes]:
    """Key-values and tensors of the tiny DeepSeek V3 (``changes`` of its config) as llama.cpp's converter has them:
    matrices in BF16, all else in F32."""
    config = tiny_config(**changes)
    keys = {**metadata(config, mtp=mtp), "general.name": "tiny", **tokenizer_keys(config["vocab_size"])}
    shapes: Shapes = {}
    for name, tensor in tensors(config, random_weights(config, 0), mtp=mtp):
        small = tensor.ndim < 2 or name.endswith("ffn_gate_inp.weight")
        shapes[name] = tuple(tensor.shape), "F32" if small else "BF16"
    return keys, shapes


def write_file(path: Path, keys: Mapping[str, Any], shapes: Shapes, architecture: str = "deepseek2") -> Path:
    """The file; its data is a hole."""
    if architecture == "deepseek2":
        writer = new_writer(path, keys)
    else:
        writer = gguf.GGUFWriter(path, arch=architecture)
        for key, value in keys.items():
            add(writer, key, value)
    total = 0
    for name, nbytes, (shape, kind) in _sized(shapes):
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=gguf.GGMLQuantizationType[kind])
        total += gguf.GGUFWriter.ggml_pad(nbytes, gguf.GGUF_DEFAULT_ALIGNMENT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, gguf.GGUFWriter.ggml_pad(path.stat().st_size, gguf.GGUF_DEFAULT_ALIGNMENT) + total)
    return path


def _sized(shapes: Shapes) -> Iterator[tuple[str, int, tuple[tuple[int, ...], str]]]:
    for name, (shape, kind) in shapes.items():
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        yield name, math.prod(shape) // block * size, (shape, kind)
