"""Recipe + family + file headers -> what happens to every tensor, and exactly how many bytes result. No weight is
read, no torch loaded.

All that can be known to fail is refused here, in one `PlanError` that lists every problem, before hours of work begin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quantkit.arch.base import ModelArch
from quantkit.formats.planned import PlannedTensor
from quantkit.plan.decide import Action, Decider, Decision, Problems, unused_rule
from quantkit.plan.foldable import refuse_unfoldable
from quantkit.plan.lengths import length_problems
from quantkit.plan.packed import rounded_again
from quantkit.plan.recipe import Output, Recipe
from quantkit.plan.row_scales import without_row_gains
from quantkit.plan.source_tensors import SourceTensors, listed_specs, match_source
from quantkit.plan.targets import Target, target_of
from quantkit.plan.text_notes import text_notes
from quantkit.schemes import Scheme, describe
from quantkit.tensors import Role, TensorInfo, TensorSpec


@dataclass(frozen=True, slots=True)
class RoleSize:
    """One line of the summary. ``what``: "int4 g128 gptq", "bf16"...; ``nbytes``: exact stored tensor data; dropped
    tensors have 0."""

    role: Role
    what: str
    tensors: int
    parameters: int
    nbytes: int

    @property
    def bpw(self) -> float:
        """Stored bits per weight, scales and shapes included."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, slots=True, repr=False)
class OutputPlan:
    """One checkpoint to be written: ``planned`` and ``decisions`` in official order; ``sizes`` by role and
    treatment."""

    output: Output
    target: Target
    decisions: Mapping[str, Decision]
    planned: tuple[PlannedTensor, ...]
    sizes: tuple[RoleSize, ...]

    @property
    def tensors(self) -> int:
        """Weights in the output (not counting scales and shapes)."""
        return len(self.planned)

    @property
    def parameters(self) -> int:
        """Weights that the output holds."""
        return sum(size.parameters for size in self.sizes if size.nbytes)

    @property
    def repacked(self) -> int:
        """Linears whose codes and scales are the source's."""
        return sum(decision.repacks for decision in self.decisions.values())

    @property
    def nbytes(self) -> int:
        """Exact bytes of tensor data: codes, scales, shapes; without file headers."""
        return sum(size.nbytes for size in self.sizes)

    @property
    def bpw(self) -> float:
        """Stored bits per weight of the whole checkpoint."""
        return 8 * self.nbytes / self.parameters

    def decision(self, name: str) -> Decision:
        """What happens to a tensor of the source."""
        return self.decisions[name]

    def stored_bytes(self, tensor: PlannedTensor) -> int:
        """Exact bytes of one of ``planned``, scales and shapes included."""
        return self.target.nbytes(tensor)

    def __repr__(self) -> str:
        """One line: V3's decisions would fill a thousand screens."""
        return (
            f"<OutputPlan {self.output.name} ({self.output.format}): {self.tensors:,} tensors, {self.nbytes:,} bytes, "
            f"{self.bpw:.3f} bpw>"
        )


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """A conversion that nothing known speaks against. ``source_bytes``: stored bytes that will be read at least
    once."""

    recipe: Recipe
    outputs: tuple[OutputPlan, ...]
    source_bytes: int
    warnings: tuple[str, ...]

    @property
    def follows_original(self) -> bool:
        """Whether some method, tuning, or the fit of the routers follows the unquantised stream beside the quantised
        one: then hidden states exist twice."""
        methods = (decision.method for output in self.outputs for decision in output.decisions.values())
        tuned = self.recipe.tune is not None and self.recipe.tune.alpha > 0
        fitted = self.recipe.router != "keep"
        follows = tuned or fitted or any(m is not None and m.follows_original for m in methods)
        return self.recipe.propagate == "quantized" and follows

    @property
    def calibrates_mtp(self) -> bool:
        """Whether the calibration text goes on into the MTP layers: if a method of some output learns from their
        inputs, or an imatrix of theirs is written. Else they are rounded without, at no cost."""
        if self.recipe.calibration is None:
            return False
        decisions = (decision for output in self.outputs for decision in output.decisions.values())
        methods = (decision.method for decision in decisions if decision.spec.role is Role.MTP)
        return any(method is not None and method.needs_inputs for method in methods) or any(
            output.target.wants_mtp_importance for output in self.outputs
        )

    def decision(self, name: str, output: int = 0) -> Decision:
        """What happens to a tensor in one output."""
        return self.outputs[output].decisions[name]

    def __repr__(self) -> str:
        return f"<Plan {', '.join(map(repr, self.outputs))}; {self.source_bytes:,} bytes to read>"


def make_plan(
    recipe: Recipe,
    arch: ModelArch,
    infos: Mapping[str, TensorInfo],
    stored: Mapping[str, Scheme],
) -> Plan:
    """Decide every tensor of every output. ``infos``: the decoded view of the source; ``stored``: what linears are
    stored in that are not plain.

    Raises `PlanError` with every problem, one line each: tensors that are missing, unexpected or of the wrong shape;
    tensors that no rule matches; rules that cannot do what they say; schemes that do not fit a shape; what the
    output's format or runtime cannot load.
    """
    problems, warnings = Problems(), list[str]()
    specs = listed_specs(arch, infos)
    source = match_source(arch, specs, infos, problems)
    warnings += source.notes
    problems.raise_if_any()
    outputs = tuple(
        _plan_output(output, target_of(output, recipe, arch, specs), arch, recipe, source, stored, problems, warnings)
        for output in recipe.outputs
    )
    if recipe.router != "keep" and not any(spec.role is Role.ROUTER for spec in specs):
        problems.add("routers", f"router: {recipe.router}: this model has no router.", "Take router: keep.")
    for line in length_problems(recipe, arch):
        problems.add(
            "length", line, "Take shorter sequences: until then attention is dense, and nothing is approximate."
        )
    problems.raise_if_any()
    warnings += text_notes(recipe, arch)
    present = [spec.name for spec in specs if spec.name in infos]
    source_bytes = sum(source_nbytes(infos[name], stored.get(name)) for name in present)
    return Plan(recipe, outputs, source_bytes, tuple(warnings))


def source_nbytes(info: TensorInfo, stored: Scheme | None) -> int:
    """Stored bytes behind a decoded tensor: itself, or codes and scales."""
    return info.nbytes if stored is None else round(info.numel * stored.bpw(info.shape) / 8)


def largest_layer(arch: ModelArch, infos: Mapping[str, TensorInfo], stored: Mapping[str, Scheme]) -> int:
    """Bytes that the largest layer takes where it is stored. ``infos``, ``stored``: as for `make_plan`."""
    layers: dict[int, int] = {}
    for spec in arch.tensors():
        info = infos.get(spec.name)
        if spec.layer is not None and info is not None:
            layers[spec.layer] = layers.get(spec.layer, 0) + source_nbytes(info, stored.get(spec.name))
    return max(layers.values(), default=0)


def _plan_output(
    output: Output,
    target: Target,
    arch: ModelArch,
    recipe: Recipe,
    source: SourceTensors,
    stored: Mapping[str, Scheme],
    problems: Problems,
    warnings: list[str],
) -> OutputPlan:
    if output.target is not None:
        problems.add("targets", f"output {output.name}: has a target, and no types were chosen (`choose_types`).")
        return OutputPlan(output, target, {}, (), ())
    decisions = _decisions(output, target, recipe, source, stored, problems, warnings)
    refuse_unfoldable(output.name, decisions, arch, problems)
    planned = {name: _planned(decision) for name, decision in decisions.items() if decision.action is not Action.DROP}
    if not problems.lines:
        for line in target.problems(tuple(planned.values())):
            problems.add("format problems", f"output {output.name}: {line}")
    if problems.lines:
        return OutputPlan(output, target, decisions, (), ())
    tensors = tuple(planned.values())
    lines = [*_dropped_mtp(target, decisions, source), *target.notes(tensors)]
    lines += [*rounded_again(decisions.values(), target), *without_row_gains(decisions.values())]
    warnings += [f"output {output.name}: {line}" for line in lines]
    return OutputPlan(output, target, decisions, tuple(planned.values()), _sizes(target, decisions, planned))


def _dropped_mtp(target: Target, decisions: Mapping[str, Decision], source: SourceTensors) -> Iterator[str]:
    """A line if MTP layers that the source has are left out."""
    dropped = [d.spec for d in decisions.values() if d.action is Action.DROP and d.spec.official not in source.faults]
    layers = len({spec.layer for spec in dropped})
    if layers:
        counted = "the MTP layer" if layers == 1 else f"the {layers} MTP layers"
        yield (
            f"leaves out {counted} of the source ({len(dropped):,} tensors): runtimes cannot use it for speculative "
            f"decoding. A recipe keeps it by {target.keep_mtp} (--print-recipe writes one)."
        )


def _decisions(
    output: Output,
    target: Target,
    recipe: Recipe,
    source: SourceTensors,
    stored: Mapping[str, Scheme],
    problems: Problems,
    warnings: list[str],
) -> dict[str, Decision]:
    """What the first rule that matches, or else the preset, says of each tensor; also judges rules that decide
    nothing."""
    matchers = [rule.matcher() for rule in output.rules]
    used: set[int] = set()
    decide = Decider(output, target, recipe.calibration is not None, problems)
    decisions: dict[str, Decision] = {}
    for spec in target.specs:
        dtype = source.infos[spec.official].dtype
        action = _without_rules(target, spec)
        if action is not None:
            decisions[spec.name] = Decision(spec, action, 0, dtype, dtype)
            continue
        number = next((number for number, matches in enumerate(matchers, 1) if matches(spec)), 0)
        rule = output.rules[number - 1] if number else target.preset_rule(spec)
        used.add(number)
        if rule is None:
            _lacks_rule(output, spec, problems)
        else:
            decisions[spec.name] = decide(spec, number, rule, dtype, stored.get(spec.official))
    source.refuse_kept(decisions.values(), problems)
    for number, rule in enumerate(output.rules, 1):
        if number not in used:
            unused_rule(output, number, rule, target, problems, warnings)
    return decisions


def _without_rules(target: Target, spec: TensorSpec) -> Action | None:
    """What is done to a tensor whatever the rules say, None if they decide."""
    if target.omits(spec):
        return Action.DROP
    return Action.KEEP if spec.role is Role.VISION else None


def _lacks_rule(output: Output, spec: TensorSpec, problems: Problems) -> None:
    problems.add(
        "tensors without a rule",
        f"output {output.name}: {spec.name} (role {spec.role.value}): no rule matches it.",
        'Add a last rule, e.g. {match: "*", keep: source}.',
    )


def _planned(decision: Decision) -> PlannedTensor:
    """The decision as the format sees it."""
    spec, scheme = decision.spec, decision.scheme
    info = TensorInfo(spec.name, spec.shape, decision.source_dtype)
    keep_dtype = decision.dtype if scheme is None else None
    return PlannedTensor(info, scheme, keep_dtype, spec)


def _sizes(
    target: Target, decisions: Mapping[str, Decision], planned: Mapping[str, PlannedTensor]
) -> tuple[RoleSize, ...]:
    """Exact bytes by role and treatment, in order of first appearance. Tensors of one shape and treatment are
    measured once."""
    measured: dict[tuple[object, ...], int] = {}
    totals: dict[tuple[Role, str], list[int]] = {}
    for name, decision in decisions.items():
        spec, what = decision.spec, _what(decision)
        key = (spec.shape, what, decision.scheme)
        if key not in measured:
            measured[key] = target.nbytes(planned[name]) if name in planned else 0
        total = totals.setdefault((spec.role, what), [0, 0, 0])
        total[0] += 1
        total[1] += math.prod(spec.shape)
        total[2] += measured[key]
    return tuple(RoleSize(role, what, *total) for (role, what), total in totals.items())


def _what(decision: Decision) -> str:
    if decision.action is Action.DROP:
        return "dropped"
    if decision.scheme is None:
        return decision.dtype.lower()
    how = decision.method.kind if decision.method else "repack" if decision.repacks else ""
    return f"{describe(decision.scheme)} {how}".rstrip()
