"""Recipes for tests of plan and command line."""

from __future__ import annotations

from quantkit.plan.recipe import Recipe
from quantkit.plan.recipe_file import parse_model

INT4 = "scheme: {kind: int, bits: 4, group_size: 128}, method: {kind: gptq}"
KEEP_REST = '{match: "*", keep: source}'


def recipe_text(*rules: str, calibrated: bool = True) -> str:
    """YAML of a recipe with one output and these rules (flow mappings)."""
    calibration = "calibration: {data: [builtin:mixed], tokens: 524288, sequence_length: 2048}\n" if calibrated else ""
    listed = "".join(f"      - {rule}\n" for rule in rules)
    return f"version: 1\n{calibration}outputs:\n  - name: w4a16\n    format: compressed-tensors\n    rules:\n{listed}"


def recipe_of(*rules: str, calibrated: bool = True) -> Recipe:
    """The recipe of `recipe_text`."""
    return parse_model(Recipe, recipe_text(*rules, calibrated=calibrated), "test.yaml")
