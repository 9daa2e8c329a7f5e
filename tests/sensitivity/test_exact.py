"""The pass, layer by layer, gives what one autograd graph of transformers' whole model gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.arch.base import DenseBlock, ExpertBlock
from quantkit.calibrate.dataset import Calibration, token_rows
from quantkit.sensitivity.layer_files import INPUT, file_name, gradient_name
from quantkit.sensitivity.moments import head_blocks, output_metric, output_moments
from tests.arch.grouped import GROUPED
from tests.arch.relatives import deepseek_v2, deepseek_v32, glm4_moe_lite, glm_moe_dsa, kimi_k25
from tests.arch.test_deepseek_v3 import CHECKPOINTS
from tests.arch.test_forward import random_tokens, read_decoded
from tests.oracles import fisher as oracle
from tests.sensitivity.passes import SEED, fisher_pass, new_store, opened_pass
from tests.tiny_models import tiny_config, write_checkpoint, write_shards

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

CLOSE = 1e-4
"""Relative."""
CONFIGS: dict[str, dict[str, Any]] = {
    "V3": tiny_config(),
    "V3, no q_lora": tiny_config(q_lora_rank=None),
    "V3, weights not normalised": tiny_config(norm_topk_prob=False),
    "V3, wide values": tiny_config(v_head_dim=96, qk_nope_head_dim=16),
    "V3, all dense": tiny_config(first_k_dense_replace=3, num_nextn_predict_layers=0),
    "V3, tied": tiny_config(tie_word_embeddings=True),
    "V2-Lite": deepseek_v2(),
    "V2": deepseek_v2(
        q_lora_rank=128, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0
    ),
    "GLM-4.7-Flash": glm4_moe_lite(),
    "V3.2, dense": deepseek_v32(index_topk=200),
    "V3.2, sparse": deepseek_v32(),
    "GLM-5, sparse": glm_moe_dsa(),
    **{name: config() for name, config in GROUPED.items()},
}
RENAMED = {"block_sparse_moe": "mlp", "shared_mlp": "shared_experts", ".w1.": ".gate_proj."}
RENAMED |= {".w3.": ".up_proj.", ".w2.": ".down_proj."}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def in_transformers(name: str) -> str:
    """What a linear is called there in memory, where checkpoints have another name."""
    for stored, loaded in RENAMED.items():
        name = name.replace(stored, loaded)
    return name


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference by the norm."""
    return float((found - expected).norm() / expected.norm())


def check_against_whole_model(source: Path, folder: Path, tokens: Tensor) -> oracle.WholeModel:
    """Scalars of every linear, and the gradients in the files."""
    document = fisher_pass(source, folder, tokens)
    expected = oracle.fisher(source, tokens, SEED)
    linears = {in_transformers(name): one for name, one in document.linears.items()}
    found = {name: one.fisher for name, one in linears.items()}
    scalars = {name: float(g.square().mean(-1).sum()) for name, g in expected.outputs.items() if name in found}
    unseen = {name for name, one in linears.items() if one.tokens == 0}
    assert found.keys() - scalars.keys() == unseen
    # Where the model is sure of every label, 1 - p is what float32 rounds: next to nothing beside other linears.
    nothing = 1e-9 * sum(scalars.values()) / len(scalars)
    assert all(abs(found[name] - value) <= CLOSE * value + nothing for name, value in scalars.items())
    assert all(linears[name].tokens == len(expected.outputs[name]) for name in scalars)
    for layer, number in expected.residual:
        with safetensors.safe_open(folder / file_name(layer), "pt") as file:
            gradient = file.get_tensor(gradient_name(number))
        assert relative(gradient, expected.residual[layer, number]) <= CLOSE
    return expected


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_families(config: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", config, seed=1)
    tokens = random_tokens(config["vocab_size"], 3, 90)
    check_against_whole_model(tmp_path / "model", tmp_path / "pass", tokens)
    with opened_pass(tmp_path / "model", tmp_path / "pass") as (found, _):
        linears = {s.name for s in found.arch.tensors() if s.linear and s.layer is not None and s.layer < 3}
        assert {name for name in linears if "indexer" not in name} == found.document.linears.keys()


def test_nano_and_gradients_of_its_outputs(tmp_path: Path) -> None:
    """A trained model on text. What a later conversion gets of each sublayer is what the whole model's graph has."""
    config, weights = read_decoded(CHECKPOINTS["nano"])
    source, folder = tmp_path / "model", tmp_path / "pass"
    write_shards(source, weights, 1)
    (source / "config.json").write_text(json.dumps(config))
    text = Calibration(data=("builtin:mixed",), tokens=600, sequence_length=300)
    tokens = torch.from_numpy(token_rows(text, CHECKPOINTS["nano"], Path()).tokens).long()
    expected = check_against_whole_model(source, folder, tokens)
    with opened_pass(source, folder) as (found, read):
        heads = head_blocks(found.arch)
        for layer in range(found.arch.n_layers):
            for number, sublayer in enumerate(found.arch.sublayers(layer)):
                with found.sublayer(layer, number, read, new_store, CPU) as gradients:
                    for block in sublayer:
                        if isinstance(block, ExpertBlock):
                            experts = gradients.experts(block)
                            named = [pair for expert in range(block.n_experts) for pair in experts.named(expert)]
                            experts.close()
                        else:
                            assert isinstance(block, DenseBlock)
                            named = list(gradients.dense(block))
                        _check_outputs(named, expected, heads)
            metric = output_metric(found.gradient_after(layer, new_store), CPU)
            after = expected.residual[layer, len(found.arch.sublayers(layer)) - 1].flatten(0, 1)
            assert relative(metric, after.T @ after) <= CLOSE


def _check_outputs(named: list[tuple[str, Tensor]], expected: oracle.WholeModel, heads: dict[str, int]) -> None:
    assert named
    for name, values in named:
        # Experts' tokens rise here; in transformers they come by rank among the chosen, too.
        assert relative(values, expected.outputs[name]) <= CLOSE or ".experts." in name
    for name, moments in output_moments(named, heads).items():
        g = expected.outputs[name].unflatten(1, (heads.get(name, 1), -1)).transpose(0, 1)
        assert moments.n_tokens == len(expected.outputs[name])
        assert relative(moments.sums, g.mT @ g) <= CLOSE


def test_inputs_are_the_residual_stream(tmp_path: Path) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path / "model", config, seed=1)
    tokens = random_tokens(config["vocab_size"], 3, 40)
    fisher_pass(tmp_path / "model", tmp_path / "pass", tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.inference_mode():
        states = model(tokens, output_hidden_states=True).hidden_states
    for layer in range(3):
        with safetensors.safe_open(tmp_path / "pass" / file_name(layer), "pt") as file:
            assert relative(file.get_tensor(INPUT), states[layer]) <= CLOSE


def test_kimi_k25_is_v3_under_other_names(tmp_path: Path) -> None:
    """The language model of Kimi K2.5, whose checkpoint has a vision tower beside it in transformers."""
    config = kimi_k25()
    weights = write_checkpoint(tmp_path / "kimi", config, seed=1)
    text = {**config["text_config"], "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    prefix = "language_model."
    write_shards(tmp_path / "v3", {name.removeprefix(prefix): tensor for name, tensor in weights.items()}, 1)
    (tmp_path / "v3" / "config.json").write_text(json.dumps(text))
    tokens = random_tokens(text["vocab_size"], 3, 90)
    check_against_whole_model(tmp_path / "v3", tmp_path / "pass", tokens)
    found = fisher_pass(tmp_path / "kimi", tmp_path / "own", tokens).linears
    expected = fisher_pass(tmp_path / "v3", tmp_path / "pass", tokens, restart=True).linears
    assert {name.removeprefix(prefix): one for name, one in found.items()} == expected
