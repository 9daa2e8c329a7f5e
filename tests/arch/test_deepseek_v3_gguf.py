"""Names, halves and metadata of architecture deepseek2, against gguf-py's name map and the C loader's rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.arch.deepseek_v3_config import DeepseekV3Config
from quantkit.arch.deepseek_v3_gguf import (
    differences,
    key_values,
    stored_name,
)
from quantkit.errors import ConfigError, SourceError
from tests.tiny_models import YARN, tiny_config

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = ("nano-deepseek-v3", "deepseek-v3-671b")


def example(model: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / model / "config.json").read_text())


def config_of(**changes: Any) -> DeepseekV3Config:
    return DeepseekV3Config.of(tiny_config(**changes))


def part_names(arch: DeepseekV3) -> dict[str, tuple[str, ...]]:
    """Name of a linear -> names of the parts that are stored in its place."""
    names: dict[str, tuple[str, ...]] = {}
    for part in arch.parts().values():
        names[part.whole] = (*names.get(part.whole, ()), part.name)
    return names


def gguf_py_maps(n_layers: int) -> list[gguf.TensorNameMap]:
    """The map of deepseek2 lacks the MTP names; those of GLM 4.5 are the same in llama.cpp (one table for all)."""
    families = (gguf.MODEL_ARCH.DEEPSEEK2, gguf.MODEL_ARCH.GLM4_MOE)
    return [gguf.get_tensor_name_map(family, n_layers) for family in families]


def names_by_gguf_py(name: str, maps: list[gguf.TensorNameMap]) -> set[str]:
    """What gguf-py's map makes of an official name, after what the converter does to it: experts stacked, kv_b cut."""
    name = re.sub(r"\.experts\.\d+\.", ".experts.", name)
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    if name.endswith("kv_b_proj.weight"):
        plain = [name.replace("kv_b_proj", part) for part in ("k_b_proj", "v_b_proj")]
    else:
        plain = [name]
    found = {next((hit for names in maps if (hit := names.get_name(p, (".weight", ".bias")))), None) for p in plain}
    return {hit for hit in found if hit}


class TestNames:
    @pytest.mark.parametrize("model", MODELS)
    def test_every_tensor_is_called_as_in_gguf_py(self, model: str) -> None:
        arch = DeepseekV3(example(model))
        maps = gguf_py_maps(arch.n_layers + arch.n_mtp_layers)
        parts = part_names(arch)
        unmapped: set[str] = set()
        for spec in arch.tensors():
            if spec.expert not in (None, 0):
                continue
            expected = names_by_gguf_py(spec.name, maps)
            if not expected:
                unmapped.add(spec.name.split(".", 3)[-1])
                continue
            assert {stored_name(part)[0] for part in parts.get(spec.name, (spec.name,))} == expected
        assert unmapped <= {"embed_tokens.weight", "enorm.weight", "hnorm.weight"}

    def test_mtp_names_of_the_c_loader(self) -> None:
        assert stored_name("model.layers.61.enorm.weight")[0] == "blk.61.nextn.enorm.weight"
        assert stored_name("model.layers.61.hnorm.weight")[0] == "blk.61.nextn.hnorm.weight"
        assert stored_name("model.layers.61.embed_tokens.weight")[0] == "blk.61.nextn.embed_tokens.weight"

    @pytest.mark.parametrize("model", MODELS)
    def test_every_place_is_taken_once(self, model: str) -> None:
        arch = DeepseekV3(example(model))
        parts = part_names(arch)
        places = [stored_name(part) for spec in arch.tensors() for part in parts.get(spec.name, (spec.name,))]
        assert len(set(places)) == len(places)
        n_stacked = sum(1 for _, place in places if place == 0)
        assert sum(1 for _, place in places if place is not None) == n_stacked * arch.config.n_routed_experts

    def test_v3_without_mtp_has_1086_tensors(self) -> None:
        arch = DeepseekV3(example("deepseek-v3-671b"))
        main = [spec.name for spec in arch.tensors() if spec.layer is None or spec.layer < arch.n_layers]
        parts = part_names(arch)
        assert len({stored_name(part)[0] for name in main for part in parts.get(name, (name,))}) == 1086

    def test_place_in_the_stack(self) -> None:
        assert stored_name("model.layers.3.mlp.experts.255.down_proj.weight") == ("blk.3.ffn_down_exps.weight", 255)
        assert stored_name("model.norm.weight") == ("output_norm.weight", None)
        assert stored_name("model.layers.0.self_attn.kv_b_proj.weight:k") == ("blk.0.attn_k_b.weight", None)
        assert stored_name("model.layers.0.self_attn.kv_b_proj.weight") == ("blk.0.attn_kv_b.weight", None)

    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.0.self_attn.q_a_proj.weight:k",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.00.input_layernorm.weight",
            "model.layers.1" + "0" * 5000 + ".input_layernorm.weight",
            "model.layers.0.mlp.experts.-1.up_proj.weight",
            "model.layers.0.mlp.experts.0.up_proj.weight_scale",
            "",
        ],
    )
    def test_unknown_names_are_refused(self, name: str) -> None:
        with pytest.raises(SourceError, match="has no place for this tensor"):
            stored_name(name)


class TestKeyValues:
    def test_v3(self) -> None:
        values = key_values(DeepseekV3Config.of(example("deepseek-v3-671b")), mtp=False)
        general = {"general.architecture": "deepseek2", "general.type": "model"}
        assert values == general | {
            f"deepseek2.{key}": value
            for key, value in {
                "block_count": 61,
                "context_length": 163840,
                "embedding_length": 7168,
                "feed_forward_length": 18432,
                "attention.head_count": 128,
                "attention.head_count_kv": 1,
                "attention.layer_norm_rms_epsilon": 1e-6,
                "attention.q_lora_rank": 1536,
                "attention.kv_lora_rank": 512,
                "attention.key_length": 576,
                "attention.value_length": 512,
                "attention.key_length_mla": 192,
                "attention.value_length_mla": 128,
                "leading_dense_block_count": 3,
                "vocab_size": 129280,
                "expert_count": 256,
                "expert_used_count": 8,
                "expert_shared_count": 1,
                "expert_feed_forward_length": 2048,
                "expert_group_count": 8,
                "expert_group_used_count": 4,
                "expert_weights_scale": 2.5,
                "expert_weights_norm": True,
                "expert_gating_func": 2,
                "rope.dimension_count": 64,
                "rope.freq_base": 10000.0,
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 40.0,
                "rope.scaling.original_context_length": 4096,
                "rope.scaling.yarn_beta_fast": 32.0,
                "rope.scaling.yarn_beta_slow": 1.0,
                "rope.scaling.yarn_log_multiplier": 0.1,
            }.items()
        }

    def test_python_types_carry_the_stored_types(self) -> None:
        values = key_values(DeepseekV3Config.of(example("deepseek-v3-671b")), mtp=False)
        floats = {key.removeprefix("deepseek2.") for key, value in values.items() if type(value) is float}
        assert floats == {
            "attention.layer_norm_rms_epsilon",
            "expert_weights_scale",
            "rope.freq_base",
            "rope.scaling.factor",
            "rope.scaling.yarn_beta_fast",
            "rope.scaling.yarn_beta_slow",
            "rope.scaling.yarn_log_multiplier",
        }
        assert [key for key, value in values.items() if type(value) is bool] == ["deepseek2.expert_weights_norm"]

    def test_keys_are_gguf_py_s(self) -> None:
        known = {
            value.replace("{arch}", "deepseek2")
            for group in (gguf.Keys.General, gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
            for value in vars(group).values()
            if isinstance(value, str)
        }
        assert key_values(config_of(), mtp=True).keys() <= known

    def test_mtp(self) -> None:
        values = key_values(config_of(), mtp=True)
        assert (values["deepseek2.block_count"], values["deepseek2.nextn_predict_layers"]) == (4, 1)
        assert "deepseek2.nextn_predict_layers" not in key_values(config_of(), mtp=False)

    def test_without_q_lora_the_rank_is_written_as_zero(self) -> None:
        assert key_values(config_of(q_lora_rank=None), mtp=False)["deepseek2.attention.q_lora_rank"] == 0

    @pytest.mark.parametrize("groups", [(1, 1), (4, 4)])
    def test_no_group_keys_where_grouping_chooses_nothing(self, groups: tuple[int, int]) -> None:
        values = key_values(config_of(n_group=groups[0], topk_group=groups[1]), mtp=False)
        assert not [key for key in values if "expert_group" in key]

    def test_no_norm_key_without_norm_and_no_scaling_keys_without_yarn(self) -> None:
        values = key_values(config_of(norm_topk_prob=False, rope_scaling=None), mtp=False)
        assert "deepseek2.expert_weights_norm" not in values
        assert not [key for key in values if "rope.scaling" in key]

    def test_yarn_of_v2_lite(self) -> None:
        scaling = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
        values = key_values(config_of(rope_scaling=scaling), mtp=False)
        assert values["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)

    @pytest.mark.parametrize(
        ("changes", "found"),
        [
            ({"rope_interleave": False}, "rope_interleave is false"),
            ({"rope_scaling": {**YARN, "mscale": 0.5}}, "mscale 0.5, mscale_all_dim 1.0"),
            ({"rope_scaling": {**YARN, "mscale": None, "mscale_all_dim": None}}, "mscale None"),
            ({"rope_scaling": {**YARN, "mscale": 0.0, "mscale_all_dim": 0.0}}, "mscale 0.0"),
            ({"rope_scaling": {**YARN, "attention_factor": 1.5}}, "attention_factor 1.5"),
            ({"rope_scaling": {**YARN, "truncate": False}}, "truncate is false"),
            ({"num_hidden_layers": 27}, "num_hidden_layers 27 with q_lora_rank 128"),
            ({"num_hidden_layers": 26}, "num_hidden_layers 26 with q_lora_rank 128"),
            ({"num_hidden_layers": 48, "vocab_size": 128256}, "num_hidden_layers 48"),
            ({"num_hidden_layers": 600}, "at most 512"),
            ({"n_routed_experts": 1028, "n_group": 4}, "at most 1024"),
        ],
    )
    def test_what_llama_cpp_would_misread_is_refused(self, changes: dict[str, Any], found: str) -> None:
        with pytest.raises(ConfigError) as caught:
            key_values(config_of(**changes), mtp=False)
        assert found in caught.value.message
        assert "\n" not in str(caught.value)

    def test_lite_models_without_q_lora_pass(self) -> None:
        values = key_values(config_of(num_hidden_layers=27, q_lora_rank=None), mtp=False)
        assert values["deepseek2.block_count"] == 27

    @pytest.mark.parametrize(
        ("changes", "found"),
        [
            ({"num_nextn_predict_layers": 0}, "num_nextn_predict_layers is 0"),
            ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
            ({"q_lora_rank": None}, "q_lora_rank is null"),
        ],
    )
    def test_mtp_that_llama_cpp_cannot_run(self, changes: dict[str, Any], found: str) -> None:
        key_values(config_of(**changes), mtp=False)
        with pytest.raises(ConfigError, match=found):
            key_values(config_of(**changes), mtp=True)

    def test_another_epsilon_is_told(self) -> None:
        assert differences(config_of(), mtp=True) == ()
        (line,) = differences(config_of(rms_norm_eps=1e-5), mtp=True)
        assert "1e-05" in line

    def test_betas_that_llama_cpp_does_not_read_are_told(self) -> None:
        """Kimi K2 has 1 and 1. Where they move no frequency there is nothing to tell."""
        assert differences(config_of(rope_scaling={**YARN, "beta_fast": 64}), mtp=True) == ()
        (line,) = differences(config_of(rope_scaling={**YARN, "beta_fast": 1, "factor": 32}), mtp=True)
        assert line.endswith("start it with --yarn-beta-fast 1 --yarn-beta-slow 1.")
