"""What is true of one family's releases alone: keys of config.json that vLLM 0.24 needs and transformers does without
(folders of random weights did not load without them, or gave other logits), and targets as Kimi's own int4 releases
write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.arch.relatives import KIMI_TEXT, glm4_moe_lite, glm_moe_dsa, kimi_k25
from tests.convert.jobs import recipe_of, run, write_model
from tests.tiny_models import tiny_config, write_checkpoint
from tests.verify.breaking import Config, Tensors, broken, faults, group, section

SMALL = {"vocab_size": 1024, "n_routed_experts": 8, "num_experts_per_tok": 2}
EXPERTS = ("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*")
"""``ignore`` of Kimi K2-Thinking: neither the router nor language_model.lm_head is in it."""


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (glm4_moe_lite(), "first_k_dense_replace", 1),
        (glm_moe_dsa(), "topk_method", "noaux_tc"),
        (glm_moe_dsa(), "scoring_func", "sigmoid"),
    ],
)
def test_a_key_that_vllm_needs(config: dict[str, Any], key: str, value: object, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config)
    assert f"config.json: {key} is missing; vLLM " in faults(tmp_path)
    assert "is missing" not in faults(tmp_path, "transformers")
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    assert f"{key} is missing" not in faults(tmp_path)


@pytest.mark.parametrize(
    "config", [tiny_config(model_type="kimi_k2", **{**KIMI_TEXT, **SMALL}), kimi_k25(**SMALL)], ids=["k2", "k2.5"]
)
def test_a_class_takes_no_router_and_no_head(config: dict[str, Any], tmp_path: Path) -> None:
    def as_released(_: Tensors, written: Config) -> None:
        group(written)["targets"] = ["Linear"]
        section(written)["ignore"] = list(EXPERTS)

    int4 = {"scheme": {"kind": "int", "bits": 4, "group_size": 32}, "method": {"kind": "rtn"}}
    write_model(tmp_path / "model", config)
    run(tmp_path / "model", recipe_of({"match": "role:expert", **int4}, tokens=None), tmp_path / "out")
    released = broken(tmp_path / "out", tmp_path / "released", as_released)
    assert not faults(released)
    assert not faults(released, "transformers")

    def named(_: Tensors, written: Config) -> None:
        group(written)["targets"].append(r"re:.*mlp\.gate$")

    assert "vLLM reads it only unquantised" in faults(broken(released, tmp_path / "named", named))
