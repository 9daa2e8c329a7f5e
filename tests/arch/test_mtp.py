"""The MTP layers of the families with DeepSeek V3's layer against transformers, in float32.

transformers computes the decoder layer inside as one more layer of the model, which reads what a hook puts in its way:
section 2.2 of arXiv 2412.19437, written here once more in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding

from quantkit.arch import arch_of
from tests.arch.relatives import deepseek_v32, glm4_moe_lite, glm_moe_dsa
from tests.arch.test_forward import random_tokens
from tests.oracles import forward
from tests.tiny_models import write_checkpoint

transformers = pytest.importorskip("transformers")

MTP, TOLERANCE = 3, 1e-4
PREFIX = f"model.layers.{MTP}."
CONFIGS: dict[str, dict[str, Any]] = {
    "GLM-4.7-Flash": glm4_moe_lite(),
    "V3.2, sparse": deepseek_v32(num_nextn_predict_layers=1),
    "V3.2, dense": deepseek_v32(num_nextn_predict_layers=1, index_topk=200),
    "GLM-5, sparse": glm_moe_dsa(num_nextn_predict_layers=1),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def transformers_layer(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """What leaves the decoder layer inside the MTP layer, (rows, length, hidden) float32; the last position knows no
    next token."""
    longer = {**config, "num_hidden_layers": MTP + 1, "num_nextn_predict_layers": 0}
    if "mlp_layer_types" in config:
        longer["mlp_layer_types"] = [*config["mlp_layer_types"], "sparse"]
    (folder / "config.json").write_text(json.dumps(longer))
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not loaded["missing_keys"]
    eps = config["rms_norm_eps"]
    left: list[Tensor] = []

    def leave(_: object, __: object, out: Tensor | tuple[Tensor, ...]) -> None:
        left.append(out[0] if isinstance(out, tuple) else out)

    def enter(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        hidden = rms_norm(args[0].double(), weights["model.norm.weight"], eps)
        following = embedding(tokens.roll(-1, 1), weights[f"{PREFIX}embed_tokens.weight"].double())
        both = (
            rms_norm(following, weights[f"{PREFIX}enorm.weight"], eps),
            rms_norm(hidden, weights[f"{PREFIX}hnorm.weight"], eps),
        )
        entered = torch.cat(both, -1) @ weights[f"{PREFIX}eh_proj.weight"].double().T
        return (entered.float(), *args[1:]), kwargs

    block = model.eval().model.layers[MTP]
    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(leave)
    with torch.inference_mode():
        model(tokens)
    return left[0]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_mtp_layers_equal_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path, config, seed=1)
    tokens = random_tokens(config["vocab_size"], 2, 100)
    reached = transformers_layer(tmp_path, config, weights, tokens)[:, :-1].double()
    norm, head = weights[f"{PREFIX}shared_head.norm.weight"], weights[f"{PREFIX}shared_head.head.weight"]
    expected = rms_norm(reached, norm, config["rms_norm_eps"]) @ head.double().T
    found = drafted(config, weights, tokens)
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= TOLERANCE


def drafted(config: dict[str, Any], weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """tokens (rows, n) -> (rows, n - 1, vocab): `ModelArch.mtp_layers` on what the model's layers give."""
    arch = arch_of(config)
    ((number, layer),) = arch.mtp_layers().items()

    def weight(name: str) -> Tensor:
        return weights[name].float()

    with torch.inference_mode():
        x = embedding(tokens, weight(arch.embed))
        for main in range(arch.n_layers):
            x = forward.forward_layer(arch.sublayers(main), weight, x)
        hidden = arch.final_hidden(weight, x)[:, :-1]
        entered = layer.inputs(weight, hidden, embedding(tokens[:, 1:], weight(layer.embed)))
        left = forward.forward_layer(arch.sublayers(number), weight, entered)
        return layer.final_hidden(weight, left) @ weight(layer.lm_head).T
