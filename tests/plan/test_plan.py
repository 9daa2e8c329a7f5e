"""Plans: exact bytes of DeepSeek V3 at its true size, all refusals, memory needs, and the fit under vLLM."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantkit.arch import arch_of
from quantkit.errors import PlanError, SourceError
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.formats.safetensors.writer import layout_shards
from quantkit.plan.decide import Action
from quantkit.plan.headers import SourceHeaders, headers_from_arch, read_headers
from quantkit.plan.memory import check_free_disk, conversion_needs, conversion_phases
from quantkit.plan.phases import Place
from quantkit.plan.plan import Plan, make_plan
from quantkit.plan.recipe import Recipe
from quantkit.plan.shapes import Work
from quantkit.runtimes.gpus import parse_gpus
from quantkit.runtimes.vllm.memory import fit
from quantkit.schemes import Float8Scheme
from quantkit.tensors import TensorInfo
from tests.convert.recipes import INT4, KEEP_REST, recipe_of
from tests.tiny_models import tiny_config

ROOT = Path(__file__).parent.parent.parent
V3 = ROOT / "examples" / "deepseek-v3-671b"


@pytest.fixture(scope="module")
def v3() -> SourceHeaders:
    return read_headers(V3)


def all_linears(group_size: int) -> Recipe:
    return recipe_of(
        '{match: "role:mtp", drop: true}',
        '{match: "role:router", keep: source}',
        f'{{match: "role:expert|attention|shared_expert|mlp", {INT4}}}'.replace("128", str(group_size)),
        '{match: "*", keep: bf16}',
    )


@pytest.fixture(scope="module")
def linears(v3: SourceHeaders) -> Plan:
    return plan_of(v3, all_linears(128))


def plan_of(headers: SourceHeaders, recipe: Recipe) -> Plan:
    return make_plan(recipe, headers.arch, headers.infos, headers.stored)


# --- the true size (figures: bytes of tensor data of the main model)


@pytest.mark.parametrize(
    ("group_size", "nbytes"), [(128, 348_909_324_928), (64, 359_363_475_072), (32, 380_271_775_360)]
)
def test_v3_all_linears(v3: SourceHeaders, linears: Plan, group_size: int, nbytes: int) -> None:
    (output,) = (linears if group_size == 128 else plan_of(v3, all_linears(group_size))).outputs
    assert output.nbytes == nbytes
    assert output.parameters == 671_026_419_200


def test_v3_experts_only(v3: SourceHeaders) -> None:
    recipe = recipe_of(
        '{match: "role:mtp", drop: true}',
        '{match: "role:router", keep: source}',
        f'{{match: "role:expert", {INT4}}}',
        '{match: "*", keep: bf16}',
    )
    assert plan_of(v3, recipe).outputs[0].nbytes == pytest.approx(371.41e9, abs=5e6)


def test_v3_source_sizes(v3: SourceHeaders) -> None:
    plan = plan_of(v3, recipe_of('{match: "*", keep: source}'))
    assert plan.source_bytes == 688_574_839_360
    assert plan.outputs[0].nbytes == 688_574_839_360  # FP8 kept as FP8
    decoded = plan_of(v3, recipe_of('{match: "role:router|mtp", keep: source}', '{match: "*", keep: bf16}'))
    assert sum(size.parameters for size in decoded.outputs[0].sizes) == 684_489_845_504


def test_planned_bytes_are_those_of_the_writer() -> None:
    headers = tiny_headers()
    (output,) = plan_of(headers, Recipe.from_yaml("nano-demo")).outputs
    layout = layout_shards(COMPRESSED_TENSORS.infos(tensor) for tensor in output.planned)
    assert layout.data_bytes == output.nbytes


def test_index_generator_lists_the_official_names(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_index", V3 / "make_index.py")
    assert spec is not None
    assert spec.loader is not None
    make_index: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_index)
    config = json.loads((V3 / "config.json").read_text(encoding="utf-8"))
    index = make_index.make_index(config)
    weight_map = index["weight_map"]
    assert index["metadata"]["total_size"] == 688_574_839_360
    assert len(weight_map) == 91_991
    assert len([name for name in weight_map if name.startswith("model.layers.61.")]) == 1_564
    assert len(set(weight_map.values())) == 163
    assert min(weight_map.values()) == "model-00001-of-000163.safetensors"
    # A folder with config.json and this index plans like config.json alone; one with another index is refused.
    shutil.copy(V3 / "config.json", tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    assert len(read_headers(tmp_path).infos) == 46_183
    del weight_map["model.layers.60.mlp.experts.255.up_proj.weight_scale_inv"]
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(
        PlanError, match=r"lacks 1 tensors \(such as model.layers.60.mlp.experts.255.up_proj.weight_scale_inv\)"
    ):
        read_headers(tmp_path)


# --- decisions and refusals


def tiny_headers(**changes: Any) -> SourceHeaders:
    """Headers of a tiny FP8 checkpoint, without files."""
    config = {**tiny_config(num_nextn_predict_layers=1, **changes), "quantization_config": {"quant_method": "fp8"}}
    arch = arch_of(config)
    infos, stored = headers_from_arch(arch, config)
    return SourceHeaders(Path(), config, arch, infos, stored, False)


def refusal(headers: SourceHeaders, recipe: Recipe) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan_of(headers, recipe)
    return caught.value


def test_first_match_wins_and_order_is_official() -> None:
    headers = tiny_headers()
    plan = plan_of(
        headers,
        recipe_of(
            '{match: "role:mtp", drop: true}',
            '{match: "*.self_attn.kv_b_proj.weight", keep: bf16}',
            f'{{match: "role:expert", {INT4}}}',
            KEEP_REST,
        ),
    )
    kept = plan.decision("model.layers.0.self_attn.kv_b_proj.weight")
    assert (kept.action, kept.dtype, kept.scheme, kept.rule) == (Action.KEEP, "BF16", None, 2)
    source = plan.decision("model.layers.0.self_attn.o_proj.weight")
    assert (source.action, source.scheme) == (Action.KEEP, Float8Scheme())
    assert plan.decision("model.layers.1.mlp.gate.e_score_correction_bias").dtype == "F32"
    names = [tensor.name for tensor in plan.outputs[0].planned]
    assert names == [spec.name for spec in headers.arch.tensors() if spec.role.value != "mtp"]
    expert = plan.outputs[0].planned[names.index("model.layers.1.mlp.experts.3.up_proj.weight")]
    assert (expert.layer, expert.expert, expert.role) == (1, 3, "expert")


def test_role_with_scheme_takes_linears_only() -> None:
    rtn = "scheme: {kind: int, bits: 4, group_size: 128}, method: {kind: rtn}"
    plan = plan_of(tiny_headers(), recipe_of(f'{{match: "role:mtp", {rtn}}}', KEEP_REST, calibrated=False))
    assert plan.decision("model.layers.3.mlp.experts.0.up_proj.weight").action is Action.QUANTIZE
    assert plan.decision("model.layers.3.eh_proj.weight").action is Action.KEEP
    assert plan.decision("model.layers.3.input_layernorm.weight").action is Action.KEEP


def test_every_problem_of_the_source_at_once() -> None:
    headers = tiny_headers()
    infos = dict(headers.infos)
    for expert in range(12):
        del infos[f"model.layers.2.mlp.experts.{expert}.up_proj.weight"]
    name = "model.layers.0.self_attn.o_proj.weight"
    infos[name] = replace(infos[name], shape=(64, 64))
    infos["model.norm.weight"] = replace(infos["model.norm.weight"], dtype="I32")
    infos["model.extra"] = TensorInfo("model.extra", (1,), "BF16")
    lines = refusal(replace(headers, infos=infos), recipe_of(KEEP_REST)).message.splitlines()
    assert lines.count("... and 7 more: missing tensors.") == 1
    assert f"{name}: found shape [64, 64], needed [128, 128] by config.json." in lines
    assert "model.norm.weight: found dtype I32, needed one of BF16, F16, F32." in lines
    assert any(line.startswith("model.extra: found in the source") for line in lines)
    assert len(lines) == 9


def test_all_faults_of_a_rule_are_one_line() -> None:
    found = refusal(tiny_headers(), recipe_of(f'{{match: "*", {INT4}}}'))
    (line,) = found.message.splitlines()
    assert line.startswith("output w4a16: model.embed_tokens.weight (rule 1): role embed,"), line
    assert line.endswith("more tensors of this rule).")
    assert found.hint.startswith("Name roles in place of the glob")


def test_missing_mtp_has_a_hint() -> None:
    headers = tiny_headers()
    infos = {name: info for name, info in headers.infos.items() if not name.startswith("model.layers.3.")}
    assert "num_nextn_predict_layers" in refusal(replace(headers, infos=infos), recipe_of(KEEP_REST)).hint


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ((f'{{match: "role:expert", {INT4}}}',), "model.embed_tokens.weight (role embed): no rule matches it."),
        (
            (f'{{match: "*", {INT4}}}',),
            "model.embed_tokens.weight (rule 1): role embed, shape [256, 128] is no linear and cannot be quantised",
        ),
        (
            (f'{{match: "role:norm", {INT4}}}', KEEP_REST),
            "model.layers.0.input_layernorm.weight (role norm) is no linear and cannot be quantised",
        ),
        (('{match: "role:norm", drop: true}', KEEP_REST), "role norm cannot be dropped, only mtp tensors can"),
        (('{match: "*.o_proj", keep: bf16}', KEEP_REST), "rule 1 (*.o_proj): matches no tensor."),
        (
            (f'{{match: "role:attention", {INT4}}}'.replace("128", "96"), KEEP_REST),
            "model.layers.0.self_attn.q_a_proj.weight: in_features 128 is not a multiple of group_size 96",
        ),
        (('{match: "*", keep: bf16}',), "e_score_correction_bias (rule 1): is float32 and loses its meaning in bf16"),
        (
            (f'{{match: "model.layers.1.*.experts.5.up_proj.weight", {INT4}}}', KEEP_REST),
            "all projections of all experts of a layer need one scheme.",
        ),
        (
            (f'{{match: "*.layers.1.*.q_a_proj.weight", {INT4}}}', KEEP_REST),
            "vLLM joins them into fused_qkv_a_proj, so they need one scheme or must all be kept.",
        ),
    ],
)
def test_refused_rules(rules: tuple[str, ...], said: str) -> None:
    error = refusal(tiny_headers(), recipe_of(*rules))
    assert any(said in line for line in error.message.splitlines()), error.message
    assert len(error.message.splitlines()) <= 20


def test_gptq_needs_calibration() -> None:
    error = refusal(tiny_headers(), recipe_of(f'{{match: "role:expert", {INT4}}}', KEEP_REST, calibrated=False))
    assert "gptq needs calibration text (and 71 more tensors of this rule)." in error.message
    assert "rtn" in error.hint


def test_rules_that_decide_nothing_are_warnings() -> None:
    headers = tiny_headers(first_k_dense_replace=0)
    rules = (f'{{match: "role:mlp", {INT4}}}', KEEP_REST, '{match: "role:norm", keep: f32}')
    warnings = plan_of(headers, recipe_of(*rules)).warnings
    assert (
        warnings
        == (
            "output w4a16: rule 1 (role:mlp): this model has no such tensors.",
            "output w4a16: rule 3 (role:norm): decides nothing, earlier rules take all its tensors.",
        )
        + warnings[2:]
    )


def test_no_folder() -> None:
    with pytest.raises(SourceError, match="is not a folder"):
        read_headers(V3 / "config.json")


# --- memory and serving


def test_needs_of_v3(v3: SourceHeaders) -> None:
    plan = plan_of(v3, Recipe.from_yaml("deepseek-v3-w4a16-gptq"))
    needs = conversion_needs(plan, v3.arch)
    terms = {term.what: term.nbytes for term in needs.working}
    assert terms["Hessian set"] % (18432**2 * 4) == 0
    assert needs.hidden_states is not None
    assert plan.recipe.calibration is not None
    assert needs.hidden_states.nbytes == plan.recipe.calibration.tokens * (2 * 7168 + 18432) * 4
    assert needs.ram_bytes == needs.working_bytes + needs.hidden_states.nbytes
    assert needs.disk_bytes > plan.outputs[0].nbytes + needs.hidden_states.nbytes
    data_free = plan_of(v3, Recipe.from_yaml("deepseek-v3-w4a16-rtn"))
    assert conversion_needs(data_free, v3.arch).hidden_states is None
    assert conversion_needs(data_free, v3.arch).working_bytes < needs.working_bytes


def test_text_passes_a_model_that_is_kept_too(v3: SourceHeaders) -> None:
    calibrated = plan_of(v3, Recipe.from_yaml("deepseek-v3-w4a16-gptq"))
    kept = conversion_needs(plan_of(v3, recipe_of('{match: "role:mtp", drop: true}', KEEP_REST)), v3.arch)
    assert kept.hidden_states is not None
    assert kept.hidden_states.nbytes == 524288 * (7168 + 18432) * 4
    assert 18432 * 7168 * 6 < kept.working_bytes < conversion_needs(calibrated, v3.arch).working_bytes


def test_an_mtp_layer_that_learns_is_planned_as_the_others(v3: SourceHeaders) -> None:
    """Experts with Hessians, groups of linears that read the same; nothing of it where rounding needs no text."""
    rtn = INT4.replace("gptq", "rtn")
    dropped, rounded, learning = (
        plan_of(v3, recipe_of(rule, f'{{match: "role:expert", {INT4}}}', KEEP_REST))
        for rule in (
            '{match: "role:mtp", drop: true}',
            f'{{match: "role:mtp", {rtn}}}',
            f'{{match: "role:mtp", {INT4}}}',
        )
    )
    assert [plan.calibrates_mtp for plan in (dropped, rounded, learning)] == [False, False, True]
    without, with_mtp = Work.of(rounded, v3.arch), Work.of(learning, v3.arch)
    assert (len(without.experts), len(without.untaught), without.mtp_layers) == (1, 1, 0)
    assert (len(with_mtp.experts), len(with_mtp.untaught), with_mtp.mtp_layers) == (2, 0, 1)
    phases = {phase.what: phase for phase in conversion_phases(with_mtp, Place(None, narrow=False), 1, 0)}
    assert phases["entering an MTP layer"].scratch == (with_mtp.tokens * 7168 * 4,)


def test_a_second_method_takes_a_hessian_of_its_own(v3: SourceHeaders) -> None:
    attention = '{match: "role:attention", scheme: {kind: int, bits: 8}, method: {kind: gptq, grid: 9}}'
    sets: list[int] = []
    for rules in ((), (attention,)):
        plan = plan_of(v3, recipe_of(*rules, f'{{match: "role:mlp|attention", {INT4}}}', KEEP_REST))
        terms = {term.what: term.nbytes for term in conversion_needs(plan, v3.arch).working}
        sets.append(terms["Hessian set"])
    assert sets == [3 * 18432**2 * 4, 5 * 18432**2 * 4]


def test_free_disk(v3: SourceHeaders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(v3, Recipe.from_yaml("deepseek-v3-w4a16-rtn"))
    needs = conversion_needs(plan, v3.arch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(PlanError, match=r"needs 366.4 GB of disk, .* has 1.0 GB free"):
        check_free_disk(needs, tmp_path / "a" / "b")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4321))
    with pytest.raises(PlanError, match=r"needs 12\.3 MB of disk, .* has 4\.3 kB free"):
        check_free_disk(needs, tmp_path, already_written=needs.disk_bytes - 12_300_000)
    check_free_disk(needs, tmp_path, already_written=needs.disk_bytes)


@pytest.mark.parametrize(
    ("gpus", "tensor_parallel", "partition", "weights_gib"),
    [
        ("8xA100-80GB", 8, (61,), [41.4]),
        ("5xA100-80GB", 1, (14, 12, 12, 12, 11), [63.8, 66.7, 66.7, 66.7, 62.9]),
        ("4xH200-141GB", 4, (61,), [82.2]),
    ],
)
def test_v3_fits(
    v3: SourceHeaders,
    linears: Plan,
    gpus: str,
    tensor_parallel: int,
    partition: tuple[int, ...],
    weights_gib: list[float],
) -> None:
    found = fit(linears.outputs[0], v3.arch, parse_gpus(gpus), 32768)
    assert found.placement is not None
    assert found.utilization == 0.92
    assert found.placement.tensor_parallel == tensor_parallel
    assert found.placement.partition == partition
    assert [round(nbytes / 2**30, 1) for nbytes in found.placement.stage_weights] == weights_gib
    command = found.command("OUT")
    assert ("VLLM_PP_LAYER_PARTITION=14,12,12,12,11 vllm serve OUT" in command) == (len(partition) > 1)
    assert "--max-model-len 32768" in command


def test_v3_does_not_fit_four_a100(v3: SourceHeaders, linears: Plan) -> None:
    found = fit(linears.outputs[0], v3.arch, parse_gpus("4xA100-80GB"), 32768)
    assert found.utilization is None
    assert found.spare_kv_tokens == 0
    five = fit(linears.outputs[0], v3.arch, parse_gpus("5xA100-80GB"), 32768)
    assert five.refused == ("TP=5 PP=1: 128 attention heads are not divisible by 5",)
    with pytest.raises(PlanError, match="at most 163,840 tokens"):
        fit(linears.outputs[0], v3.arch, parse_gpus("4xA100-80GB"), 200_000)


def test_groups_must_not_be_cut_by_tensor_parallelism() -> None:
    headers = tiny_headers()
    plan = plan_of(headers, recipe_of(f'{{match: "role:expert", {INT4}}}', KEEP_REST))
    found = fit(plan.outputs[0], headers.arch, parse_gpus("2xT4-16GB"), 128)
    assert any("no multiple of group_size 128" in line for line in found.refused)
    assert found.placement is not None
    assert (found.placement.tensor_parallel, sum(found.placement.partition)) == (1, 3)


@pytest.mark.parametrize(
    ("text", "name"), [("8xH100", "H100-80GB"), ("2xh200", "H200-141GB"), ("5xA100-80GB", "A100-80GB")]
)
def test_gpus_of_one_size_need_none(text: str, name: str) -> None:
    assert parse_gpus(text) == parse_gpus(f"{text[0]}x{name}")
    assert str(parse_gpus(text)) == f"{text[0]}x{name}"


def test_gpus_of_two_sizes_need_one() -> None:
    with pytest.raises(ValueError, match="found '5xA100', needed 5xA100-40GB or 5xA100-80GB"):
        parse_gpus("5xA100")


@pytest.mark.parametrize(
    "text", ["", "A100-80GB", "0xA100-80GB", "5xRTX", "5 x A100-80GB", "5xA100-80GiB", "1000xA100-80GB"]
)
def test_bad_gpus(text: str) -> None:
    with pytest.raises(ValueError, match="needed COUNTxNAME-SIZEGB"):
        parse_gpus(text)
