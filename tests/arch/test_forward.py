"""The forward pass equals transformers' DeepseekV3ForCausalLM in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from quantkit.arch import arch_of
from quantkit.arch.deepseek_v3 import DeepseekV3
from tests.arch.test_deepseek_v3 import CHECKPOINTS
from tests.oracles import forward
from tests.tiny_models import YARN, decode_fp8_blocks, random_weights, tiny_config, write_checkpoint, write_shards

transformers = pytest.importorskip("transformers")
deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")

TOLERANCE = 1e-4
CONFIGS: dict[str, dict[str, Any]] = {
    "all features": {},
    "no q_lora": {"q_lora_rank": None},
    "no yarn": {"rope_scaling": None},
    "one group": {"n_group": 1, "topk_group": 1},
    "two shared experts": {"n_shared_experts": 2},
    "weights not normalised": {"norm_topk_prob": False},
    "another epsilon": {"rms_norm_eps": 1e-3},
    "rope in halves": {"rope_interleave": False},
    "wide values": {"v_head_dim": 96, "qk_nope_head_dim": 16},
    "unequal mscales": {"rope_scaling": {**YARN, "factor": 40, "mscale_all_dim": 0.5}},
    "no mscale": {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}},
    "all dense": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "tied": {"tie_word_embeddings": True},
}


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def reference_model(path: Path) -> Any:
    model, loaded = deepseek.DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    n_layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
    assert not loaded["missing_keys"]
    assert all(key.startswith(f"model.layers.{n_layers}.") for key in loaded["unexpected_keys"])
    return model.eval()


def random_tokens(vocab_size: int, n_rows: int, n_tokens: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (n_rows, n_tokens), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(**changes)
    weights = write_checkpoint(tmp_path, config, seed=1)
    tokens = random_tokens(config["vocab_size"], 2, 150)
    with torch.inference_mode():
        expected = reference_model(tmp_path)(tokens).logits
        found = forward.logits(arch_of(config), lambda name: weights[name].float(), tokens)
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_logits_of_trained_models(name: str, tmp_path: Path) -> None:
    folder = CHECKPOINTS[name]
    if not (folder / "model.safetensors.index.json").exists():
        pytest.skip(f"{name} is not here")
    config, weights = read_decoded(folder)
    write_shards(tmp_path, weights, 1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = random_tokens(config["vocab_size"], 2, 300)
    with torch.inference_mode():
        expected = reference_model(tmp_path)(tokens).logits
        found = forward.logits(arch_of(config), lambda name: weights[name].float(), tokens)
    assert (found - expected).abs().max() <= TOLERANCE


def read_decoded(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json without its quantization_config, and every tensor with FP8 blocks decoded to BF16."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors.update((name, shard.get_tensor(name)) for name in shard.keys())  # noqa: SIM118 (not a dict)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = decode_fp8_blocks(tensors[weight], tensors.pop(name)).to(torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    return config, tensors


def test_mtp_layer_equals_transformers() -> None:
    layers = pytest.importorskip("transformers.modeling_layers")
    config = tiny_config()
    arch = DeepseekV3(config)
    mtp = arch.mtp_layers()[3]
    weights = {name: tensor.float() for name, tensor in random_weights(config, seed=2).items()}
    reference_config = transformers.DeepseekV3Config(**config)
    reference = layers.MtpLayer(reference_config, deepseek.DeepseekV3DecoderLayer, deepseek.DeepseekV3RMSNorm, 3).eval()
    reference.load_state_dict(mtp_state(weights, "model.layers.3.", 12))
    hidden, embeddings = torch.randn(2, 2, 40, 128, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(40)[None]
    mask = torch.full((40, 40), float("-inf")).triu(1)[None, None]
    with torch.inference_mode():
        rotation = deepseek.DeepseekV3RotaryEmbedding(reference_config)(hidden, positions)
        expected = reference(embeddings, hidden, rotation, mask, positions, None)
        x = mtp.inputs(weights.__getitem__, hidden, embeddings)
        x = forward.forward_layer(arch.sublayers(3), weights.__getitem__, x)
        found = mtp.final_hidden(weights.__getitem__, x)
    assert (found - expected).abs().max() <= TOLERANCE


def mtp_state(weights: dict[str, torch.Tensor], prefix: str, n_experts: int) -> dict[str, torch.Tensor]:
    """The weights of an MTP layer as transformers' module names and stacks them."""
    state: dict[str, torch.Tensor] = {}
    for name in (name.removeprefix(prefix) for name in weights if name.startswith(prefix)):
        if name.startswith(("enorm", "hnorm", "eh_proj")):
            state[name] = weights[prefix + name]
        elif name == "shared_head.norm.weight":
            state["post_norm.weight"] = weights[prefix + name]
        elif not name.startswith(("mlp.experts", "embed_tokens", "shared_head")):
            state[f"mtp_block.{name}"] = weights[prefix + name]

    def expert(number: int, part: str) -> torch.Tensor:
        return weights[f"{prefix}mlp.experts.{number}.{part}_proj.weight"]

    gate_up = [torch.cat((expert(number, "gate"), expert(number, "up"))) for number in range(n_experts)]
    state["mtp_block.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
    state["mtp_block.mlp.experts.down_proj"] = torch.stack([expert(number, "down") for number in range(n_experts)])
    return state
