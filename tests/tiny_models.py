"""Random models of the real architectures, small enough for a unit test, with the official names and config.json.

``tiny_config(**changes)`` -> raw config dict, ``random_weights(config, seed)`` -> state dict,
``write_checkpoint(path, config, seed)`` -> a directory as the official release has it (shards, index, config.json), in
BF16 or in FP8 blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantkit.arch import arch_of
from quantkit.tensors import Role, TensorSpec

FP8_BLOCK = 128
FP8_MAX = 448.0

YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 4,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """DeepSeek V3 with every feature in 2.7 million weights, inputs multiples of 128. ``changes`` override keys."""
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "kv_lora_rank": 128,
        "max_position_embeddings": 256,
        "moe_intermediate_size": 128,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": 12,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_scaling": dict(YARN),
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": 32,
        "vocab_size": 256,
    }
    return {**config, **changes}


def random_weights(
    config: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Every tensor of the family's table, in ``dtype`` (F32 where the release has F32). Router biases are not zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        spec.name: _random_tensor(spec, generator).to(torch.float32 if spec.float32 else dtype)
        for spec in arch_of(config).tensors()
    }


def write_checkpoint(
    path: Path,
    config: Mapping[str, Any],
    seed: int = 0,
    shards: int = 3,
    fp8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Write ``config`` with random weights as a checkpoint directory; returns what it stores, decoded, by name.

    fp8: linears are F8_E4M3 with F32 ``weight_scale_inv`` per 128x128 tile (edge tiles partial), some scales in another
    shard than their weight; the returned tensors are then the BF16 rounding of value times scale. Other tensors stay in
    ``dtype``.
    """
    weights = random_weights(config, seed, dtype)
    stored = dict(weights)
    raw = dict(config)
    if fp8:
        linears = [spec.name for spec in arch_of(config).tensors() if spec.linear]
        for name in linears:
            values, scale = encode_fp8_blocks(weights[name].float())
            weights[name] = decode_fp8_blocks(values, scale).to(torch.bfloat16)
            stored[name], stored[f"{name}_scale_inv"] = values, scale
        raw["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    write_shards(path, stored, shards)
    (path / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    return weights


def write_shards(path: Path, tensors: Mapping[str, torch.Tensor], shards: int = 3) -> None:
    """safetensors shards under the official file names (five digits of six) and model.safetensors.index.json."""
    path.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:06d}.safetensors"
        held = names[number * size : (number + 1) * size]
        save_file({name: tensors[name].contiguous() for name in held}, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def encode_fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (out, in) float32 -> values (out, in) float8_e4m3fn, scale (ceil(out/128), ceil(in/128)) float32."""
    tiles = _tiled(weight)
    scale = tiles.abs().amax(dim=(1, 3)).clamp_min(1e-12) / FP8_MAX
    values = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    out_features, in_features = weight.shape
    flat = values.view(torch.uint8).reshape(scale.shape[0] * FP8_BLOCK, scale.shape[1] * FP8_BLOCK)
    return flat[:out_features, :in_features].contiguous().view(torch.float8_e4m3fn), scale


def decode_fp8_blocks(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Inverse of `encode_fp8_blocks`: (out, in) float32."""
    wide = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return values.float() * wide[: values.shape[0], : values.shape[1]]


def _tiled(weight: torch.Tensor) -> torch.Tensor:
    out_features, in_features = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -in_features % FP8_BLOCK, 0, -out_features % FP8_BLOCK))
    return padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, padded.shape[1] // FP8_BLOCK, FP8_BLOCK)


def _random_tensor(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    """Sizes that keep activations near one, so that attention, routing and logits are far from uniform."""
    noise = torch.randn(spec.shape, generator=generator)
    if spec.name.endswith("e_score_correction_bias"):
        return 0.1 * noise
    if len(spec.shape) == 1:
        return 1 + 0.1 * noise
    if spec.role is Role.EMBED or "embed_tokens" in spec.name:
        return noise
    return noise * spec.shape[1] ** -0.5
