"""Types chosen for a size: the solver against all choices there are, rules that say exactly what was chosen, and
targets on V3's own config with made-up losses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quantkit import api
from quantkit.documents.sensitivity import FisherJob, LinearFisher, SensitivityDocument
from quantkit.errors import PlanError
from quantkit.formats.planned import PlannedTensor
from quantkit.plan.allocation import draft as draft_module
from quantkit.plan.allocation.choose import Choice, choose
from quantkit.plan.allocation.draft import KEEP_REST, OpenOutput, draft_of
from quantkit.plan.allocation.felt import felt
from quantkit.plan.allocation.rules import layer_globs, ranges, rules_of
from quantkit.plan.allocation.solve import Option, solve, total_bytes, total_loss
from quantkit.plan.headers import SourceHeaders, read_headers
from quantkit.plan.output_target import OutputTarget
from quantkit.plan.plan import Plan, make_plan
from quantkit.plan.recipe import GgufOutput, Recipe, Rule
from quantkit.plan.target_gguf import GgufTarget
from quantkit.quantizers import Gptq, Rtn
from quantkit.schemes import GgmlScheme
from quantkit.tensors import TensorSpec

ROOT = Path(__file__).resolve().parents[2]
V3 = ROOT / "examples" / "deepseek-v3-671b"
LITE = ROOT / "examples" / "true-sizes" / "deepseek-v2-lite"
NANO = ROOT / "examples" / "nano-deepseek-v3"


# ----------------------------------------------------------------------------------------------------------- the solver


def random_groups(seed: int) -> list[list[Option]]:
    made = random.Random(seed)
    return [[Option(made.randint(1, 60), made.random() ** 4) for _ in range(made.randint(1, 4))] for _ in range(6)]


@pytest.mark.parametrize("seed", range(30))
def test_a_choice_is_within_the_budget_and_near_the_best_of_all(seed: int) -> None:
    groups = random_groups(seed)
    every = list(itertools.product(*(range(len(group)) for group in groups)))
    sizes = [total_bytes(groups, chosen) for chosen in every]
    widest = max(option.nbytes for group in groups for option in group)
    for budget in range(min(sizes), max(sizes) + 1, 17):
        found = solve(groups, budget)
        assert found is not None
        assert total_bytes(groups, found) <= budget
        # What price and filling can miss is less than one tensor's worth: a budget that much smaller has no better one.
        least = [c for c, size in zip(every, sizes, strict=True) if size <= budget - widest]
        if least:
            assert total_loss(groups, found) <= min(total_loss(groups, c) for c in least) + 1e-12
    assert solve(groups, min(sizes) - 1) is None


@pytest.mark.parametrize("seed", range(10))
def test_nothing_that_saves_loss_is_left_that_would_fit(seed: int) -> None:
    groups = random_groups(seed)
    least, most = (sum(pick(option.nbytes for option in group) for group in groups) for pick in (min, max))
    budget = (least + 2 * most) // 3
    found = solve(groups, budget)
    assert found is not None
    left = budget - total_bytes(groups, found)
    for group, place in zip(groups, found, strict=True):
        for option in group:
            assert option.loss >= group[place].loss or option.nbytes - group[place].nbytes > left


# ------------------------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize(
    ("layers", "globs"),
    [([3], ["3"]), ([0, 1, 2], ["[0-2]"]), ([1, 3, 10, 11, 25], ["[13]", "1[01]", "25"]), ([9, 10], ["9", "10"])],
)
def test_layers_are_named_by_globs(layers: list[int], globs: list[str]) -> None:
    assert layer_globs(layers) == globs


def test_layers_are_shown_as_ranges() -> None:
    assert ranges([7, 3, 4, 5, 0]) == "0, 3-5, 7"


def test_rules_match_what_was_assigned_and_nothing_else() -> None:
    specs = [spec for spec in read_headers(V3).arch.tensors() if spec.linear and spec.layer is not None]
    some = random.Random(0).sample(sorted({(s.layer, s.projection, s.role) for s in specs}, key=str), 200)
    schemes = [GgmlScheme.model_validate({"type": kind}) for kind in ("Q3_K", "Q4_K")]
    assigned = {
        spec.name: schemes[hash_of(spec) % 2] for spec in specs if (spec.layer, spec.projection, spec.role) in some
    }
    rules = rules_of((spec, assigned[spec.name]) for spec in specs if spec.name in assigned)
    assert len(rules) < 200
    matchers = [rule.matcher() for rule in rules]
    for spec in random.Random(1).sample(specs, 500):
        found = [rule.scheme for rule, matches in zip(rules, matchers, strict=True) if matches(spec)]
        assert found == ([assigned[spec.name]] if spec.name in assigned else [])


def hash_of(spec: TensorSpec) -> int:
    return (spec.layer or 0) + len(spec.projection or "")


# ---------------------------------------------------------------------------------------------------------- the targets


def recipe(target: dict[str, Any], **output: Any) -> Recipe:
    made = {"name": "made", "format": "gguf", "target": target, **output}
    text = {"data": ["builtin:mixed"], "tokens": 8192, "sequence_length": 512}
    return Recipe.from_dict({"version": 1, "calibration": text, "sensitivity": "felt", "outputs": [made]})


def made_up(headers: SourceHeaders, asked: Recipe) -> tuple[OpenOutput, SensitivityDocument]:
    """Of a model whose later layers feel more, and whose losses fall by four with each bit."""
    job = FisherJob(
        quantkit="", torch="", source="", tokens_sha256="", rows=1, length=2, seed=0, device="cpu", threads=1,
        dtype="F32", hidden=headers.arch.hidden_size, sublayers=(2,) * headers.arch.n_layers,
    )  # fmt: skip
    specs = {spec.name: spec for spec in headers.arch.tensors() if spec.linear and spec.layer is not None}
    inside = {name: spec for name, spec in specs.items() if (spec.layer or 0) < headers.arch.n_layers}
    linears = {name: LinearFisher(tokens=1, fisher=1.0 + (spec.layer or 0)) for name, spec in inside.items()}
    draft = draft_of(asked.outputs[0], asked, headers, linears)
    losses: dict[str, dict[str, float]] = {}
    for name, schemes in draft.needed().items():
        spec = specs[name.partition(":")[0]]
        feels = linears[spec.name].fisher * spec.shape[0] * spec.shape[1] * 1e-9
        losses[name] = {label: feels * 4 ** -scheme.bpw(spec.shape) for label, scheme in schemes.items()}
    return draft, SensitivityDocument(job=job, linears=linears, losses=losses)


def chosen(source: Path, target: dict[str, Any], **output: Any) -> tuple[Choice, SourceHeaders, Recipe]:
    headers, asked = read_headers(source), recipe(target, **output)
    draft, document = made_up(headers, asked)
    found = choose(draft, document, headers.arch, source)
    return found, headers, asked.model_copy(update={"outputs": (found.output,)})


KEEP = {"match": "*", "keep": "source"}


def made_plan(source: Path, rules: list[dict[str, Any]]) -> Plan:
    output = {"name": "made", "format": "gguf", "rules": rules}
    headers, asked = read_headers(source), Recipe.from_dict({"version": 1, "outputs": [output]})
    return make_plan(asked, headers.arch, headers.infos, headers.stored)


@pytest.mark.parametrize("form", ["gguf", "compressed-tensors"])
def test_files_have_at_most_the_size_and_the_rules_say_so_again(form: str) -> None:
    for size in (4_500_000, "5MB", 5_700_001):
        found, headers, settled = chosen(NANO, {"size": size}, format=form)
        limit = 5_000_000 if size == "5MB" else int(size)
        (output,) = make_plan(settled, headers.arch, headers.infos, headers.stored).outputs
        assert output.target.file_bytes(NANO, output.planned) == found.nbytes <= limit
        assert limit - found.nbytes < 300_000  # less than a layer's stack of experts would take a type more
        assert found.output.target is None
        assert found.output.predicted_kl == pytest.approx(found.predicted_kl)


def test_more_bytes_are_predicted_to_lose_less() -> None:
    found, _, _ = chosen(NANO, {"bpw": 5})
    losses = [point.predicted_kl for point in found.curve]
    sizes = [point.nbytes for point in found.curve]
    assert losses == sorted(losses, reverse=True)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes) > 5
    assert [nbytes for nbytes, _ in found.output.predicted_curve] == sizes
    assert [kl for _, kl in found.output.predicted_curve] == pytest.approx(losses, rel=1e-3)


def test_bits_per_weight_are_those_of_the_plan() -> None:
    found, headers, settled = chosen(NANO, {"bpw": 5.5})
    (output,) = make_plan(settled, headers.arch, headers.infos, headers.stored).outputs
    assert 5.4 < output.bpw <= 5.5
    assert found.limit == "5.5 bpw"


def test_later_layers_of_this_model_get_more_bits() -> None:
    found, _, _ = chosen(NANO, {"bpw": 5})
    bits = {
        layer: [g.schemes[0].bpw((256, 256)) for g in found.groups for s in g.specs if s.layer == layer and s.expert]
        for layer in (1, 2)
    }
    assert sum(bits[1]) <= sum(bits[2])


def test_rules_come_first_and_are_kept() -> None:
    own = [{"match": "role:embed|lm_head", "keep": "f16"}, {"match": "role:attention", "scheme": "Q5_K"}]
    found, headers, settled = chosen(NANO, {"bpw": 7}, rules=own)
    assert [rule.match for rule in found.output.rules[:2]] == [rule["match"] for rule in own]
    (output,) = make_plan(settled, headers.arch, headers.infos, headers.stored).outputs
    treated = {size.what for size in output.sizes if size.role.value in ("embed", "lm_head")}
    assert treated == {"f16"}


def test_headers_that_grow_with_the_choice_leave_no_room_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each byte of data took one of a header: the budget of the data is found nevertheless."""

    def file_bytes(self: GgufTarget, source: Path, tensors: Sequence[PlannedTensor]) -> int:
        return 2 * sum(map(self.nbytes, tensors))

    monkeypatch.setattr(GgufTarget, "file_bytes", file_bytes)
    found, _, _ = chosen(NANO, {"size": 10_000_000})
    assert 9_400_000 < found.nbytes <= 10_000_000


def test_mtp_layers_are_kept_if_that_is_asked_for() -> None:
    found, headers, settled = chosen(NANO, {"bpw": 6.5}, mtp="keep")
    (output,) = make_plan(settled, headers.arch, headers.infos, headers.stored).outputs
    kept = {size.what for size in output.sizes if size.role.value == "mtp"}
    assert "Q8_0 gptq" in kept
    assert "dropped" not in kept
    assert not any(rule.drop for rule in found.output.rules)
    dropped, headers, settled = chosen(NANO, {"bpw": 6.5})
    (output,) = make_plan(settled, headers.arch, headers.infos, headers.stored).outputs
    assert {size.what for size in output.sizes if size.role.value == "mtp"} == {"dropped"}
    assert not dropped.output.keeps_mtp


def test_a_method_may_be_an_object() -> None:
    own = [Rule(match="role:embed|lm_head", scheme=GgmlScheme(type="Q8_0"), method=Rtn())]
    method = Gptq(polish=1)
    output = GgufOutput(name="made", format="gguf", target=OutputTarget(bpw=7), rules=tuple(own), method=method)
    headers, asked = read_headers(NANO), recipe({"bpw": 7}).model_copy(update={"outputs": (output,)})
    draft, document = made_up(headers, asked)
    found = choose(draft, document, headers.arch, NANO).output
    assert found.method == method
    assert found.rules[0] == own[0]
    assert found.target is None
    assert "target" not in found.model_fields_set


# ------------------------------------------------------------------------------------------- experts without tokens


def test_experts_without_tokens_are_taken_for_mean_ones() -> None:
    headers = read_headers(NANO)
    specs = [spec for spec in headers.arch.tensors() if spec.linear and spec.layer in (1, 2)]
    linears = {
        s.name: LinearFisher(tokens=0 if s.expert in (0, 3) else 5, fisher=0.0 if s.expert in (0, 3) else s.expert or 2)
        for s in specs
    }
    found = felt(specs, linears)
    experts = {s.expert: found[s.name] for s in specs if s.layer == 1 and s.expert is not None}
    seen = [expert for expert in experts if expert not in (0, 3)]
    assert experts[0] == experts[3] == sum(seen) / len(seen)
    assert all(experts[expert] == expert for expert in seen)
    assert all(found[s.name] == 2 for s in specs if s.expert is None)


def test_a_layer_whose_measured_experts_saw_no_token_still_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 experts 2 are measured; that the pass's text did not reach these does not make their layer harmless."""
    monkeypatch.setattr(draft_module, "SAMPLED_EXPERTS", 2)
    headers, asked = read_headers(NANO), recipe({"bpw": 5})
    draft, document = made_up(headers, asked)
    whole = choose(draft, document, headers.arch, NANO).predicted_kl
    unseen = {
        name: LinearFisher(tokens=0, fisher=0.0) if ".experts.0." in name or ".experts.4." in name else one
        for name, one in document.linears.items()
    }
    poor = document.model_copy(update={"linears": unseen})
    assert choose(draft, poor, headers.arch, NANO).predicted_kl == pytest.approx(whole)


def test_the_largest_choice_that_gpus_hold() -> None:
    found, headers, settled = chosen(LITE, {"gpus": "2xA2000-6GB", "context": 8192})
    made = api.plan(LITE, settled, gpus="2xA2000-6GB", context=8192)
    assert made.fits is not None
    assert made.fits[0].fits
    assert made.outputs[0].nbytes > 0.6 * 2 * 0.98 * 6 * 2**30
    assert len(found.output.rules) < 200
    wider = make_plan(
        settled.model_copy(update={"outputs": (found.output.model_copy(update={"rules": (EIGHT, *WIDE)}),)}),
        headers.arch, headers.infos, headers.stored,
    )  # fmt: skip
    assert wider.outputs[0].nbytes > made.outputs[0].nbytes


EIGHT = Rule.model_validate({"match": "role:attention|mlp|shared_expert|expert", "scheme": "Q8_0"})
WIDE = (Rule.model_validate({"match": "role:embed|lm_head", "scheme": "Q8_0"}), KEEP_REST)


def test_vllm_gets_one_scheme_for_what_it_joins() -> None:
    found, headers, settled = chosen(LITE, {"bpw": 4.9}, format="compressed-tensors")
    (output,) = make_plan(settled, headers.arch, headers.infos, headers.stored).outputs  # refuses what vLLM joins
    assert 4.8 < output.bpw <= 4.9
    assert {s.expert is None for g in found.groups for s in g.specs} == {True, False}


def test_types_can_be_restricted() -> None:
    found, _, _ = chosen(NANO, {"bpw": 6.2, "types": ["q5_k", "Q8_0"]})
    # Rows of 32-wide blocks get what llama-quantize gives them.
    assert {group.schemes[0].label for group in found.groups} <= {"Q5_K", "Q5_1", "Q8_0"}


def test_one_type_is_said_to_be_no_choice() -> None:
    (output,) = made_plan(NANO, EVERYWHERE).outputs
    found, _, _ = chosen(
        NANO, {"size": output.target.file_bytes(NANO, output.planned), "types": ["Q8_0"]}, rules=TABLES
    )
    assert found.left == "each linear has one type only that fits it: there is nothing to choose"


TABLES = [{"match": "role:embed|lm_head", "scheme": "Q8_0"}]
EVERYWHERE = [*TABLES, {"match": "role:attention|mlp|shared_expert|expert", "scheme": "Q8_0"}, KEEP]


@pytest.mark.parametrize(
    ("target", "output", "message"),
    [
        ({"size": 1000}, {}, "target 1,000 bytes: the smallest choice of types takes"),
        ({"size": "1GB"}, {}, "target 1,000,000,000 bytes: the choice of types that loses least (Q8_0) takes"),
        ({"bpw": 1.5}, {}, "target 1.5 bpw: the smallest choice of types takes"),
        ({"bpw": 6, "types": ["int4"]}, {}, "target.types: found 'int4', needed some of Q4_0, Q4_1"),
        ({"bpw": 6, "types": ["Q4_K"]}, {"format": "compressed-tensors"}, "target.types: found 'Q4_K', needed some of"),
        ({"bpw": 6}, {"rules": [{"match": "*", "scheme": "Q4_K"}]}, ""),
    ],
)
def test_what_cannot_be_kept_is_refused(target: dict[str, Any], output: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as refused:
        chosen(NANO, target, **output)
    assert message in refused.value.message
    assert refused.value.message.count("\n") == 0 or not message


def test_a_model_too_large_for_gpus_is_refused() -> None:
    with pytest.raises(PlanError, match="target 1xA2000-4GB: the smallest choice of types, .* does not fit these GPUs"):
        chosen(LITE, {"gpus": "1xA2000-4GB"})


def test_a_target_without_a_choice_is_no_plan() -> None:
    headers, asked = read_headers(NANO), recipe({"bpw": 5})
    with pytest.raises(PlanError, match="has a target, and no types were chosen"):
        make_plan(asked, headers.arch, headers.infos, headers.stored)


def test_a_target_survives_being_written() -> None:
    target = OutputTarget(bpw=4.0)
    assert OutputTarget.model_validate(target.model_dump()) == target
