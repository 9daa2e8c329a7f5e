"""All families but V3 itself, through a whole conversion: what llama.cpp and transformers compute from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit import evaluate, inspect, verify
from quantkit.arch import arch_of
from quantkit.plan.recipe import Recipe
from tests.arch.grouped import GROUPED
from tests.arch.relatives import deepseek_v2, deepseek_v32, glm4_moe_lite, glm_moe_dsa, kimi_k25
from tests.convert.jobs import INT4_GPTQ, LINEARS, decoded, run, write_model, write_text
from tests.oracles.forward import logits
from tests.oracles.llama_cpp import LlamaModel
from tests.tiny_models import write_shards

SMALL = {"vocab_size": 1024, "n_routed_experts": 8, "num_experts_per_tok": 2}
ROUTED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
SHARED = {"index_topk": 100, "indexer_types": ["full", "shared", "full"]}
FAMILIES: dict[str, Callable[[], dict[str, Any]]] = {
    "deepseek_v2": partial(deepseek_v2, **SMALL),
    "glm4_moe_lite": partial(glm4_moe_lite, **SMALL, first_k_dense_replace=1),
    "kimi_k25": partial(kimi_k25, **SMALL),
    "deepseek_v32": partial(deepseek_v32, **SMALL),
    "deepseek_v32, dense": partial(deepseek_v32, **SMALL, index_topk=100),
    "deepseek_v32, MTP": partial(deepseek_v32, **SMALL, num_nextn_predict_layers=1),
    "glm_moe_dsa": partial(glm_moe_dsa, **SMALL, **ROUTED),
    "glm_moe_dsa, shared": partial(glm_moe_dsa, **SMALL, **ROUTED, **SHARED),
    **GROUPED,
}
VISION = {
    "vision_tower.encoder.final_layernorm.weight": torch.ones(64, dtype=torch.bfloat16),
    "mm_projector.pre_norm.bias": torch.zeros(64),
}


@pytest.fixture(scope="module", params=FAMILIES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Source and outputs of one conversion: int4 by GPTQ in compressed-tensors, and a float32 GGUF."""
    folder = tmp_path_factory.mktemp("family")
    config = FAMILIES[request.param]()
    weights = write_model(folder / "source", config)
    if request.param == "kimi_k25":
        write_shards(folder / "source", {**weights, **VISION})
    write_text(folder / "calibration.txt")
    rules = [{"match": "role:mtp", "drop": True}] * bool(config.get("num_nextn_predict_layers"))
    rules += [{"match": LINEARS, **INT4_GPTQ}, {"match": "*", "keep": "source"}]
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "calibration": {"data": ["calibration.txt"], "tokens": 256, "sequence_length": 32, "min_expert_tokens": 16},
            "outputs": [
                {"name": "int4", "format": "compressed-tensors", "rules": rules},
                {"name": "f32", "format": "gguf", "preset": "F32", "mtp": "keep"},
            ],
        }
    )
    run(folder / "source", recipe, folder / "out")
    return folder, config


def random_tokens() -> torch.Tensor:
    return torch.randint(4, 260, (1, 100), generator=torch.Generator().manual_seed(5))


def source_logits(folder: Path, config: dict[str, Any]) -> torch.Tensor:
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "source").glob("*.safetensors")):
        weights.update(load_file(file))
    with torch.inference_mode():
        return logits(arch_of(config), lambda name: weights[name].float(), random_tokens())


def test_llama_cpp_computes_the_same(converted: tuple[Path, dict[str, Any]]) -> None:
    pytest.importorskip("xllamacpp")
    folder, config = converted
    (path,) = (folder / "out").rglob("*f32*.gguf")
    tokens = random_tokens()
    with LlamaModel(path) as model, model.context(tokens.shape[1]) as context:
        found = torch.from_numpy(context.logits(tokens[0].numpy()))
    expected = source_logits(folder, config)[0]
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= 1e-4


def test_verify_finds_no_fault_in_gguf(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = converted
    assert not verify(folder / "out" / "f32").faults


def test_an_evaluation_takes_the_gguf_for_the_same_model(converted: tuple[Path, dict[str, Any]]) -> None:
    """Read back as llama.cpp reads it, key by key, indexers and their kinds included."""
    folder, _ = converted
    (folder / "eval.txt").write_text((folder / "calibration.txt").read_text())
    scored = evaluate(
        folder / "source",
        [folder / "out" / "f32"],
        text=(str(folder / "eval.txt"),),
        context=64,
        max_windows_per_file=2,
    )
    assert scored.candidates[0].result.overall.kld.mean == pytest.approx(0, abs=1e-5)


def test_transformers_loads_the_int4_checkpoint(converted: tuple[Path, dict[str, Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    folder, config = converted
    out = folder / "out" / "int4"
    kind = transformers.AutoModelForImageTextToText if "text_config" in config else transformers.AutoModelForCausalLM
    model, loaded = kind.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    vision = ("model.vision_tower.", "model.mm_projector.")  # the test's are none that fit
    assert all(name.startswith(vision) for name in loaded["missing_keys"])
    assert not loaded["unexpected_keys"]
    for parameter in model.parameters():  # experts stay in the dtype of their scales
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    weights = {
        name: weight.bfloat16().float() if ".experts." in name else weight.float()
        for name, weight in decoded(out).items()
    }
    with torch.inference_mode():
        expected = model.eval()(input_ids=random_tokens()).logits
        found = logits(arch_of(config), weights.__getitem__, random_tokens())
    assert (found - expected).abs().max() <= 1e-4
    assert (found - source_logits(folder, config)).abs().max() > 1e-3  # it is quantised


def test_vision_is_carried(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, config = converted
    weights = decoded(folder / "out" / "int4")
    carried = {name: tensor for name, tensor in weights.items() if name in VISION}
    assert len(carried) == (len(VISION) if "text_config" in config else 0)
    for name, tensor in carried.items():
        assert tensor.dtype == VISION[name].dtype
        assert torch.equal(tensor, VISION[name])


def test_a_section_inside_text_config_is_read(converted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Where Kimi's own releases have it."""
    folder, config = converted
    if "text_config" not in config:
        pytest.skip("this family has no text_config")
    shutil.copytree(folder / "out" / "int4", tmp_path / "int4")
    (tmp_path / "int4" / "quantkit.json").unlink()
    place = tmp_path / "int4" / "config.json"
    document = json.loads(place.read_text())
    document["text_config"]["quantization_config"] = document.pop("quantization_config")
    place.write_text(json.dumps(document))
    assert not verify(tmp_path / "int4").faults
    assert inspect(tmp_path / "int4").quantization == "compressed-tensors"


def test_verify_finds_no_fault(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = converted
    found = verify(folder / "out" / "int4")
    assert not found.faults
