"""Train small models of other families from the text and with the tokenizer of nano.

    python tools/nano_text.py --cache CACHE --work TOKENS                       # text, tokens (CPU, minutes)
    python tools/train_relatives.py TOKENS OUT kimi --steps 6000                # one GPU, minutes

``kimi``: 48 experts in one group, no MTP layer, yarn as Kimi K2 has it. ``v2-lite``: no query latent, experts by
softmax, two shared ones, widths that are no multiples of 256. ``v32``: the indexer of sparse attention, which is
trained as the report of DeepSeek V3.2 describes its first stage: the model is frozen, and each layer's indexer learns
the sum of its heads' attention (Kullback-Leibler). ``qwen3-moe`` and ``glm4-moe``: grouped-query attention, a key and a
value for four queries; experts by softmax in every layer, or DeepSeek V3's behind a dense layer, with biases, half of
each head rotated, and an MTP layer.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from nano_model import Attention, Config, DeepseekV3
from torch import Tensor
from train_nano import MIX, Schedule, Streams, held_out_losses, train, write_bf16

SHARED: Config = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "num_nextn_predict_layers": 0,
}
YARN = {"type": "yarn", "factor": 4, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 512}
GROUPED: Config = {
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "n_routed_experts": 16,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
}
"""Grouped-query attention: the sizes of latents go."""
LATENTS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")
FAMILIES: dict[str, Config] = {
    "kimi": {
        "model_type": "kimi_k2",
        "n_routed_experts": 48,
        "moe_intermediate_size": 128,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "rope_theta": 50000,
        "rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 1},
    },
    "v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "intermediate_size": 704,
        "n_routed_experts": 16,
        "moe_intermediate_size": 384,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_scaling": {**YARN, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "qwen3-moe": {
        **GROUPED,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": 16,
        "first_k_dense_replace": 0,
        "n_shared_experts": 0,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
    },
    "glm4-moe": {
        **GROUPED,
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 1,
    },
    "v32": {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "n_routed_experts": 16,
        "moe_intermediate_size": 256,
        "num_experts_per_tok": 4,
        "index_n_heads": 16,
        "index_head_dim": 64,
        "index_topk": 256,
    },
}
BALANCE = {"v2-lite": 1e-2, "qwen3-moe": 1e-2}
"""Without a selection bias the loss alone spreads the load."""


def config_of(family: str, nano: Config) -> Config:
    """config.json: nano's with the family's changes."""
    config = {**nano, **SHARED, **FAMILIES[family]}
    grouped = "head_dim" in config
    return {key: value for key, value in config.items() if not (grouped and key in LATENTS)}


def attention_inputs(model: DeepseekV3, tokens: Tensor) -> list[tuple[Attention, Tensor, Tensor, Tensor]]:
    """(attention, its normed inputs, cos, sin) of each layer."""
    seen: list[tuple[Attention, Tensor, Tensor, Tensor]] = []

    def keep(module: Any, given: tuple[Tensor, Tensor, Tensor]) -> None:
        seen.append((module, *given))

    hooks = [layer.self_attn.register_forward_pre_hook(keep) for layer in model.layers[: model.n_layers]]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def indexer_loss(model: DeepseekV3, tokens: Tensor) -> Tensor:
    """Mean over layers and queries of KL(attention summed over heads || softmax of the indexer's scores)."""
    length = tokens.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    losses: list[Tensor] = []
    for attention, x, cos, sin in attention_inputs(model, tokens):
        assert attention.indexer is not None
        with torch.no_grad():
            q, k, _ = attention.queries_keys_values(x, cos, sin)
            scores = (q @ k.mT * attention.scale).masked_fill(future, float("-inf"))
            target = scores.softmax(-1).mean(1)
            latent = attention.q_a_layernorm(attention.q_a_proj(x))
        found = attention.indexer(x, latent, cos, sin).masked_fill(future, float("-inf")).log_softmax(-1)
        each = F.kl_div(found.masked_fill(future, 0.0), target, reduction="none").sum(-1)
        losses.append(each.mean())
    return torch.stack(losses).mean()


def train_indexers(model: DeepseekV3, streams: Streams, steps: int, batch: int = 8, length: int = 512) -> list[float]:
    """Train the indexers in place, all else frozen; returns the loss every 100 steps."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    indexers = [layer.self_attn.indexer for layer in model.layers[: model.n_layers]]
    parameters = [parameter.requires_grad_(True) for indexer in indexers for parameter in indexer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    curve: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        loss = indexer_loss(model, streams.batch(batch, length))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            curve.append(loss.item())
            print(f"indexer step {step} loss {curve[-1]:.4f}", flush=True)
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path, help="folder of token streams that nano_text.py wrote")
    parser.add_argument("out", type=Path, help="new folder for the BF16 checkpoint and training.json")
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--nano", type=Path, default=Path("examples/nano-deepseek-v3"), help="config and tokenizer")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--indexer-steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    config = config_of(arguments.family, json.loads((arguments.nano / "config.json").read_text(encoding="utf-8")))
    factor = BALANCE.get(arguments.family, Schedule.balance_factor)
    schedule = Schedule(arguments.steps, arguments.batch, arguments.length, arguments.rate, balance_factor=factor)
    torch.manual_seed(schedule.seed)
    torch.set_float32_matmul_precision("high")
    model = DeepseekV3(config).to(device)
    streams = Streams(arguments.tokens, list(MIX), device, schedule.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {streams.tokens.numel():,} tokens", flush=True)
    started = time.perf_counter()
    rows = train(model, streams, schedule, compile_model=device.type == "cuda")
    torch.set_float32_matmul_precision("highest")
    held_out = held_out_losses(model, arguments.tokens, device)
    indexers = train_indexers(model, streams, arguments.indexer_steps) if "index_topk" in config else []
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_bf16(model, config, arguments.nano, arguments.out, shards=4)
    record = {
        "schedule": asdict(schedule),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 1),
        "curve": rows,
        "indexer_curve": indexers,
        "held_out_nats": {domain: loss for domain, (loss, _) in held_out.items()},
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
