"""An F32 GGUF of a DeepSeek V3 checkpoint, written by gguf-py: what llama.cpp must be given, stated a second time.

Nothing here comes from quantkit. Enters: a checkpoint folder (BF16 or FP8 blocks). In three steps, so that a test can
change what lies between: ``metadata(config)`` and ``tokenizer_metadata(folder)`` -> key to value; ``tensors(config,
weights)`` -> name and tensor (a meta tensor will do where only shapes are asked); ``write(path, metadata, tensors)``.

Keys and names are those of llama.cpp's architecture "deepseek2" (src/models/deepseek2.cpp, gguf-py's constants). Types
follow from the Python value: int is u32, float f32, bool, str, and lists of str or int32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from tests.tiny_models import decode_fp8_blocks

Value = str | bool | int | float | list[str] | list[int]

MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
PLAIN = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "self_attn.indexer.wk.weight": "indexer.attn_k.weight",
    "self_attn.indexer.k_norm.weight": "indexer.k_norm.weight",
    "self_attn.indexer.k_norm.bias": "indexer.k_norm.bias",
    "self_attn.indexer.weights_proj.weight": "indexer.proj.weight",
    **{f"mlp.{part}.weight": f"{name}.weight" for part, name in MLP.items()},
    **{f"mlp.shared_experts.{part}.weight": f"{name}_shexp.weight" for part, name in MLP.items()},
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
    "shared_head.head.weight": "nextn.shared_head_head.weight",
    "embed_tokens.weight": "nextn.embed_tokens.weight",
}
"""Tensors of a layer that only change their name."""


def write_f32(folder: Path, path: Path, *, vocabulary: bool = True, mtp: bool = False) -> None:
    """The whole checkpoint as one file. Without ``vocabulary`` llama.cpp knows only how many tokens there are."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = tokenizer_metadata(folder) if vocabulary else {"tokenizer.ggml.model": "no_vocab"}
    write(path, {**metadata(config, mtp=mtp), **tokenizer}, tensors(config, read_weights(folder), mtp=mtp))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor as stored, but FP8 blocks decoded and rounded to BF16, as the official decoder does."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            weights.update((name, shard.get_tensor(name)) for name in shard.keys())  # noqa: SIM118 (not a dict)
    for name in [name for name in weights if name.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        weights[weight] = decode_fp8_blocks(weights[weight], weights.pop(name)).to(torch.bfloat16)
    return weights


# ------------------------------------------------------------------------------------------------------- metadata


def metadata(config: Mapping[str, Any], *, mtp: bool = False) -> dict[str, Value]:
    """Everything but the tokenizer."""
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    keys: dict[str, Value] = {
        "block_count": config["num_hidden_layers"] + mtp,
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "attention.head_count": config["num_attention_heads"],
        # MLA is run as attention with one wide key for all heads.
        "attention.head_count_kv": 1,
        "attention.key_length": config["kv_lora_rank"] + rope,
        "attention.value_length": config["kv_lora_rank"],
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.q_lora_rank": config["q_lora_rank"] or 0,
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config["norm_topk_prob"]),
        "expert_gating_func": int(gguf.ExpertGatingFuncType[config["scoring_func"].upper()]),
        **rope_metadata(config),
        **({"nextn_predict_layers": 1} if mtp else {}),
    }
    general: dict[str, Value] = {
        "general.architecture": "deepseek2",
        "general.type": "model",
        "general.file_type": int(gguf.LlamaFileType.ALL_F32),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    return {**general, **{f"deepseek2.{key}": value for key, value in keys.items()}}


def rope_metadata(config: Mapping[str, Any]) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "rope.dimension_count": config["qk_rope_head_dim"],
        "rope.freq_base": float(config["rope_theta"]),
    }
    yarn = config["rope_scaling"]
    if yarn is None:
        return keys
    return {
        **keys,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn["factor"]),
        "rope.scaling.original_context_length": yarn["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(yarn["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(yarn["beta_slow"]),
        # The factor of the logarithm as a whole; the loader divides by 0.1 again.
        "rope.scaling.yarn_log_multiplier": 0.1 * yarn["mscale_all_dim"],
    }


def tokenizer_metadata(folder: Path) -> dict[str, Value]:
    """The byte-level BPE of tokenizer.json with DeepSeek V3's pre-tokenizer."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    text = {id: piece for piece, id in tokenizer["model"]["vocab"].items()}
    text |= {id: token["content"] for id, token in added.items()}
    ids = {piece: id for id, piece in text.items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": [text.get(id, f"[PAD{id}]") for id in range(size)],
        "tokenizer.ggml.token_type": [token_type(id in text, added.get(id)) for id in range(size)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": ids[settings["bos_token"]],
        "tokenizer.ggml.eos_token_id": ids[settings["eos_token"]],
        "tokenizer.ggml.padding_token_id": ids[settings["pad_token"]],
        "tokenizer.ggml.add_bos_token": settings["add_bos_token"],
        "tokenizer.ggml.add_eos_token": settings["add_eos_token"],
        "tokenizer.chat_template": settings["chat_template"],
    }


def token_type(known: bool, added: Mapping[str, Any] | None) -> int:
    if not known:
        return int(gguf.TokenType.UNUSED)
    if added is None:
        return int(gguf.TokenType.NORMAL)
    return int(gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED)


# -------------------------------------------------------------------------------------------------------- tensors


def tensors(
    config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], *, mtp: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, dimensions in torch's order: (out, in), experts and heads in front."""
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        yield "output.weight", weights["lm_head.weight"]
    for layer in range(config["num_hidden_layers"] + mtp):
        prefix = f"model.layers.{layer}."
        held = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        yield from ((f"blk.{layer}.{name}", tensor) for name, tensor in layer_tensors(config, held))


def layer_tensors(config: Mapping[str, Any], held: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, renamed in PLAIN.items():
        if name in held:
            yield renamed, held[name]
    rank = config["kv_lora_rank"]
    by_head = held["self_attn.kv_b_proj.weight"].view(config["num_attention_heads"], -1, rank)
    keys, values = by_head.split([config["qk_nope_head_dim"], config["v_head_dim"]], dim=1)
    # Keys are multiplied from the other side: they take the query into the latent space.
    yield "attn_k_b.weight", keys.transpose(1, 2)
    yield "attn_v_b.weight", values
    if "mlp.gate.weight" in held:
        experts = range(config["n_routed_experts"])
        for part, name in MLP.items():
            yield f"{name}_exps.weight", torch.stack([held[f"mlp.experts.{e}.{part}.weight"] for e in experts])


# ----------------------------------------------------------------------------------------------------------- file


def write(path: Path, metadata: Mapping[str, Value], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """The file, every tensor in float32."""
    writer = new_writer(path, metadata)
    for name, tensor in tensors:
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_shape(path: Path, metadata: Mapping[str, Value], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """The header of a BF16 file and a hole of the right length: as large as one likes, and no bytes on the disk."""
    writer = new_writer(path, metadata)
    total = 0
    for name, tensor in tensors:
        kind = gguf.GGMLQuantizationType.F32 if is_float32(name) else gguf.GGMLQuantizationType.BF16
        nbytes = tensor.numel() * gguf.GGML_QUANT_SIZES[kind][1]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        total += gguf.GGUFWriter.ggml_pad(nbytes, gguf.GGUF_DEFAULT_ALIGNMENT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = gguf.GGUFWriter.ggml_pad(path.stat().st_size, gguf.GGUF_DEFAULT_ALIGNMENT)
    os.truncate(path, header + total)


def is_float32(name: str) -> bool:
    """What llama.cpp's converter keeps in float32."""
    return name.endswith(("_norm.weight", "ffn_gate_inp.weight", "norm.weight", ".bias"))


def new_writer(path: Path, metadata: Mapping[str, Value]) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch="deepseek2")
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer has put it first already
            add(writer, key, value)
    return writer


def add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case str():
            writer.add_string(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case list():
            writer.add_array(key, value)
