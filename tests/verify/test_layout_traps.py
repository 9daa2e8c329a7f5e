"""The traps of the layouts of GPTQ, AWQ and auto-round, as `test_traps` has those of compressed-tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from tests.convert.jobs import int4, recipe_of, run, write_model
from tests.verify.breaking import (
    ATTENTION,
    EXPERT,
    Config,
    Tensors,
    broken,
    drop,
    faults,
    section,
    stated,
)


def integers(folder: Path, layout: str) -> Path:
    """The same model in a layout of others."""
    write_model(folder / "model")
    rules: list[dict[str, Any]] = [{"match": "role:mtp", "drop": True}, int4(kind="rtn")]
    for rule in rules[1:]:
        rule["scheme"] = {**rule["scheme"], "symmetric": layout != "awq", "scale_dtype": "float16"}
    recipe = recipe_of(*rules, tokens=None)
    output = recipe.outputs[0].model_copy(update={"format": layout})
    run(folder / "model", recipe.model_copy(update={"outputs": (output,)}), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return integers(tmp_path_factory.mktemp("gptq"), "gptq")


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return integers(tmp_path_factory.mktemp("awq"), "awq")


def permuted(tensors: Tensors, config: Config) -> None:
    name = f"{ATTENTION}.o_proj.g_idx"
    tensors[name] = tensors[name].flip(0)


GPTQ_TRAPS: dict[str, tuple[Callable[[Tensors, Config], None], str]] = {
    "codes of an expert are missing": (drop(f"{EXPERT}.up_proj.qweight"), f"missing: {EXPERT}.up_proj.qweight"),
    "zero points are missing": (drop(f"{EXPERT}.up_proj.qzeros"), f"missing: {EXPERT}.up_proj.qzeros"),
    "act-order whose config lies": (permuted, "permuted, though desc_act is false"),
    "act-order": (stated("desc_act", True), "vLLM takes act-order no longer"),
    "not symmetric": (stated("sym", False), "vLLM takes symmetric GPTQ only"),
    "three bits": (stated("bits", 3), "vLLM takes GPTQ of 4 and 8 bits"),
    "a rule that says other bits": (
        lambda tensors, config: section(config)["dynamic"].update({f"+:.*{EXPERT}\\.up_proj": {"bits": 8}}),
        f"of another shape: {EXPERT}.up_proj.qweight",
    ),
    "a rule that leaves out what is quantised": (
        lambda tensors, config: section(config)["dynamic"].update({f"-:{EXPERT}\\.up_proj": {}}),
        f"{EXPERT}.up_proj.weight is stored quantised, by config.json it is not",
    ),
    "half of a shared expert is kept": (
        lambda tensors, config: plain_gptq(tensors, "model.layers.1.mlp.shared_experts.up_proj"),
        "vLLM joins them into gate_up_proj",
    ),
    "a rule that is no pattern": (
        lambda tensors, config: section(config)["dynamic"].update({"+:*": {"bits": 8}}),
        "is no pattern",
    ),
}


def plain_gptq(tensors: Tensors, module: str) -> None:
    words, n_out = tensors[f"{module}.qweight"].shape
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{module}.{part}"]
    tensors[f"{module}.weight"] = torch.zeros(n_out, words * 8, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", GPTQ_TRAPS)
def test_every_trap_of_gptq_is_named(name: str, gptq: Path, tmp_path: Path) -> None:
    change, said = GPTQ_TRAPS[name]
    assert said in faults(broken(gptq, tmp_path / "broken", change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (stated("zero_point", False), "AWQ with zero points only. They are stored: write true."),
        (stated("bits", 8), "vLLM takes AWQ of 4 bits"),
        (stated("modules_to_not_convert", ["mlp.gate"]), "'mlp.gate' is a part of model.layers.0.mlp.gate_proj"),
        (drop(f"{EXPERT}.down_proj.scales"), f"missing: {EXPERT}.down_proj.scales"),
    ],
)
def test_every_trap_of_awq_is_named(
    change: Callable[[Tensors, Config], None], said: str, awq: Path, tmp_path: Path
) -> None:
    assert said in faults(broken(awq, tmp_path / "broken", change))


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_sound_layouts_of_others_load_in_vllm_and_not_in_transformers(
    layout: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(layout)
    assert faults(folder, sample=1000, source=folder.parent / "model") == ""
    assert "leaves routed experts of this format random" in faults(folder, "transformers")


# --- auto-round -------------------------------------------------------------------------------------------------------


def in_its_words(packing: str, **extra: dict[str, Any]) -> Callable[[Tensors, Config], None]:
    """config.json as auto-round's own format has it, for the tensors of GPTQ or AWQ."""

    def change(tensors: Tensors, config: Config) -> None:
        said = {"quant_method": "auto-round", "packing_format": packing, "sym": True, "bits": 4, "group_size": 64}
        gates = {r".*model\.layers\.1\.mlp\.gate.*": {"bits": 16, "data_type": "float"}}
        config["quantization_config"] = {**said, "extra_config": {**gates, **extra}}

    return change


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_what_auto_round_writes_is_read_as_the_layout_that_it_packs(
    layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """transformers leaves it to auto-round's own code, which takes experts too."""
    made = request.getfixturevalue(layout)
    folder = broken(made, tmp_path / "theirs", in_its_words(f"auto_round:auto_{layout}"))
    assert faults(folder, sample=1000, source=made.parent / "model") == ""
    assert faults(folder, "transformers") == ""
    assert quantkit.verify(folder, sample=0).stored_as == "auto-round"
    lost = f"{EXPERT}.up_proj.scales"
    assert f"missing: {lost}." in faults(broken(folder, tmp_path / "less", drop(lost)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (in_its_words("auto_round:llm_compressor"), "packing_format is 'auto_round:llm_compressor', 'auto_round:auto_"),
        (
            in_its_words("auto_round:auto_gptq", **{f"{EXPERT}.up_proj": {"bits": 16}}),
            f"{EXPERT}.up_proj.weight is stored quantised, by config.json it is not",
        ),
        (
            in_its_words("auto_round:auto_gptq", **{r".*experts\.3\.up": {"bits": 8}}),
            "of another shape: model.layers.1.mlp.experts.3.up_proj.qweight",
        ),
        (in_its_words("auto_round:auto_gptq", **{"*": {"bits": 8}}), "is no pattern"),
    ],
    ids=["packing", "one linear", "pattern", "no pattern"],
)
def test_what_auto_round_says_of_single_linears_is_held_against_the_files(
    change: Callable[[Tensors, Config], None], said: str, gptq: Path, tmp_path: Path
) -> None:
    assert said in faults(broken(gptq, tmp_path / "broken", change))
