"""Plans refuse methods that rescale channels where nothing can absorb the factors."""

from __future__ import annotations

import pytest

from quantkit.errors import PlanError
from quantkit.plan.phases import Place, phases
from quantkit.plan.plan import Plan, make_plan
from quantkit.plan.recipe import Recipe
from quantkit.plan.shapes import Work
from quantkit.quantizers import Awq
from quantkit.tensors import Role
from tests.convert.recipes import INT4, KEEP_REST, recipe_of
from tests.plan.test_plan import tiny_headers

AWQ = INT4.replace("gptq", "awq")
LINEARS = "role:expert|shared_expert|mlp|attention"


def plan_of(recipe: Recipe) -> Plan:
    headers = tiny_headers()
    return make_plan(recipe, headers.arch, headers.infos, headers.stored)


def refusal(recipe: Recipe) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan_of(recipe)
    return caught.value


def test_what_reads_the_same_norm_must_not_keep_its_fp8_bytes() -> None:
    error = refusal(recipe_of(f'{{match: "role:expert", {AWQ}}}', KEEP_REST))
    (line,) = error.message.splitlines()
    assert line == (
        "output w4a16: model.layers.1.mlp.shared_experts.gate_proj.weight (rule 2): keeps its FP8 bytes, which factors "
        "for model.layers.1.mlp.experts.0.gate_proj.weight (rule 1: awq) would change (and 3 more tensors of this "
        "rule)."
    )
    assert error.hint == "Quantise it too, give it keep: bf16, or take gptq in place of awq."


def test_kept_tensors_that_are_written_anew_can_be_folded() -> None:
    rules = (f'{{match: "role:expert", {AWQ}}}', '{match: "role:shared_expert", keep: bf16}', KEEP_REST)
    assert plan_of(recipe_of(*rules)).outputs[0].decision("model.layers.1.mlp.experts.0.up_proj.weight").method == Awq()


def test_a_norm_has_one_method_that_rescales() -> None:
    other = AWQ.replace("kind: awq", "kind: awq, grid: 4")
    error = refusal(recipe_of(f'{{match: "role:expert", {AWQ}}}', f'{{match: "{LINEARS}", {other}}}', KEEP_REST))
    (line,) = error.message.splitlines()
    assert line.startswith("output w4a16: model.layers.1.mlp.experts.0.gate_proj.weight (rule 1): reads what ")
    assert "mlp.shared_experts.gate_proj.weight (rule 2: awq) reads, needed the same awq for both" in line


def test_awq_beside_another_method() -> None:
    rules = (f'{{match: "role:expert", {AWQ}}}', f'{{match: "{LINEARS}", {INT4}}}', KEEP_REST)
    assert len(plan_of(recipe_of(*rules)).outputs) == 1


def test_awq_needs_calibration() -> None:
    error = refusal(recipe_of(f'{{match: "{LINEARS}", {AWQ}}}', KEEP_REST, calibrated=False))
    assert "awq needs calibration text (and" in error.message


def test_an_outputs_awq_reaches_the_mtp_layer() -> None:
    recipe = recipe_of(f'{{match: "{LINEARS}|mtp", {INT4}}}', KEEP_REST).model_dump(exclude_unset=True)
    (output,) = recipe["outputs"]
    output["method"] = {"kind": "awq"}
    for rule in output["rules"]:
        rule.pop("method", None)
    decisions = plan_of(Recipe.model_validate(recipe)).outputs[0].decisions.values()
    found = {(d.spec.role is Role.MTP, d.method) for d in decisions if d.method is not None}
    assert found == {(True, Awq()), (False, Awq())}


def test_the_search_for_factors_is_counted() -> None:
    """A phase of its own for dense blocks and experts; before rounding no Hessian is kept."""
    headers = tiny_headers()
    rules = (f'{{match: "{LINEARS}", {AWQ}}}', KEEP_REST)
    work = Work.of(plan_of(recipe_of(*rules)), headers.arch)
    found = {phase.what: phase for phase in phases(work, Place(None, narrow=False), 2, 0)}
    assert {"attention: rescaling", "mlp: rescaling", "shared_expert: rescaling", "2 experts: rescaling"} <= set(found)
    terms = [term.what for phase in found.values() for term in phase.terms]
    assert "slices" in terms
    assert "Hessian set" not in terms
    assert work.streams == 1


def test_outputs_that_rescale_have_hessians_of_their_own() -> None:
    """The same method in two outputs is two sets of statistics, unless it leaves the channels as they are."""
    headers = tiny_headers()

    def methods(rule: str) -> int:
        recipe = recipe_of(f'{{match: "{LINEARS}", {rule}}}', KEEP_REST)
        output = recipe.outputs[0]
        both = recipe.model_copy(update={"outputs": (output, output.model_copy(update={"name": "again"}))})
        return Work.of(plan_of(both), headers.arch).methods

    assert methods(INT4) == 1
    assert methods(AWQ.replace("kind: awq", "kind: awq, then: gptq")) == 2
