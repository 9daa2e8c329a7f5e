"""Keys of config.json that one family needs in vLLM and transformers does without: two folders of random weights did
not load in vLLM 0.24 without them, and did with them (benchmarks/vllm)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.arch.relatives import glm4_moe_lite, glm_moe_dsa
from tests.tiny_models import write_checkpoint
from tests.verify.breaking import faults


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [(glm4_moe_lite(), "first_k_dense_replace", 1), (glm_moe_dsa(), "topk_method", "noaux_tc")],
)
def test_a_key_that_vllm_needs(config: dict[str, Any], key: str, value: object, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config)
    assert f"config.json: {key} is missing; vLLM ends with" in faults(tmp_path)
    assert "is missing" not in faults(tmp_path, "transformers")
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    assert f"{key} is missing" not in faults(tmp_path)
