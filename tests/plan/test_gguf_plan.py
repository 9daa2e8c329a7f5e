"""What a plan says of a GGUF output: the bytes of the whole V3 under each preset, rules before presets, one line for
what cannot be stored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import PlanError, RecipeError
from quantkit.formats.gguf.sink import stacked_tensors
from quantkit.formats.planned import PlannedTensor
from quantkit.plan.decide import Action
from quantkit.plan.headers import SourceHeaders, read_headers
from quantkit.plan.plan import Plan, make_plan
from quantkit.plan.recipe import Recipe
from quantkit.plan.recipe_file import parse_model
from quantkit.runtimes.llama_cpp.presets import PRESETS
from quantkit.schemes import GgmlScheme
from tests.plan.test_plan import ROOT, V3, tiny_headers
from tests.tiny_models import YARN

TEXT = {"data": ["builtin:mixed"], "tokens": 524_288, "sequence_length": 2048}
KEEP_BF16 = {"match": "*", "keep": "bf16"}
V3_BYTES = {
    "Q4_K_M": 404_488_847_360,
    "Q4_K_S": 380_060_532_736,
    "IQ4_XS": 359_559_284_736,
    "Q6_K": 550_916_951_552,
    "Q8_0": 713_281_210_368,
}
"""Tensor data of llama-quantize's own files, made without an importance matrix."""


@pytest.fixture(scope="module")
def v3() -> SourceHeaders:
    return read_headers(V3)


def recipe_of(*rules: dict[str, Any], calibrated: bool = False, **output: Any) -> Recipe:
    """One GGUF output with these rules and options."""
    chosen = {"name": "main", "format": "gguf", "rules": list(rules), **output}
    return Recipe.model_validate({"version": 1, "calibration": TEXT if calibrated else None, "outputs": [chosen]})


def plan_of(headers: SourceHeaders, recipe: Recipe) -> Plan:
    return make_plan(recipe, headers.arch, headers.infos, headers.stored)


def kinds(plan: Plan) -> dict[str, str]:
    """Stored type of each planned tensor by official name (or name of a part)."""
    return {tensor.name: kind_of(tensor) for tensor in plan.outputs[0].planned}


def kind_of(tensor: PlannedTensor) -> str:
    return tensor.scheme.type if isinstance(tensor.scheme, GgmlScheme) else tensor.kept_info.dtype


# ------------------------------------------------------------------------------------------------------ the true size


@pytest.fixture(scope="module")
def v3_plan(v3: SourceHeaders) -> Plan:
    """One output for each preset, without text."""
    outputs = [{"name": preset, "format": "gguf", "preset": preset} for preset in V3_BYTES]
    return plan_of(v3, Recipe.model_validate({"version": 1, "outputs": outputs}))


@pytest.mark.parametrize("preset", V3_BYTES)
def test_v3_to_the_byte(preset: str, v3: SourceHeaders, v3_plan: Plan) -> None:
    output = v3_plan.outputs[list(V3_BYTES).index(preset)]
    assert output.nbytes == V3_BYTES[preset]
    assert output.parameters == 671_026_419_200  # every weight of the main model, nothing else
    stored = stacked_tensors(output.planned, v3.arch.gguf().stored_name)
    assert len(stored) == 1086
    assert sum(tensor.nbytes for tensor in stored) == output.nbytes
    dropped = {d.spec.official for d in output.decisions.values() if d.action is Action.DROP}
    assert dropped == {spec.name for spec in v3.arch.tensors() if spec.layer == 61}


def test_importance_changes_the_mix_as_in_llama_quantize() -> None:
    """IQ4_XS takes Q5_K for the first eighth of the down projections only where it knows no importance."""
    headers = tiny_headers(num_hidden_layers=15, hidden_size=256, moe_intermediate_size=256)
    blind, seeing = (kinds(plan_of(headers, recipe_of(preset="IQ4_XS", calibrated=c))) for c in (False, True))
    name = "model.layers.0.mlp.down_proj.weight"
    assert {other for other in blind if blind[other] != seeing[other]} == {name}
    assert (blind[name], seeing[name]) == ("Q5_K", "IQ4_XS")


def test_mtp_is_stored_when_asked() -> None:
    headers = tiny_headers(num_hidden_layers=15, hidden_size=256, moe_intermediate_size=256)
    outputs = [plan_of(headers, recipe_of(preset="Q4_K_M", mtp=mtp)).outputs[0] for mtp in ("drop", "keep")]
    without, stored = (
        {t.name: t for t in stacked_tensors(o.planned, headers.arch.gguf().stored_name)} for o in outputs
    )
    mtp = {name.removeprefix("blk.15."): tensor for name, tensor in stored.items() if name.startswith("blk.15.")}
    names = "eh_proj enorm hnorm embed_tokens shared_head_norm shared_head_head"
    assert {f"nextn.{name}.weight" for name in names.split()} <= set(mtp)
    assert set(stored) == set(without) | {f"blk.15.{name}" for name in mtp}
    assert mtp["ffn_up_exps.weight"].shape == (12, 256, 256)
    assert {mtp["nextn.enorm.weight"].kind, mtp["ffn_gate_inp.weight"].kind} == {"F32"}
    # The layer count that the mixes divide by is that of the file: an eighth of 15 layers is one, of 16 two.
    assert [name for name in without if stored[name].kind != without[name].kind] == [
        f"blk.{layer}.ffn_down_{experts}.weight"
        for layer in (1, 3, 4, 6, 7, 9, 10, 12)
        for experts in ("exps", "shexp")
    ]


def test_v3_is_planned_with_little_work_and_without_torch() -> None:
    """In a process of its own. A second."""
    script = """
import sys
from pathlib import Path
from quantkit.plan.headers import read_headers
from quantkit.plan.plan import make_plan
from quantkit.plan.recipe import Recipe

from tests.counted import calls

def planned():
    headers = read_headers(Path(sys.argv[1]))
    outputs = [{"name": "main", "format": "gguf", "preset": "Q4_K_M"}]
    recipe = Recipe.model_validate({"version": 1, "outputs": outputs})
    plans.append(make_plan(recipe, headers.arch, headers.infos, headers.stored))

plans = []
print(calls(planned), plans[0].outputs[0].nbytes, "torch" in sys.modules, "numba" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(V3)], capture_output=True, text=True, cwd=ROOT, timeout=600, check=True
    )
    counted, nbytes, torch, numba = done.stdout.split()
    assert (int(nbytes), torch, numba) == (V3_BYTES["Q4_K_M"], "False", "False")
    assert int(counted) < 400 * 46_183


# --------------------------------------------------------------------------------------------------- rules and presets


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_plans_every_tensor(preset: str) -> None:
    headers = tiny_headers()
    plan = plan_of(headers, recipe_of(preset=preset, mtp="keep", calibrated=True))
    (output,) = plan.outputs
    found = kinds(plan)
    names = {spec.name for spec in headers.arch.tensors() if "kv_b_proj" not in spec.name}
    assert set(found) == names | set(headers.arch.parts())
    assert {found[name] for name in found if "norm" in name or "mlp.gate." in name} == {"F32"}
    assert output.nbytes == sum(t.nbytes for t in stacked_tensors(output.planned, headers.arch.gguf().stored_name))


def test_rules_come_before_the_preset() -> None:
    plan = plan_of(
        tiny_headers(),
        recipe_of(
            {"match": "*.layers.1.*.down_proj.weight", "scheme": "Q8_0"},
            {"match": "*.kv_b_proj.weight:k", "keep": "f16"},
            {"match": "role:embed", "scheme": "Q5_1"},
            {"match": "role:shared_expert", "scheme": "IQ4_NL", "method": {"kind": "rtn"}},
            preset="Q4_0",
        ),
    )
    found = kinds(plan)
    assert found["model.layers.1.mlp.experts.3.down_proj.weight"] == "Q8_0"
    assert found["model.layers.1.mlp.shared_experts.down_proj.weight"] == "Q8_0"
    assert found["model.layers.1.mlp.shared_experts.up_proj.weight"] == "IQ4_NL"
    assert found["model.layers.0.self_attn.kv_b_proj.weight:k"] == "F16"
    assert found["model.layers.0.self_attn.kv_b_proj.weight:v"] == "Q4_0"
    assert (found["model.embed_tokens.weight"], found["lm_head.weight"]) == ("Q5_1", "Q8_0")
    assert found["model.layers.2.mlp.experts.3.down_proj.weight"] == "Q4_0"
    decisions = plan.outputs[0].decisions
    assert decisions["model.embed_tokens.weight"].rule == 3
    assert decisions["lm_head.weight"].rule == 0  # the preset
    (note,) = plan.warnings
    assert note.startswith("output main: leaves out the MTP layer of the source (")
    assert note.endswith(" A recipe keeps it by mtp: keep (--print-recipe writes one).")


@pytest.mark.parametrize(
    ("match", "kept"), [("*.layers.0.*.kv_b_proj.weight", "kv"), ("*.layers.0.*.kv_b_proj.weight:v", "v"), ("*:k", "k")]
)
def test_the_official_name_stands_for_both_parts(match: str, kept: str) -> None:
    found = kinds(plan_of(tiny_headers(), recipe_of({"match": match, "keep": "f16"}, preset="Q8_0")))
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert {part for part in "kv" if found[f"{name}:{part}"] == "F16"} == set(kept)


def test_mtp_drop_comes_before_rules_and_says_so() -> None:
    """A glob that means the decoder layers must not keep a part of the MTP layer, which llama.cpp could not load."""
    rules = (
        {"match": "*.down_proj.weight", "scheme": "Q4_1"},
        {"match": "role:mtp", "scheme": "Q8_0"},
        {"match": "model.layers.3.*", "keep": "bf16"},
    )
    plan = plan_of(tiny_headers(), recipe_of(*rules, preset="Q4_0"))
    assert not [name for name in kinds(plan) if ".layers.3." in name]
    assert kinds(plan)["model.layers.2.mlp.experts.0.down_proj.weight"] == "Q4_1"
    assert plan.warnings[:-1] == (
        "output main: rule 2 (role:mtp): decides nothing, mtp: drop leaves out all its tensors.",
        "output main: rule 3 (model.layers.3.*): decides nothing, mtp: drop leaves out all its tensors.",
    )
    kept = kinds(plan_of(tiny_headers(), recipe_of(*rules, preset="Q4_0", mtp="keep")))
    assert kept["model.layers.3.mlp.experts.0.down_proj.weight"] == "Q4_1"
    assert kept["model.layers.3.mlp.experts.0.up_proj.weight"] == "Q8_0"
    assert kept["model.layers.3.eh_proj.weight"] == "Q8_0"  # a block type may take a role's tables, too


def test_rules_alone() -> None:
    plan = plan_of(
        tiny_headers(),
        recipe_of(
            {"match": "role:mtp", "drop": True},
            {"match": "role:expert|attention", "scheme": "Q4_0"},
            {"match": "role:embed|lm_head", "scheme": "Q8_0"},
            KEEP_BF16,
        ),
    )
    found = kinds(plan)
    by_role = {(d.spec.role.value, found.get(name)) for name, d in plan.outputs[0].decisions.items()}
    assert by_role == {
        ("embed", "Q8_0"),
        ("lm_head", "Q8_0"),
        ("expert", "Q4_0"),
        ("attention", "Q4_0"),
        ("mlp", "BF16"),
        ("shared_expert", "BF16"),
        ("router", "F32"),
        ("norm", "F32"),
        ("mtp", None),
    }


def test_routers_and_norms_stay_in_float32_in_the_mtp_layer_too() -> None:
    found = kinds(plan_of(tiny_headers(), recipe_of(KEEP_BF16, mtp="keep")))
    assert found["model.layers.3.mlp.gate.weight"] == found["model.layers.1.mlp.gate.weight"] == "F32"
    assert found["model.layers.3.enorm.weight"] == found["model.layers.3.mlp.gate.e_score_correction_bias"] == "F32"
    assert found["model.layers.3.eh_proj.weight"] == found["model.layers.1.self_attn.o_proj.weight"] == "BF16"


def test_types_whose_blocks_do_not_fit_are_replaced_and_told() -> None:
    plan = plan_of(tiny_headers(), recipe_of({"match": "role:expert", "scheme": "Q4_K"}, preset="Q8_0"))
    assert kinds(plan)["model.layers.1.mlp.experts.0.up_proj.weight"] == "Q5_0"
    replaced = [line.removeprefix("output main: ") for line in plan.warnings if "MTP" not in line]
    assert [line.split(":")[0] for line in replaced] == [f"ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    assert all("Q5_0" in line and "Q4_K" in line and "(24 times)" in line for line in replaced)


def test_methods_go_where_their_inputs_are() -> None:
    headers = tiny_headers()
    for calibrated in (True, False):
        plan = plan_of(headers, recipe_of(preset="IQ3_XS", mtp="keep", calibrated=calibrated))
        for name, decision in plan.outputs[0].decisions.items():
            if decision.method is None:
                continue
            inputs = decision.spec.linear  # of the MTP layer too
            assert decision.method.kind == ("gptq" if calibrated and inputs else "rtn"), name
        assert plan.calibrates_mtp == calibrated


# ------------------------------------------------------------------------------------------------------------ refusals

INT4 = {"kind": "int", "bits": 4, "group_size": 32}
GPTQ = {"kind": "gptq"}
EXPERT = "model.layers.1.mlp.experts.11.up_proj.weight"
REFUSED: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any], str]] = {
    "int scheme": (
        ({"match": EXPERT, "scheme": INT4},),
        {"preset": "Q8_0"},
        f"output main: {EXPERT}: GGUF cannot store int4 g32.",
    ),
    "gptq on the embeddings": (
        ({"match": "role:embed", "scheme": "Q8_0", "method": GPTQ},),
        {"preset": "Q8_0"},
        "output main: model.embed_tokens.weight (rule 1): this tensor sees no calibration tokens.",
    ),
    "fp8 bytes": (
        ({"match": "*.layers.2.*.o_proj.weight", "keep": "source"},),
        {"preset": "Q8_0"},
        "output main: model.layers.2.self_attn.o_proj.weight: is fp8 block in the source, which GGUF lacks; "
        "keep: bf16 decodes it.",
    ),
    "experts of two types": (
        ({"match": EXPERT, "scheme": "Q4_0"},),
        {"preset": "Q8_0"},
        f"output main: {EXPERT}: planned as Q4_0, but {EXPERT.replace('11', '0')} as Q8_0; "
        "blk.1.ffn_up_exps.weight holds one type.",
    ),
    "half an MTP layer": (
        ({"match": "*.eh_proj.weight", "drop": True},),
        {"preset": "Q8_0", "mtp": "keep"},
        "output main: the MTP layer lacks 1 of its tensors: keep all of them, or drop all.",
    ),
    "a tensor without a rule": (
        ({"match": "model.norm.weight", "keep": "f32"}, {"match": "model.[el]*", "keep": "bf16"}),
        {},
        "output main: lm_head.weight (role lm_head): no rule matches it.",
    ),
    "dropping what is needed": (
        ({"match": "lm_head.weight", "drop": True},),
        {"preset": "Q8_0"},
        "output main: lm_head.weight (rule 1): role lm_head cannot be dropped, only mtp tensors can.",
    ),
    "rows of no whole blocks": (
        ({"match": "*.layers.0.*.kv_b_proj.weight:k", "scheme": "Q4_K"},),
        {"preset": "F16"},
        "output main: model.layers.0.self_attn.kv_b_proj.weight:k: in_features 48 is not a multiple of 256, the block "
        "of Q4_K.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_is_one_line(name: str) -> None:
    rules, output, said = REFUSED[name]
    headers = tiny_headers(**({"qk_nope_head_dim": 48} if name == "rows of no whole blocks" else {}))
    with pytest.raises(PlanError) as caught:
        plan_of(headers, recipe_of(*rules, calibrated=True, **output))
    assert caught.value.message == said


def test_gptq_without_text_is_refused_for_presets_too() -> None:
    with pytest.raises(PlanError, match=r"^output main: method: gptq needs calibration text\. Add"):
        plan_of(tiny_headers(), recipe_of(preset="Q8_0", method=GPTQ))


def test_many_faults_of_one_kind_are_counted() -> None:
    fp8 = {"match": "role:expert", "keep": "source"}
    with pytest.raises(PlanError) as caught:
        plan_of(tiny_headers(), recipe_of(fp8, preset="Q8_0"))
    lines = caught.value.message.splitlines()
    assert len(lines) == 6
    assert all("is fp8 block in the source" in line for line in lines[:5])
    assert lines[5] == "... and 67 more: format problems."


def test_block_types_do_not_go_into_compressed_tensors() -> None:
    rules = [{"match": EXPERT, "scheme": "Q8_0"}, {"match": "*", "keep": "source"}]
    output = {"name": "w8", "format": "compressed-tensors", "rules": rules}
    with pytest.raises(PlanError) as caught:
        plan_of(tiny_headers(), Recipe.model_validate({"version": 1, "outputs": [output]}))
    assert caught.value.message == f"output w8: {EXPERT}: compressed-tensors cannot store Q8_0."
    assert "format: gguf" in caught.value.hint


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("rules: []", "outputs[0]: found neither preset, rules nor target, needed one of them."),
        ("preset: Q4_KM", "outputs[0].preset: found 'Q4_KM', needed one of F32, "),
        ("preset: Q4_KM", "(did you mean Q4_K_M?)"),
        ("preset: Q8_0, split_max_size: 1KB", "outputs[0].split_max_size: found '1KB', needed at least 1MiB."),
        ('rules: [{match: "*", scheme: Q4K}]', "outputs[0].rules[0].scheme: found 'Q4K', needed a mapping, or one of "),
        ('rules: [{match: "*", scheme: Q4K}]', "(did you mean Q4_K?)"),
    ],
)
def test_outputs_that_contradict_themselves(output: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_model(Recipe, f"version: 1\noutputs:\n  - {{name: main, format: gguf, {output}}}\n", "test.yaml")
    assert caught.value.message.startswith("test.yaml:3: ")
    assert said in caught.value.message
    assert "\n" not in str(caught.value)


def test_text_and_an_imatrix_exclude_each_other() -> None:
    text = "calibration: {data: [a.txt], tokens: 64, sequence_length: 32}\nimatrix: x.gguf\n"
    with pytest.raises(RecipeError, match=r"found calibration and imatrix, needed one of them \(or neither\)\."):
        parse_model(Recipe, f"version: 1\n{text}outputs: [{{name: a, format: gguf, preset: Q8_0}}]\n", "test.yaml")


def test_a_model_that_llama_cpp_cannot_run_is_one_line() -> None:
    with pytest.raises(PlanError, match=r"rope_interleave is false") as caught:
        plan_of(tiny_headers(rope_interleave=False), recipe_of(preset="Q8_0"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("DeepSeek V3 (base)", "DeepSeek-V3-base-main.gguf"),
        ("x" * 255, f"{'x' * 128}-main.gguf"),
        ("模型", "model-main.gguf"),
    ],
)
def test_files_are_named_after_the_folder(folder: str, file: str) -> None:
    (output,) = plan_of(tiny_headers(), recipe_of(preset="Q8_0")).outputs
    assert output.target.serve_commands(Path(folder), output.planned) == (f"llama-server -m {file}",)


def test_printed_commands_have_the_flags_that_the_notes_ask_for() -> None:
    yarn = {**YARN, "beta_fast": 1.0}
    (output,) = plan_of(tiny_headers(rope_scaling=yarn), recipe_of(preset="Q8_0")).outputs
    (command,) = output.target.serve_commands(Path("kimi"), output.planned)
    assert command == "llama-server -m kimi-main.gguf --yarn-beta-fast 1 --yarn-beta-slow 1"
    assert any("--yarn-beta-fast 1 --yarn-beta-slow 1" in note for note in output.target.notes(output.planned))
