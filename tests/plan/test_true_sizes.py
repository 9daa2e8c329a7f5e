"""Models at their true sizes: parameters as published, and shorthands that plan each of them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from quantkit.arch import arch_of
from quantkit.plan.forecast import forecast
from quantkit.plan.recipe import Recipe
from quantkit.plan.shorthand import Shorthand, shorthand_recipe
from quantkit.runtimes.gpus import parse_gpus
from quantkit.tensors import Role

FOLDER = Path(__file__).parents[2] / "examples" / "true-sizes"
MODELS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
PUBLISHED = {
    "deepseek-v2-lite": (15.7e9, False),
    "deepseek-v2": (236e9, False),
    "deepseek-v3.2": (685e9, True),
    "glm-4.7-flash": (30e9, False),
    "glm-5": (744e9, False),
    "glm-5.2": (743e9, False),
    "kimi-k2": (1.03e12, False),
    "llama-3.1-70b": (70.6e9, False),
    "qwen3-30b-a3b": (30.5e9, False),
}
"""Parameters as published, and whether those of MTP layers are counted."""
RULES = [{"match": "*", "keep": "source"}]
KEEP = {"version": 1, "outputs": [{"name": "a", "format": "compressed-tensors", "rules": RULES}]}


def table() -> dict[str, tuple[str, ...]]:
    """Rows of README.md, by folder."""
    rows = re.findall(r"^\| `([\w.-]+)` \|(.+)\|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    return {name: tuple(cell.strip() for cell in rest.split("|")) for name, rest in rows}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_published(name: str) -> None:
    arch = arch_of(json.loads((FOLDER / name / "config.json").read_text()))
    sizes = [(spec.role, math.prod(spec.shape)) for spec in arch.tensors()]
    total, mtp = sum(size for _, size in sizes), sum(size for role, size in sizes if role is Role.MTP)
    stated = f"{total:,} ({mtp:,})" if mtp else f"{total:,}"
    assert table()[name][1] == stated
    published, with_mtp = PUBLISHED[name]
    assert (total if with_mtp else total - mtp) == pytest.approx(published, rel=0.004)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_counts_the_same(name: str) -> None:
    """MTP layers without the copies of embedding and head that checkpoints leave out."""
    made = forecast(FOLDER / name, Recipe.from_dict(KEEP))
    total = int(table()[name][1].split()[0].replace(",", ""))
    assert made.outputs[0].parameters == total


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("option", ["w4a16", "Q4_K_M"])
def test_a_shorthand_plans_every_model(name: str, option: str) -> None:
    chosen = Shorthand(preset=option) if option == "Q4_K_M" else Shorthand(scheme=option)
    made = forecast(FOLDER / name, shorthand_recipe(FOLDER / name, chosen))
    assert 4 < made.outputs[0].bpw < 5.5


def test_a_group_that_does_not_divide_is_made_smaller() -> None:
    """10,944 inputs are no whole groups of 128; vLLM and Marlin take 64."""
    folder = FOLDER / "deepseek-v2-lite"
    (output,) = shorthand_recipe(folder, Shorthand(scheme="w4a16")).outputs
    assert "model.layers.*.mlp.down_proj.weight" in [rule.match for rule in output.rules]
    made = forecast(folder, shorthand_recipe(folder, Shorthand(scheme="w4a16-all")))
    assert [size.what for size in made.outputs[0].sizes if size.role is Role.MLP] == ["int4 g128 gptq", "int4 g64 gptq"]


def test_indexers_choose_keys_in_float32() -> None:
    made = forecast(FOLDER / "glm-5.2", shorthand_recipe(FOLDER / "glm-5.2", Shorthand(preset="Q4_K_M")))
    decisions = made.outputs[0].decisions
    prefix = "model.layers.6.self_attn.indexer."
    assert [decisions[f"{prefix}{name}.weight"].dtype for name in ("wk", "weights_proj")] == ["F32", "F32"]
    assert str(decisions[f"{prefix}wq_b.weight"].scheme) != "None"
    assert f"{prefix}wk.weight".replace(".6.", ".7.") not in decisions


def test_sparse_attention_fits_h200_and_not_a100() -> None:
    recipe = shorthand_recipe(FOLDER / "deepseek-v3.2", Shorthand(scheme="w4a16"))
    fits = {
        gpus: forecast(FOLDER / "deepseek-v3.2", recipe, gpus=parse_gpus(gpus)).fits or ()
        for gpus in ("8xH200", "8xA100-80GB")
    }
    assert [fit.fits for (fit,) in fits.values()] == [True, False]
