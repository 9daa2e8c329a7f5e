"""docs/models.md and the headers of the recipes say what the code knows of each family."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest

from quantkit.arch import ARCHS, arch_of
from quantkit.arch.base import ModelArch
from quantkit.plan.forecast import Forecast, forecast
from quantkit.plan.recipe import Recipe
from quantkit.plan.recipe_file import shipped_recipes
from quantkit.runtimes.gpus import GIB, parse_gpus
from tests.arch.grouped import GROUPED
from tests.arch.relatives import (
    deepseek_v2,
    deepseek_v32,
    glm4_moe_lite,
    glm_moe_dsa,
    kimi_k25,
    kimi_vl,
)
from tests.tiny_models import tiny_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
CONFIGS = (
    tiny_config(),
    kimi_k25(),
    kimi_vl(),
    deepseek_v2(),
    glm4_moe_lite(),
    deepseek_v32(),
    glm_moe_dsa(),
    *(config() for config in GROUPED.values()),
)
RECIPES = {
    "kimi-k2-w4a16": "kimi-k2",
    "kimi-k2-gguf-q4_k_m": "kimi-k2",
    "glm-4.7-flash-w4a16": "glm-4.7-flash",
    "glm-4.7-flash-gguf-q4_k_m": "glm-4.7-flash",
    "deepseek-v2-lite-w4a16": "deepseek-v2-lite",
}
"""Recipe -> folder of examples/true-sizes."""


def rows() -> dict[str, list[str]]:
    """Cells after the first, by architecture."""
    found = re.findall(r"^\| `(\w+)` \|(.+)\|$", PAGE, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in found if name != "architectures"}


def families() -> dict[str, ModelArch]:
    return {config["architectures"][0]: arch_of(config) for config in CONFIGS}


def test_every_family_has_a_row() -> None:
    assert rows().keys() == ARCHS.keys() == families().keys()


@pytest.mark.parametrize("name", ARCHS)
def test_rows_say_what_the_code_knows(name: str) -> None:
    arch, cells = families()[name], rows()[name]
    assert cells[1] == f"`{arch.gguf().key_values(mtp=False)['general.architecture']}`"
    assert cells[2] == ("yes" if arch.serving().sparse_top_k is None else "no")


def test_recipes_are_named_and_exist() -> None:
    named = {glob for cells in rows().values() for glob in re.findall(r"`([\w.-]+)\*`", cells[3])}
    models = [path.stem for path in shipped_recipes() if not path.stem.startswith(("nano", "repack"))]
    assert all(any(model.startswith(start) for start in named) for model in models)
    assert all(any(model.startswith(start) for model in models) for start in named)
    assert {model for model in models if not model.startswith("deepseek-v3")} == set(RECIPES)


@lru_cache(maxsize=1)
def planned(recipe: str, gpus: str, context: int) -> Forecast:
    folder = ROOT / "examples" / "true-sizes" / RECIPES[recipe]
    return forecast(folder, Recipe.from_yaml(recipe), gpus=parse_gpus(gpus), context=context)


@pytest.mark.parametrize("recipe", RECIPES)
def test_headers_of_the_recipes(recipe: str) -> None:
    header = (ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    command = re.search(r"-r ([\w.-]+) --gpus (\S+) --context (\d+)`", header)
    assert command is not None
    assert command[1] == recipe
    made = planned(recipe, command[2], int(command[3]))
    (output,) = made.outputs
    size = f"# size:  {output.nbytes / 1e9:.2f} GB ({output.nbytes / GIB:.2f} GiB), {output.bpw:.3f} bits per weight"
    assert size in header
    ram, disk = made.needs.working_bytes / 1e9, made.needs.disk_bytes / 1e9
    assert header.count(f"# needs: {ram:.1f} GB of RAM (") == header.count(f" {disk:.0f} GB of disk") == 1
    assert [fit.fits for fit in made.fits or ()] == [True]
