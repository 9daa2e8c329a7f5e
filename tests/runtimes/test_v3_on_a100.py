"""The numbers of docs/deepseek-v3-on-a100.md are those of the plan."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest

from quantkit.plan.headers import SourceHeaders, read_headers
from quantkit.plan.plan import OutputPlan, make_plan
from quantkit.plan.recipe import Recipe
from quantkit.runtimes.gpus import GIB, parse_gpus
from quantkit.runtimes.llama_cpp.memory import fit_llama
from quantkit.runtimes.vllm.memory import fit

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deepseek-v3-on-a100.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| `deepseek-v3-")
]


@lru_cache(maxsize=1)
def v3() -> SourceHeaders:
    return read_headers(ROOT / "examples" / "deepseek-v3-671b")


@lru_cache
def output(recipe: str) -> OutputPlan:
    headers = v3()
    (found,) = make_plan(Recipe.from_yaml(recipe), headers.arch, headers.infos, headers.stored).outputs
    return found


def computed(recipe: str, gpus: str, context: int) -> list[str]:
    """The cells after the context: what is used at most of a GPU in GiB, spread, room for more tokens, utilisation."""
    plan = output(recipe)
    if "gguf" in recipe:
        llama = fit_llama(plan, v3().arch, parse_gpus(gpus), context)
        return [
            f"{max(llama.weights) / GIB:.1f}",
            f"-ts {','.join(map(str, llama.tensor_split))}",
            f"{llama.spare_kv_tokens:,}",
            "",
        ]
    found = fit(plan, v3().arch, parse_gpus(gpus), context)
    assert found.placement is not None
    spread = f"TP={found.placement.tensor_parallel} PP={len(found.placement.partition)}"
    weights = f"{max(found.placement.stage_weights) / GIB:.1f}"
    return [weights, spread, f"{found.spare_kv_tokens:,}", f"{found.utilization}"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:3]))
def test_rows_are_those_of_the_plan(row: list[str]) -> None:
    recipe, gpus, context, *cells = row
    assert cells == computed(recipe, gpus, int(context.replace(",", "")))


def test_sizes_are_those_of_the_recipes() -> None:
    shown = re.findall(r"`(deepseek-v3-[\w-]+)`, ([\d.]+) GiB", PAGE)
    assert {name for name, _ in shown} == {row[0] for row in ROWS}
    for name, size in shown:
        header = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        assert f"({size} GiB)" in header
        assert f"{output(name).nbytes / GIB:.2f}" == size


@pytest.mark.parametrize("recipe", ["deepseek-v3-w3a16", "deepseek-v3-w4a16-g32"])
def test_bytes_and_bits_in_the_headers_of_the_recipes(recipe: str) -> None:
    header = (ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    plan = output(recipe)
    bits = 8 * plan.nbytes / plan.parameters
    assert f"# size:  {plan.nbytes / 1e9:.2f} GB ({plan.nbytes / GIB:.2f} GiB), {bits:.3f} bits per weight" in header


def test_four_a100s_hold_three_bits_and_not_four() -> None:
    gpus = parse_gpus("4xA100-80GB")
    assert fit(output("deepseek-v3-w3a16"), v3().arch, gpus, 32768).utilization == 0.92
    assert fit(output("deepseek-v3-w4a16-gptq"), v3().arch, gpus, 1024).utilization is None
