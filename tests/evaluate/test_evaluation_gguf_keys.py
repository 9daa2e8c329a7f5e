"""GGUF files of other converters: keys that are missing, and kv_b_proj in one tensor. What `evaluate` computes,
llama.cpp computes; what it refuses, llama.cpp refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.documents.evaluation import Evaluation
from quantkit.errors import SourceError
from tests.evaluate.test_evaluation import (
    NANO,
    assert_same_scores,
    config_of,
    expected_scores,
    llama_logits,
    run,
    scores_of,
    windows_of,
)
from tests.oracles import gguf_writer
from tests.oracles.llama_cpp import LlamaError

COMPUTED = {
    "expert_group_count": "0 (config.json: 4)",
    "expert_weights_scale": "1 (config.json: 2.5)",
    "expert_weights_norm": "false (config.json: true)",
    "expert_gating_func": "1 (config.json: 2)",
    "rope.scaling.type": "linear (config.json: yarn)",
    "rope.scaling.factor": "1 (config.json: 4)",
    "rope.scaling.original_context_length": "2048 (config.json: 512)",
    "rope.scaling.yarn_log_multiplier": "0 (config.json: 0.1)",
}
UNCHANGED = ("attention.value_length", "rope.freq_base", "rope.scaling.yarn_beta_fast")
REFUSED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "leading_dense_block_count",
    "attention.head_count",
    "attention.key_length_mla",
    "attention.q_lora_rank",
    "attention.kv_lora_rank",
    "attention.layer_norm_rms_epsilon",
    "expert_shared_count",
    "expert_feed_forward_length",
)
ABORTED = (
    "attention.head_count_kv",
    "attention.key_length",
    "expert_count",
    "expert_used_count",
    "rope.dimension_count",
)
"""llama.cpp ends the process here, or when the first context is made; seen in October 2026."""
WEIGHTS = gguf_writer.read_weights(NANO)


def keys_of_nano() -> dict[str, Any]:
    return {**gguf_writer.metadata(config_of(NANO)), "tokenizer.ggml.model": "no_vocab"}


def write(path: Path, keys: Mapping[str, Any], *, whole_kv_b: bool = False) -> Path:
    gguf_writer.write(path, keys, tensors(whole_kv_b))
    return path


def tensors(whole_kv_b: bool) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in gguf_writer.tensors(config_of(NANO), WEIGHTS):
        if not whole_kv_b or not name.endswith(("attn_k_b.weight", "attn_v_b.weight")):
            yield name, tensor
        elif name.endswith("attn_k_b.weight"):
            layer = name.split(".")[1]
            whole = WEIGHTS[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
            yield f"blk.{layer}.attn_kv_b.weight", whole


def without(*left_out: str) -> dict[str, Any]:
    return {key: value for key, value in keys_of_nano().items() if key.removeprefix("deepseek2.") not in left_out}


def old_keys() -> dict[str, Any]:
    """As converters wrote them until April 2025: heads with keys and values of their own."""
    config = config_of(NANO)
    return without("attention.key_length_mla", "attention.value_length_mla") | {
        "deepseek2.attention.head_count_kv": config["num_attention_heads"],
        "deepseek2.attention.key_length": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "deepseek2.attention.value_length": config["v_head_dim"],
    }


def scored(*candidates: Path) -> Evaluation:
    return run(*candidates, context=96, noise_floor=False)


def expected(candidate: Path, reference: Path) -> Any:
    tokens = windows_of()[0]
    return scores_of(expected_scores(llama_logits(reference, tokens), llama_logits(candidate, tokens), tokens))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that lacks nothing."""
    return write(tmp_path_factory.mktemp("whole") / "whole.gguf", keys_of_nano())


def test_a_missing_key_means_what_llama_cpp_takes_for_it(tmp_path: Path, whole: Path) -> None:
    pytest.importorskip("xllamacpp")
    paths = [write(tmp_path / f"{key}.gguf", without(key)) for key in COMPUTED]
    for candidate, path, said in zip(scored(*paths).candidates, paths, COMPUTED.items(), strict=True):
        (note,) = candidate.model.notes
        assert note == f"Lacks deepseek2.{said[0]}: computed as llama.cpp does, with {said[1]}."
        assert candidate.result.overall.kld.mean > 1e-3
        assert_same_scores(candidate.result.overall, expected(path, whole))


@pytest.mark.parametrize("more", ["yarn_log_multiplier", "original_context_length"])
def test_without_type_and_another_key_of_scaling(more: str, tmp_path: Path, whole: Path) -> None:
    pytest.importorskip("xllamacpp")
    path = write(tmp_path / "part.gguf", without("rope.scaling.type", f"rope.scaling.{more}"))
    (candidate,) = scored(path).candidates
    assert any("rope.scaling.type: computed as llama.cpp does, with linear" in note for note in candidate.model.notes)
    assert_same_scores(candidate.result.overall, expected(path, whole))


def test_missing_keys_that_change_nothing(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{key}.gguf", without(key)) for key in UNCHANGED]
    for candidate in scored(*paths).candidates:
        assert candidate.model.notes == ()
        assert candidate.result.overall.kld.max < 1e-6


@pytest.mark.parametrize("key", [*REFUSED, *ABORTED])
def test_what_llama_cpp_does_not_load_is_refused(key: str, tmp_path: Path) -> None:
    path = write(tmp_path / "part.gguf", without(key))
    with pytest.raises(SourceError, match=rf"part\.gguf: lacks deepseek2\.{key}: llama\.cpp ") as caught:
        scored(path)
    assert "Write the key into the file" in caught.value.hint
    if key in REFUSED:
        with pytest.raises(LlamaError):
            llama_logits(path, torch.zeros(1, 2, dtype=torch.long))


def test_kv_b_proj_in_one_tensor(tmp_path: Path, whole: Path) -> None:
    """The numbers of the file with the two parts; llama.cpp runs it too."""
    old = write(tmp_path / "old.gguf", old_keys(), whole_kv_b=True)
    (candidate,) = scored(old).candidates
    assert candidate.model.notes == ()
    assert candidate.result.overall.kld.max < 1e-6
    tokens = windows_of()[0][:1]
    assert torch.allclose(llama_logits(old, tokens), llama_logits(whole, tokens), atol=1e-3)


def test_keys_and_tensors_of_different_times(tmp_path: Path) -> None:
    """By the head sizes of MLA llama.cpp decides which tensors it looks for."""
    for keys, whole_kv_b, said in (
        (keys_of_nano(), True, "lacks the tensor blk.0.attn_k_b.weight"),
        (old_keys(), False, "lacks the tensor blk.0.attn_kv_b.weight"),
    ):
        path = write(tmp_path / "mixed.gguf", keys, whole_kv_b=whole_kv_b)
        with pytest.raises(SourceError, match=said) as caught:
            scored(path)
        assert caught.value.hint == f"See: quantkit inspect {path}"
        with pytest.raises(LlamaError):
            llama_logits(path, torch.zeros(1, 2, dtype=torch.long))
