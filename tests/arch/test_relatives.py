"""All families compute what transformers computes, in float32."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantkit import inspect
from quantkit.arch import ARCHS, arch_of
from quantkit.arch.unknown import NOT_COMPUTED
from quantkit.errors import ConfigError
from tests.arch.grouped import GROUPED
from tests.arch.relatives import deepseek_v2, deepseek_v32, glm4_moe_lite, glm_moe_dsa, kimi_k25, kimi_vl
from tests.arch.test_forward import random_tokens
from tests.oracles import forward
from tests.tiny_models import YARN, random_weights, tiny_config, write_checkpoint, write_shards

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
CONFIGS: dict[str, dict[str, Any]] = {
    "V2-Lite": deepseek_v2(),
    "V2-Lite without yarn": deepseek_v2(rope_scaling=None),
    "V2": deepseek_v2(
        q_lora_rank=128, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0
    ),
    "V2, one expert in a group": deepseek_v2(topk_method="group_limited_greedy", n_group=12, topk_group=4),
    "V2, uneven mscales": deepseek_v2(rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "GLM-4.7-Flash": glm4_moe_lite(),
    "V3.2, sparse": deepseek_v32(),
    "V3.2, dense": deepseek_v32(index_topk=200),
    "GLM-5, sparse": glm_moe_dsa(),
    "GLM-5.2, dense": glm_moe_dsa(index_topk=200, indexer_types=["full", "full", "shared"]),
    "GLM-4.7-Flash, two dense": glm4_moe_lite(mlp_layer_types=["dense", "dense", "sparse"]),
    **{name: config() for name, config in GROUPED.items()},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path, config, seed=1)
    tokens = random_tokens(config["vocab_size"], 2, 150)
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not loaded["missing_keys"]
    assert all(key.startswith("model.layers.3.") for key in loaded["unexpected_keys"])
    with torch.inference_mode():
        expected = model.eval()(tokens).logits
        found = forward.logits(arch_of(config), lambda name: weights[name].float(), tokens)
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= TOLERANCE


def test_kimi_k25_with_its_vision_tower(tmp_path: Path) -> None:
    """Text weights under our names, beside the tensors that transformers' writer makes of a vision tower, load in
    transformers without a missing or unexpected key."""
    config = kimi_k25()
    text = {**config["text_config"], "model_type": "deepseek_v3"}
    made = transformers.Kimi_K25Config(
        **{key: config[key] for key in ("vision_config", "projection_hidden_size", "tie_word_embeddings")},
        text_config=text,
    )
    transformers.Kimi_K25ForConditionalGeneration(made).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    saved = {name.removeprefix("model."): tensor for name, tensor in saved.items()}
    carried = arch_of(config).variants().carried
    weights = random_weights(config, seed=1)
    vision = {name: tensor for name, tensor in saved.items() if any(fnmatchcase(name, glob) for glob in carried)}
    assert len(vision) > 15
    write_shards(tmp_path / "model", {**weights, **vision}, 1)
    made.save_pretrained(tmp_path / "model")
    model, loaded = transformers.Kimi_K25ForConditionalGeneration.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    tokens = random_tokens(256, 2, 60)
    with torch.inference_mode():
        expected = model.eval()(input_ids=tokens).logits
        found = forward.logits(arch_of(config), lambda name: weights[name].float(), tokens)
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= TOLERANCE


def test_kimi_vl_computes_what_deepseek_v3_does() -> None:
    """From the same numbers, which stand under another prefix."""
    config = kimi_vl()
    weights = random_weights(config, seed=1)
    root, text = "language_model.", {**config["text_config"], "architectures": ["DeepseekV3ForCausalLM"]}
    plain = {name.removeprefix(root): weight for name, weight in weights.items()}
    assert all(name.startswith(root) for name in weights)
    assert {spec.name for spec in arch_of(text).tensors()} == plain.keys()
    tokens = random_tokens(256, 2, 60)
    with torch.inference_mode():
        expected = forward.logits(arch_of(text), lambda name: plain[name].float(), tokens)
        found = forward.logits(arch_of(config), lambda name: weights[name].float(), tokens)
    assert torch.equal(found, expected)
    assert "multi_modal_projector.*" in arch_of(config).variants().carried


def test_kimi_k25_without_text_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="text_config is missing"):
        arch_of({"architectures": ["KimiK25ForConditionalGeneration"]})


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (deepseek_v2(topk_method="noaux_tc"), "topk_method"),
        (deepseek_v2(norm_topk_prob=True), "norm_topk_prob"),
        (glm4_moe_lite(mlp_layer_types=["sparse", "dense", "sparse"]), "mlp_layer_types"),
        (glm_moe_dsa(indexer_types=["full"]), "indexer_types has 1 entries, num_hidden_layers is 3"),
        (glm_moe_dsa(index_topk_pattern="FS"), "index_topk_pattern has 2 entries"),
    ],
)
def test_what_no_model_of_the_family_has_is_refused(config: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        arch_of(config)


def test_v2_has_no_selection_bias() -> None:
    names = random_weights(deepseek_v2())
    assert not [name for name in names if name.endswith("e_score_correction_bias")]


def test_near_architectures_are_refused_by_what_they_have() -> None:
    near = tiny_config(architectures=["AXK1ForCausalLM"])
    with pytest.raises(ConfigError, match=r"post_mlp_layernorm\), which quantkit does not compute") as caught:
        arch_of(near)
    assert "quantkit inspect" in caught.value.hint
    assert "DeepseekV3ForCausalLM" in caught.value.hint
    assert not NOT_COMPUTED.keys() & ARCHS.keys()


def test_an_unknown_name_is_refused_however_alike_its_config_is() -> None:
    with pytest.raises(ConfigError, match=r"architectures is \['OtherForCausalLM'\]; quantkit knows"):
        arch_of(tiny_config(architectures=["OtherForCausalLM"]))


@pytest.mark.parametrize("name", NOT_COMPUTED)
def test_inspect_works_without_the_family(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config())
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(architectures=[name])))
    found = inspect(tmp_path)
    assert any(NOT_COMPUTED[name] in line for line in found.unusual)
    assert found.parameters > 1_000_000


def test_transformers_and_vllm_know_these_names() -> None:
    """The names are no inventions: transformers has most of them."""
    names = set(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    names |= set(transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    ours = {"DeepseekV41ForCausalLM", "KimiK3ForConditionalGeneration", "MistralLarge3ForCausalLM"}  # vLLM's alone
    ours |= {"DeepseekV4ForConditionalGeneration", "Glm5NextForCausalLM", "PanguUltraMoEForCausalLM"}
    ours |= {"SarvamMLAForCausalLM"}
    assert NOT_COMPUTED.keys() - ours - names == set()
