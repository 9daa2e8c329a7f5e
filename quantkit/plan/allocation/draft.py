"""An output with a target before its types are chosen: what is fixed, which linears share a type, what each may get,
and whose losses must be known for that. No torch, no weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantkit.documents.sensitivity import LinearFisher
from quantkit.errors import PlanError, SchemeError
from quantkit.formats.planned import PlannedTensor
from quantkit.plan.allocation.rules import rules_of
from quantkit.plan.decide import Action, Decision
from quantkit.plan.headers import SourceHeaders
from quantkit.plan.output_target import OutputTarget
from quantkit.plan.plan import OutputPlan, make_plan
from quantkit.plan.recipe import Output, Recipe, Rule
from quantkit.plan.targets import Target
from quantkit.schemes import ChosenScheme
from quantkit.tensors import Role, TensorSpec

SAMPLED_EXPERTS = 32
"""Experts of a layer whose losses are measured; the others lose like them, in proportion to their Fisher scalars."""
_LINEARS = (Role.ATTENTION, Role.MLP, Role.SHARED_EXPERT, Role.EXPERT)
KEEP_REST = Rule.model_validate({"match": "*", "keep": "source"})
DROP_MTP = Rule.model_validate({"match": "role:mtp", "drop": True})


@dataclass(frozen=True, slots=True)
class DraftGroup:
    """Linears that need one scheme, and the schemes that fit all of them."""

    specs: tuple[TensorSpec, ...]
    schemes: tuple[ChosenScheme, ...]


@dataclass(frozen=True, slots=True)
class OpenOutput:
    """``output``: as the recipe has it; ``plan``: with every free linear kept in bfloat16; ``groups``: what is to be
    chosen; ``fixed``: linears to which rules give a scheme; ``others``: what gets the format's usual scheme, or is kept
    (None), because no sensitivity of it is known."""

    output: Output
    plan: OutputPlan
    groups: tuple[DraftGroup, ...]
    fixed: tuple[DraftGroup, ...]
    others: tuple[tuple[TensorSpec, ChosenScheme | None], ...]

    def needed(self) -> dict[str, dict[str, ChosenScheme]]:
        """Linear (or part of one) -> label -> scheme, of every loss that a choice depends on."""
        found: dict[str, dict[str, ChosenScheme]] = {}
        for group in (*self.groups, *self.fixed):
            for spec in measured(group.specs):
                found.setdefault(spec.name, {}).update({scheme.label: scheme for scheme in group.schemes})
        return found

    @property
    def target(self) -> Target:
        """The output joined with the model."""
        return self.plan.target

    @property
    def wanted(self) -> OutputTarget:
        """How large it may be."""
        assert self.output.target is not None, f"output {self.output.name} has no target"
        return self.output.target


def measured(specs: Sequence[TensorSpec]) -> Iterator[TensorSpec]:
    """Those of a group whose losses are measured: of routed experts `SAMPLED_EXPERTS`, evenly spread."""
    experts = 1 + max((spec.expert for spec in specs if spec.expert is not None), default=0)
    step = -(-experts // SAMPLED_EXPERTS)
    return (spec for spec in specs if spec.expert is None or spec.expert % step == 0)


def draft_of(output: Output, recipe: Recipe, headers: SourceHeaders, linears: Mapping[str, LinearFisher]) -> OpenOutput:
    """``linears``: of the Fisher pass. Raises `PlanError` for what `make_plan` refuses, for types that the format
    lacks, and if nothing is left to be chosen."""
    wanted = output.target
    assert wanted is not None, f"output {output.name} has no target"
    plan = _plan_of_rest(output, recipe, headers)
    choices = _choices(output.name, wanted, plan.target)
    free = [d.spec for d in plan.decisions.values() if d.rule > len(output.rules) and d.action is Action.KEEP]
    known = [spec for spec in free if spec.linear and spec.role in _LINEARS and spec.official in linears]
    drafted = [DraftGroup(specs, _fitting(plan.target, specs, choices)) for specs in _joined(plan.target, known)]
    groups = tuple(group for group in drafted if group.schemes)
    if not groups:
        raise PlanError(
            f"output {output.name}: target {wanted}: there is no linear whose type could be chosen.",
            hint="Leave out rules that match them, or the target.",
        )
    chosen = {spec.name for group in groups for spec in group.specs}
    others = tuple((s, _unchosen(plan.target, s)) for s in free if s.name not in chosen and (s.linear or s.table))
    return OpenOutput(output, plan, groups, tuple(_fixed(plan.decisions.values(), linears)), others)


def _plan_of_rest(output: Output, recipe: Recipe, headers: SourceHeaders) -> OutputPlan:
    """The output with what its rules say, everything else kept."""
    specs = tuple(headers.arch.tensors())
    roles = {spec.role for spec in specs}
    linears = "|".join(role.value for role in _LINEARS if role in roles)
    keep_linears = Rule.model_validate({"match": f"role:{linears}", "keep": "bf16"})
    mtp = [spec for spec in specs if spec.role is Role.MTP]
    keep_mtp = rules_of((spec, None) for spec in mtp if spec.linear) if output.keeps_mtp else ()
    drop_mtp = (DROP_MTP,) if mtp and not output.keeps_mtp else ()
    rules = (*output.rules, *drop_mtp, *keep_mtp, keep_linears, KEEP_REST)
    kept = output.model_copy(update={"target": None, "rules": rules})
    alone = recipe.model_copy(update={"outputs": (kept,)})
    return make_plan(alone, headers.arch, headers.infos, headers.stored).outputs[0]


def _choices(name: str, wanted: OutputTarget, target: Target) -> tuple[ChosenScheme, ...]:
    try:
        return target.choices(wanted.types)
    except SchemeError as error:
        raise PlanError(f"output {name}: target.types: {error.message}") from None


def _joined(target: Target, specs: Iterable[TensorSpec]) -> list[tuple[TensorSpec, ...]]:
    """Those that need one scheme, together."""
    found: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        found.setdefault(target.joined(spec), []).append(spec)
    return [tuple(group) for group in found.values()]


def _fitting(target: Target, specs: Sequence[TensorSpec], choices: Iterable[ChosenScheme]) -> tuple[ChosenScheme, ...]:
    """What the choices become for these shapes, each once; those that do not fit one of them left out."""
    shapes = {spec.shape: spec for spec in specs}.values()
    found: dict[str, ChosenScheme] = {}
    for scheme in choices:
        fitted = [_fitted(target, spec, scheme) for spec in shapes]
        first = fitted[0]
        if first is not None and all(other == first for other in fitted):
            found[first.label] = first
    return tuple(found.values())


def _fitted(target: Target, spec: TensorSpec, scheme: ChosenScheme) -> ChosenScheme | None:
    try:
        fitted = target.fitting(spec, scheme)
        fitted.check(spec.name, spec.shape)
    except SchemeError:
        return None
    return fitted


def _unchosen(target: Target, spec: TensorSpec) -> ChosenScheme | None:
    scheme = target.unchosen(spec)
    return None if scheme is None else _fitted(target, spec, scheme)


def _fixed(decisions: Iterable[Decision], linears: Mapping[str, LinearFisher]) -> Iterator[DraftGroup]:
    """Linears that rules quantise, those of a layer, projection and scheme together."""
    found: dict[tuple[object, ...], tuple[ChosenScheme, list[TensorSpec]]] = {}
    for decision in decisions:
        spec, quantising = decision.spec, decision.quantising
        if quantising is not None and spec.official in linears and spec.role in _LINEARS:
            key = (spec.layer, spec.role, spec.projection, spec.name[-2:], quantising[0].label)
            found.setdefault(key, (quantising[0], []))[1].append(spec)
    return (DraftGroup(tuple(specs), (scheme,)) for scheme, specs in found.values())


def planned_with(draft: OpenOutput, schemes: Mapping[str, ChosenScheme]) -> list[PlannedTensor]:
    """The output's tensors with these schemes, by name."""
    given = {spec.name: scheme for spec, scheme in draft.others if scheme is not None}
    given.update(schemes)
    return [
        PlannedTensor(tensor.info, given[tensor.name], None, tensor.spec) if tensor.name in given else tensor
        for tensor in draft.plan.planned
    ]
