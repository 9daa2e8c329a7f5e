"""GGUF files of DeepSeek V3's relatives that lack a key, and what llama.cpp computes otherwise than the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit import evaluate, verify
from quantkit.arch import arch_of
from quantkit.errors import ConfigError, SourceError
from quantkit.plan.recipe import Recipe
from tests.arch.relatives import deepseek_v2, deepseek_v32, glm_moe_dsa
from tests.convert.jobs import run, write_model, write_text
from tests.convert.test_relatives import SMALL, random_tokens, source_logits
from tests.oracles.llama_cpp import LlamaError, LlamaModel

F32 = {"version": 1, "outputs": [{"name": "f32", "format": "gguf", "preset": "F32"}]}
SHARED = {"index_topk": 100, "indexer_types": ["full", "shared", "full"]}
GROUPED = {"q_lora_rank": 128, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}


def written(folder: Path, config: dict[str, Any]) -> Path:
    """A float32 GGUF of a random model in ``folder``/source."""
    write_model(folder / "source", config)
    write_text(folder / "eval.txt")
    run(folder / "source", Recipe.from_dict(F32), folder / "out")
    (path,) = (folder / "out").rglob("*.gguf")
    return path


def rename_key(path: Path, key: str) -> None:
    """The file without a key: it has another name of the same length."""
    content = path.read_bytes()
    assert content.count(key.encode()) == 1
    path.write_bytes(content.replace(key.encode(), key[:-1].encode() + b"~"))


def score(folder: Path, path: Path) -> float:
    texts = (str(folder / "eval.txt"),)
    scored = evaluate(folder / "source", [path], text=texts, context=64, max_windows_per_file=2)
    return scored.candidates[0].result.overall.kld.mean


@pytest.mark.parametrize("key", ["expert_gating_func", "attention.indexer.top_k", "attention.q_lora_rank"])
def test_deepseek32_needs(key: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    path = written(tmp_path, deepseek_v32(**SMALL))
    rename_key(path, f"deepseek32.{key}")
    with pytest.raises(LlamaError, match=key):
        LlamaModel(path)
    with pytest.raises(SourceError, match=f"lacks deepseek32.{key}: llama.cpp needs it and does not load the file"):
        score(tmp_path, path)
    assert any(f"deepseek32.{key} is missing" in fault.text for fault in verify(path).faults)


def test_glm_dsa_takes_sigmoid_for_granted(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    config = glm_moe_dsa(**SMALL)
    path = written(tmp_path, config)
    rename_key(path, "glm-dsa.expert_gating_func")
    tokens = random_tokens()
    with LlamaModel(path) as model, model.context(tokens.shape[1]) as context:
        found = torch.from_numpy(context.logits(tokens[0].numpy()))
    assert (found - source_logits(tmp_path, config)[0]).abs().max() <= 1e-4
    assert score(tmp_path, path) == pytest.approx(0, abs=1e-5)


def test_glm_dsa_without_the_kinds_of_its_indexers(tmp_path: Path) -> None:
    """llama.cpp would look for indexers that are not there, and ends without a word."""
    path = written(tmp_path, glm_moe_dsa(**SMALL, **SHARED))
    rename_key(path, "glm-dsa.attention.indexer.types")
    with pytest.raises(SourceError, match=r"lacks glm-dsa\.attention\.indexer\.types: llama\.cpp needs it"):
        score(tmp_path, path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (deepseek_v32(index_head_dim=96), "index_head_dim 96 is not twice qk_rope_head_dim 32"),
        (deepseek_v32(indexer_types=["full", "full", "shared"]), "layers share an indexer"),
        (glm_moe_dsa(rope_scaling=deepseek_v32()["rope_scaling"]), "llama.cpp reads none of yarn's mscale for glm-dsa"),
    ],
)
def test_models_that_llama_cpp_would_compute_wrongly(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        arch_of(config).gguf().key_values(mtp=False)


def test_v2_s_groups_are_ranked_otherwise(tmp_path: Path) -> None:
    """By the sum of the best two experts, which is what the plan says."""
    pytest.importorskip("xllamacpp")
    config = deepseek_v2(**SMALL, **GROUPED)
    path, tokens = written(tmp_path, config), random_tokens()
    with LlamaModel(path) as model, model.context(tokens.shape[1]) as context:
        found = torch.from_numpy(context.logits(tokens[0].numpy()))
    assert (found - source_logits(tmp_path, config)[0]).abs().max() > 0.1
    (line,) = arch_of(config).gguf().differences(mtp=True)
    assert line.startswith("llama.cpp ranks the 2 groups of experts by the sum of their two best scores")
    assert not arch_of(deepseek_v2(**SMALL)).gguf().differences(mtp=True)
