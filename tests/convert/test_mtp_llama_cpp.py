"""MTP layers that are kept in GGUF, in llama.cpp: what its draft graph computes, and that its server drafts with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantkit import plan
from quantkit.plan.recipe import Recipe
from tests.arch.grouped import GROUPED
from tests.arch.relatives import deepseek_v32, glm4_moe_lite, glm_moe_dsa
from tests.arch.test_mtp import drafted
from tests.convert.jobs import run, write_model
from tests.oracles.llama_mtp import draft_logits
from tests.tiny_models import tiny_config

xllamacpp = pytest.importorskip("xllamacpp")

NANO = Path(__file__).parents[2] / "examples" / "nano-deepseek-v3"
SMALL = {"vocab_size": 1024, "n_routed_experts": 8, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1}
N_TOKENS, TOP_K = 60, 40
FAMILIES: dict[str, Callable[..., dict[str, Any]]] = {
    "deepseek2": tiny_config,
    "deepseek2, GLM-4.7-Flash": glm4_moe_lite,
    "deepseek32": partial(deepseek_v32, index_topk=TOP_K),
    "glm-dsa": partial(glm_moe_dsa, index_topk=TOP_K),
    "glm4moe": GROUPED["glm4_moe"],
    "hy_v3": GROUPED["hy_v3"],
}


def kept(preset: str) -> Recipe:
    output = {"name": "main", "format": "gguf", "preset": preset, "mtp": "keep"}
    return Recipe.model_validate({"version": 1, "outputs": [output]})


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_drafts_what_the_layer_computes(family: str, tmp_path: Path) -> None:
    """Beyond ``index_topk`` tokens llama.cpp has no indexer in this layer, which the plan says."""
    config = FAMILIES[family](**SMALL)
    weights = write_model(tmp_path / "model", config)
    run(tmp_path / "model", kept("F32"), tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.gguf")
    tokens = torch.randint(4, 260, (1, N_TOKENS), generator=torch.Generator().manual_seed(5))
    found = torch.from_numpy(draft_logits(path, tokens[0].numpy().astype(np.int32), config["hidden_size"]))
    expected = drafted(config, weights, tokens)[0]
    assert expected.std() > 0.3
    apart = (found - expected).abs().amax(dim=1)
    sparse = "index_topk" in config
    assert apart[: TOP_K if sparse else None].max() <= 1e-4
    assert (apart.max() > 0.1) == sparse
    warnings = plan(tmp_path / "model", kept("F32")).warnings
    assert sum(f"beyond {TOP_K} tokens it drafts otherwise" in line for line in warnings) == sparse


def completed(path: Path, *, mtp: bool) -> dict[str, Any]:
    """Twenty greedy tokens of llama.cpp's server."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 256, 1, 1
    params.warmup, params.fit_params, params.verbosity = False, False, -1
    if mtp:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
    asked = {"prompt": "The history of the ", "max_tokens": 20, "temperature": 0}
    return xllamacpp.Server(params).handle_completions(asked)


def test_llama_cpp_s_server_drafts_with_the_small_model(tmp_path: Path) -> None:
    """The text is that of the model alone, some of it was drafted; and the command asks for it."""
    recipe = kept("Q8_0")
    (output,) = plan(NANO, recipe).outputs
    (command,) = output.target.serve_commands(NANO, output.planned)
    assert command.endswith(" --spec-type draft-mtp")
    run(NANO, recipe, tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.gguf")
    alone, drafting = (completed(path, mtp=mtp) for mtp in (False, True))
    assert drafting["choices"][0]["text"] == alone["choices"][0]["text"] != ""
    assert "draft_n" not in alone["timings"]
    assert drafting["timings"]["draft_n"] >= drafting["timings"]["draft_n_accepted"] > 5
