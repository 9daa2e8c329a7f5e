"""Writes a very small model of another family, with random weights, to try commands on.

    python examples/random/make.py kimi-k2.5 FOLDER
    python examples/random/make.py deepseek-v3.2 FOLDER

config.json, names, shapes and dtypes are those of the family, the sizes those of nano-deepseek-v3, whose tokenizer goes
along. ``kimi-k2.5`` is stored as its release is: routed experts in int4 in groups of 32 (compressed-tensors'
pack-quantized), a vision tower beside the language model. ``deepseek-v3.2`` is in BF16, with indexers that choose 128
keys, and an MTP layer.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.formats.bitpack import pack
from quantkit.tensors import Role, TensorSpec

NANO = Path(__file__).resolve().parent.parent / "nano-deepseek-v3"
GROUP = 32
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
KIMI_SECTION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
    "ignore": ["re:.*(lm_head|self_attn|shared_experts|mlp\\.gate$|mlp\\.(gate|up|gate_up|down)_proj).*"],
}
KIMI_VISION = {"vision_tower.encoder.final_layernorm.weight": (64,), "mm_projector.proj.0.weight": (256, 64)}


def kimi_k25(nano: dict[str, Any]) -> dict[str, Any]:
    """The language model's config under text_config; one group of experts, no MTP layer."""
    groups = {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.827}
    text = {**nano, **groups, "model_type": "kimi_k2", "quantization_config": KIMI_SECTION}
    del text["architectures"]
    return {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": text}


def deepseek_v32(nano: dict[str, Any]) -> dict[str, Any]:
    """Nano with an indexer in each attention."""
    names = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
    return {**nano, **names, "index_n_heads": 16, "index_head_dim": 64, "index_topk": 128}


MODELS = {"kimi-k2.5": kimi_k25, "deepseek-v3.2": deepseek_v32}


def random_weight(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """Norms near 1; matrices so that their outputs are about as large as their inputs."""
    values = torch.randn(spec.shape, generator=generator)
    if spec.base_role is Role.NORM:
        values = values * 0.05 + (not spec.name.endswith("bias"))
    elif len(spec.shape) == 2 and not spec.table:
        values *= spec.shape[1] ** -0.5
    return values if spec.float32 else values.bfloat16()


def packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """weight (out, in) -> int4 codes, scales and shape as compressed-tensors names them; levels -8 to 7."""
    name = name.removesuffix(".weight")
    grouped = weight.float().unflatten(1, (-1, GROUP))
    scale = (grouped.abs().amax(dim=2) / 7.5).bfloat16()
    codes = (grouped / scale.float().unsqueeze(2)).round().clamp(-8, 7) + 8
    return {
        f"{name}.weight_packed": pack(codes.flatten(1).to(torch.uint8), 4),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int32),
    }


def write(model: str, folder: Path) -> None:
    """The checkpoint in one file, config.json, and nano's tokenizer."""
    nano = json.loads((NANO / "config.json").read_text(encoding="utf-8"))
    del nano["quantization_config"]
    config = MODELS[model](nano)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for spec in arch_of(config).tensors():
        weight = random_weight(spec, generator)
        experts_packed = model == "kimi-k2.5" and spec.role is Role.EXPERT
        tensors |= packed(spec.name, weight) if experts_packed else {spec.name: weight}
    if model == "kimi-k2.5":
        tensors |= {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in KIMI_VISION.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(NANO / name, folder)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in MODELS:
        sys.exit(f"usage: python {sys.argv[0]} {'|'.join(MODELS)} FOLDER")
    if Path(sys.argv[2]).exists():
        sys.exit(f"{sys.argv[2]} is there already; name another folder.")
    write(sys.argv[1], Path(sys.argv[2]))
    print(f"wrote {sys.argv[2]}")
