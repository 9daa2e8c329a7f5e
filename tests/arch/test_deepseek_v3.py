"""The family's config checks and its table of tensors."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantkit.arch import ARCHS, arch_of
from quantkit.arch.base import DenseBlock, ModelArch
from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.errors import ConfigError
from quantkit.tensors import Role
from tests.counted import calls
from tests.tiny_models import YARN, tiny_config

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("QUANTKIT_SHARED", ROOT.parent / "shared"))
CHECKPOINTS = {
    "nano": ROOT / "examples" / "nano-deepseek-v3",
    "tiny": SHARED / "models" / "tiny-deepseek-v3",
    "tiny-fp8": SHARED / "models" / "tiny-deepseek-v3-fp8",
}


def v3_config() -> dict[str, Any]:
    return json.loads((ROOT / "examples" / "deepseek-v3-671b" / "config.json").read_text())


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return -(-shape[0] // 128), -(-shape[1] // 128)


class TestTableOfDeepseekV3:
    """The figures are those of the official release."""

    specs = list(arch_of(v3_config()).tensors())

    def test_parameter_counts(self) -> None:
        main = sum(math.prod(spec.shape) for spec in self.specs if spec.role is not Role.MTP)
        mtp = sum(math.prod(spec.shape) for spec in self.specs if spec.role is Role.MTP)
        assert main == 671_026_419_200
        assert mtp == 13_463_426_304

    def test_tensor_counts(self) -> None:
        scales = [spec for spec in self.specs if spec.linear]
        assert len({spec.name for spec in self.specs}) == len(self.specs) == 46_183
        assert len(self.specs) + len(scales) == 91_991
        assert sum(spec.role is not Role.MTP for spec in [*self.specs, *scales]) == 90_427

    def test_bytes_of_the_fp8_release(self) -> None:
        nbytes = 0
        for spec in self.specs:
            if spec.linear:
                nbytes += math.prod(spec.shape) + 4 * math.prod(scale_shape(spec.shape))
            else:
                nbytes += math.prod(spec.shape) * (4 if spec.float32 else 2)
        assert nbytes == 688_574_839_360

    def test_is_quick(self) -> None:
        """A tenth of a second."""
        arch = arch_of(v3_config())
        assert calls(lambda: list(arch.tensors())) < 20 * 46_183

    def test_shapes_that_are_easily_confused(self) -> None:
        shapes = {spec.name: spec.shape for spec in self.specs}
        attention = "model.layers.5.self_attn."
        assert shapes[f"{attention}q_b_proj.weight"] == (24576, 1536)
        assert shapes[f"{attention}kv_a_proj_with_mqa.weight"] == (576, 7168)
        assert shapes[f"{attention}kv_b_proj.weight"] == (32768, 512)
        assert shapes[f"{attention}o_proj.weight"] == (7168, 16384)
        assert shapes["model.layers.2.mlp.down_proj.weight"] == (7168, 18432)
        assert shapes["model.layers.3.mlp.experts.255.down_proj.weight"] == (7168, 2048)
        assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)


def test_planning_needs_no_torch() -> None:
    code = (
        "import json, sys; from quantkit.arch import arch_of; "
        f"arch = arch_of(json.load(open({str(ROOT / 'examples' / 'deepseek-v3-671b' / 'config.json')!r}))); "
        "list(arch.tensors()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=600)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_names_cover_the_index_exactly(name: str) -> None:
    folder = CHECKPOINTS[name]
    if not (folder / "model.safetensors.index.json").exists():
        pytest.skip(f"{name} is not here")
    held = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
    specs = list(arch_of(json.loads((folder / "config.json").read_text())).tensors())
    scales = (
        {spec.name + "_scale_inv" for spec in specs if spec.linear} if any("scale_inv" in n for n in held) else set()
    )
    assert held == {spec.name for spec in specs} | scales


CONFIGS = {
    "all features": {},
    "no q_lora": {"q_lora_rank": None},
    "no mtp": {"num_nextn_predict_layers": 0},
    "two mtp layers": {"num_nextn_predict_layers": 2},
    "two shared experts": {"n_shared_experts": 2},
    "all dense": {"first_k_dense_replace": 3},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_each_linear_is_in_one_input_group_or_expert(changes: dict[str, Any]) -> None:
    arch = DeepseekV3(tiny_config(**changes))
    linears = sorted(spec.name for spec in arch.tensors() if spec.linear)
    found = linears_of_blocks(arch, arch.n_layers + arch.n_mtp_layers)
    assert sorted(name for name in found if name not in arch.parts()) == linears
    assert sorted(name for name in found if name in arch.parts()) == sorted(arch.parts())


def linears_of_blocks(arch: ModelArch, n_layers: int) -> list[str]:
    names: list[str] = []
    for layer in range(n_layers):
        for block in (block for sublayer in arch.sublayers(layer) for block in sublayer):
            names += block.linears
            if isinstance(block, DenseBlock):
                assert [group.linears for group in block.stages[-1].groups] == [(block.output,)]
    return names


def test_roles() -> None:
    arch = DeepseekV3(tiny_config())
    roles = {spec.name: spec.role for spec in arch.tensors()}
    assert roles[arch.embed] is Role.EMBED
    assert roles[arch.lm_head] is Role.LM_HEAD
    assert roles["model.layers.0.mlp.up_proj.weight"] is Role.MLP
    assert roles["model.layers.1.mlp.gate.e_score_correction_bias"] is Role.ROUTER
    assert roles["model.layers.1.mlp.experts.11.up_proj.weight"] is Role.EXPERT
    assert roles["model.layers.1.mlp.shared_experts.up_proj.weight"] is Role.SHARED_EXPERT
    assert {spec.role for spec in arch.tensors() if spec.layer == 3} == {Role.MTP}
    assert [spec.name for spec in arch.tensors() if spec.float32] == [
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2, 3)
    ]
    assert {spec.expert for spec in arch.tensors() if ".experts." in spec.name} == set(range(12))


def test_tied_embeddings_have_no_head() -> None:
    arch = DeepseekV3(tiny_config(tie_word_embeddings=True))
    assert arch.lm_head == arch.embed
    assert "lm_head.weight" not in {spec.name for spec in arch.tensors()}


def test_rope_of_transformers_5() -> None:
    config = tiny_config()
    del config["rope_scaling"], config["rope_theta"]
    yarn = {**YARN, "rope_type": "yarn"}
    del yarn["type"]
    arch = DeepseekV3({**config, "rope_parameters": {**yarn, "rope_theta": 50000.0}})
    assert arch.config.rope == DeepseekV3(tiny_config(rope_theta=50000)).config.rope
    plain = DeepseekV3({**config, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    assert plain.config.rope.yarn is None
    assert plain.config.rope.theta == 500


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "softmax": ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    "greedy": ({"topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy'"),
    "negative": ({"hidden_size": -1}, "hidden_size is -1"),
    "text": ({"hidden_size": "7168\n"}, r"hidden_size is '7168\n'"),
    "huge": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "true": ({"n_group": True}, "n_group is True"),
    "nan": ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    "groups": ({"n_group": 5}, "n_routed_experts 12 is not a multiple of n_group 5"),
    "small groups": ({"n_group": 12}, "n_group 12 leaves one expert per group"),
    "too many groups": ({"topk_group": 5}, "topk_group 5 is larger than n_group 4"),
    "too many experts": ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than the 6"),
    "grouped queries": ({"num_key_value_heads": 2}, "num_key_value_heads 2 is not num_attention_heads 4"),
    "dense": ({"first_k_dense_replace": 4}, "first_k_dense_replace 4 is more than num_hidden_layers 3"),
    "odd": ({"qk_rope_head_dim": 31}, "qk_rope_head_dim 31 is odd"),
    "frequency": ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    "linear rope": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type is 'linear'"),
    "rope": ({"rope_scaling": [1]}, "rope_scaling is [1]"),
    "factor": ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
    "bias": ({"attention_bias": True}, "attention_bias is True"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arch_of(tiny_config(**changes))
    assert message in caught.value.message
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "q_lora_rank", "n_group", "scoring_func", "rms_norm_eps"])
def test_missing_key(key: str) -> None:
    config = tiny_config()
    del config[key]
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        arch_of(config)


def test_config_written_by_transformers_5_gets_a_hint() -> None:
    config = tiny_config()
    del config["scoring_func"], config["topk_method"]
    with pytest.raises(ConfigError) as caught:
        arch_of(config)
    assert "transformers 5 drops" in caught.value.hint


@pytest.mark.parametrize("architectures", [["PhiForCausalLM"], [], None, "DeepseekV3", [3], {}])
def test_unknown_architecture_names_the_known(architectures: object) -> None:
    with pytest.raises(ConfigError) as caught:
        arch_of({**tiny_config(), "architectures": architectures})
    assert all(name in str(caught.value) for name in ARCHS)
    assert "\n" not in str(caught.value)
