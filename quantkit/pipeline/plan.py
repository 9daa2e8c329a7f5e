"""Recipe + family + file headers -> what happens to every tensor, and exactly how many bytes result. No weight is
read, no torch loaded.

All that can be known to fail is refused here, in one `PlanError` that lists every problem, before hours of work begin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from quantkit.arch.base import ModelArch, Role, TensorSpec
from quantkit.errors import PlanError, SchemeError
from quantkit.formats.planned import PlannedTensor
from quantkit.pipeline.headers import IsFloat8
from quantkit.pipeline.recipe import Output, Recipe, Rule
from quantkit.pipeline.targets import Target, target_of
from quantkit.quantizers import Gptq, Method, Rtn
from quantkit.schemes import ChosenScheme, Float8Scheme, GgmlScheme, Scheme, describe
from quantkit.tensors import TensorInfo

FLOAT_DTYPES = ("BF16", "F16", "F32")
"""What a decoded tensor may be stored in."""
LINES_PER_KIND = 5
"""Problems of one kind that are printed; more are counted."""


_GPTQ, _RTN = Gptq.model_validate({}), Rtn.model_validate({})


class Action(Enum):
    """What is done with a tensor."""

    KEEP = "keep"
    DROP = "drop"
    QUANTIZE = "quantize"


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one tensor in one output.

    ``source_dtype``: dtype of the decoded source tensor. ``dtype``: dtype that a kept tensor is stored in (decoded
    view). ``scheme``: the grid of a quantised weight, `Float8Scheme` for one whose FP8 bytes are kept, else None.
    ``method`` only with QUANTIZE. ``rule``: number of the rule in the output, from 1, as messages count them.
    """

    spec: TensorSpec
    action: Action
    rule: int
    source_dtype: str
    dtype: str
    scheme: Scheme | None = None
    method: Method | None = None


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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion that nothing known speaks against. ``source_bytes``: stored bytes that will be read at least
    once."""

    recipe: Recipe
    outputs: tuple[OutputPlan, ...]
    source_bytes: int
    warnings: tuple[str, ...]

    @property
    def follows_original(self) -> bool:
        """Whether some method follows the unquantised stream beside the quantised one: then hidden states exist
        twice."""
        methods = (decision.method for output in self.outputs for decision in output.decisions.values())
        return self.recipe.propagate == "quantized" and any(m is not None and m.follows_original for m in methods)

    def decision(self, name: str, output: int = 0) -> Decision:
        """What happens to a tensor in one output."""
        return self.outputs[output].decisions[name]


@dataclass(slots=True)
class _Problems:
    """Lines by kind, so that 40,000 tensors with one fault make five lines and a count."""

    lines: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    hints: dict[str, None] = field(default_factory=dict[str, None])

    def add(self, kind: str, line: str, hint: str = "") -> None:
        self.lines.setdefault(kind, []).append(line)
        if hint:
            self.hints[hint] = None

    def raise_if_any(self) -> None:
        if not self.lines:
            return
        shown: list[str] = []
        for kind, lines in self.lines.items():
            shown += lines[:LINES_PER_KIND]
            if len(lines) > LINES_PER_KIND:
                shown.append(f"... and {len(lines) - LINES_PER_KIND:,} more: {kind}.")
        raise PlanError("\n".join(shown), hint=" ".join(list(self.hints)[:3]))


def make_plan(
    recipe: Recipe,
    arch: ModelArch,
    infos: Mapping[str, TensorInfo],
    is_float8: IsFloat8,
    block_size: tuple[int, int] = (128, 128),
) -> Plan:
    """Decide every tensor of every output. ``infos``: the decoded view of the source; ``is_float8``: whether a tensor
    is stored as FP8, in blocks of ``block_size``.

    Raises `PlanError` with every problem, one line each: tensors that are missing, unexpected or of the wrong shape;
    tensors that no rule matches; rules that cannot do what they say; schemes that do not fit a shape; what the
    output's format or runtime cannot load.
    """
    problems, warnings = _Problems(), list[str]()
    specs = tuple(arch.tensors())
    _check_source(specs, infos, problems)
    problems.raise_if_any()
    blocks = Float8Scheme(block_size=block_size)
    float8 = {spec.name: blocks for spec in specs if is_float8(spec.name)}
    outputs = tuple(
        _plan_output(output, target_of(output, recipe, arch), recipe, infos, float8, problems, warnings)
        for output in recipe.outputs
    )
    _check_shrinkage(outputs, problems)
    problems.raise_if_any()
    source_bytes = sum(source_nbytes(infos[spec.name], float8.get(spec.name)) for spec in specs)
    return Plan(recipe, outputs, source_bytes, tuple(warnings))


def _check_shrinkage(outputs: tuple[OutputPlan, ...], problems: _Problems) -> None:
    """An expert's statistics are taken and shrunk once for all outputs."""
    wanted: dict[str, tuple[float, float]] = {}
    for output in outputs:
        for name, decision in output.decisions.items():
            own = None if decision.spec.expert is None or decision.method is None else decision.method.shrinkage
            if own is not None and wanted.setdefault(name, own) != own:
                problems.add(
                    "outputs that shrink differently",
                    f"output {output.output.name}: {name}: shrink, down_shrink are {own}, but {wanted[name]} before.",
                    "Give all outputs the same shrink and down_shrink, or convert them one after the other.",
                )


def source_nbytes(info: TensorInfo, float8: Float8Scheme | None) -> int:
    """Stored bytes behind a decoded tensor: itself, or FP8 codes and their float32 block scales."""
    if float8 is None:
        return info.nbytes
    rows, columns = float8.scale_shape(info.shape)
    return info.numel + 4 * rows * columns


def _check_source(specs: Iterable[TensorSpec], infos: Mapping[str, TensorInfo], problems: _Problems) -> None:
    """The source must hold the family's tensors, all of them and nothing else."""
    known: set[str] = set()
    for spec in specs:
        known.add(spec.name)
        info = infos.get(spec.name)
        if info is None:
            hint = _MTP_HINT if spec.role is Role.MTP else "Fetch the missing shards, or compare config.json."
            problems.add("missing tensors", f"{spec.name}: missing from the source, needed {list(spec.shape)}.", hint)
        elif info.shape != spec.shape:
            problems.add(
                "wrong shapes",
                f"{spec.name}: found shape {list(info.shape)}, needed {list(spec.shape)} by config.json.",
                "config.json belongs to another checkpoint.",
            )
        elif info.dtype not in FLOAT_DTYPES:
            problems.add(
                "wrong dtypes", f"{spec.name}: found dtype {info.dtype}, needed one of {', '.join(FLOAT_DTYPES)}."
            )
    for name in infos:
        if name not in known:
            problems.add(
                "unexpected tensors",
                f"{name}: found in the source, but this architecture has no such tensor.",
                "If it is a whole extra layer, compare num_hidden_layers and num_nextn_predict_layers in config.json.",
            )


_MTP_HINT = 'A checkpoint without its MTP layer says so: set "num_nextn_predict_layers": 0 in config.json.'


def _plan_output(
    output: Output,
    target: Target,
    recipe: Recipe,
    infos: Mapping[str, TensorInfo],
    float8: Mapping[str, Float8Scheme],
    problems: _Problems,
    warnings: list[str],
) -> OutputPlan:
    matchers = [rule.matcher() for rule in output.rules]
    used = [False] * len(output.rules)
    decide = _Decider(output, target, recipe.calibration is not None, problems)
    decisions: dict[str, Decision] = {}
    for spec in target.specs:
        if target.omits(spec):
            dtype = infos[spec.official].dtype
            decisions[spec.name] = Decision(spec, Action.DROP, 0, dtype, dtype)
            continue
        number = next((number for number, matches in enumerate(matchers) if matches(spec)), None)
        rule = target.preset_rule(spec) if number is None else output.rules[number]
        if rule is None:
            where = f"output {output.name}: {spec.name} (role {spec.role.value})"
            problems.add(
                "tensors without a rule",
                f"{where}: no rule matches it.",
                'Add a last rule, e.g. {match: "*", keep: source}.',
            )
            continue
        if number is not None:
            used[number] = True
        place = 0 if number is None else number + 1
        decisions[spec.name] = decide(spec, place, rule, infos[spec.official].dtype, float8.get(spec.official))
    for number, rule in enumerate(output.rules):
        if not used[number]:
            _unused_rule(output, number + 1, rule, target, problems, warnings)
    planned = {name: _planned(decision) for name, decision in decisions.items() if decision.action is not Action.DROP}
    if not problems.lines:
        for line in target.problems(tuple(planned.values())):
            problems.add("format problems", f"output {output.name}: {line}")
    if problems.lines:
        return OutputPlan(output, target, decisions, (), ())
    warnings += [f"output {output.name}: {line}" for line in target.notes(tuple(planned.values()))]
    return OutputPlan(output, target, decisions, tuple(planned.values()), _sizes(target, decisions, planned))


@dataclass(frozen=True, slots=True)
class _Decider:
    """A rule applied to a tensor of one output."""

    output: Output
    target: Target
    calibrated: bool
    problems: _Problems

    def __call__(self, spec: TensorSpec, number: int, rule: Rule, dtype: str, float8: Float8Scheme | None) -> Decision:
        decision = self._decide(spec, number, rule, dtype, float8)
        _check_decision(self.output, decision, self.calibrated, self.problems)
        return decision

    def _decide(self, spec: TensorSpec, number: int, rule: Rule, dtype: str, float8: Float8Scheme | None) -> Decision:
        if rule.drop:
            return Decision(spec, Action.DROP, number, dtype, dtype)
        if rule.scheme is not None:
            scheme = self._fitting(spec, rule.scheme)
            return Decision(spec, Action.QUANTIZE, number, dtype, dtype, scheme, self._method(spec, rule))
        if rule.keep == "source" and float8 is not None:
            return Decision(spec, Action.KEEP, number, dtype, dtype, float8)
        kept = dtype if rule.keep in (None, "source") else rule.keep.upper()
        return Decision(spec, Action.KEEP, number, dtype, self.target.kept_dtype(spec, kept))

    def _fitting(self, spec: TensorSpec, scheme: ChosenScheme) -> ChosenScheme:
        try:
            fitting = self.target.fitting(spec, scheme)
            fitting.check(spec.name, spec.shape)
        except SchemeError as error:
            self.problems.add("schemes that do not fit", f"output {self.output.name}: {error.message}", error.hint)
            return scheme
        return fitting

    def _method(self, spec: TensorSpec, rule: Rule) -> Method:
        """The rule's method, or the output's where this tensor has the inputs that it needs."""
        if rule.method is not None:
            return rule.method
        wanted = self.output.method or (_GPTQ if self.calibrated else _RTN)
        usable = self.calibrated and not spec.table and spec.role is not Role.MTP
        return wanted if usable or not wanted.needs_inputs else _RTN


def _check_decision(output: Output, decision: Decision, calibrated: bool, problems: _Problems) -> None:
    """What a rule asks of a tensor must make sense for it."""
    spec = decision.spec
    where = f"output {output.name}: {spec.name} (rule {decision.rule})"
    if decision.action is Action.DROP and spec.role is not Role.MTP:
        problems.add(
            "tensors that cannot be dropped",
            f"{where}: role {spec.role.value} cannot be dropped, only mtp tensors can.",
        )
    if decision.action is Action.KEEP and spec.float32 and decision.source_dtype == "F32" and decision.dtype != "F32":
        problems.add("float32 tensors", f"{where}: is float32 and loses its meaning in bf16.", "Give it keep: source.")
    if decision.action is not Action.QUANTIZE:
        return
    if not (spec.linear or (spec.table and isinstance(decision.scheme, GgmlScheme))):
        problems.add(
            "tensors that cannot be quantised",
            f"{where}: role {spec.role.value}, shape {list(spec.shape)} is no linear and cannot be quantised.",
            "Put a rule with keep: source before it.",
        )
        return
    if decision.method is not None and decision.method.needs_inputs:
        _check_inputs(where, spec, decision.method.kind, calibrated, problems)


def _check_inputs(where: str, spec: TensorSpec, method: str, calibrated: bool, problems: _Problems) -> None:
    """A method that learns from inputs needs text, and a layer that the text passes."""
    if not calibrated:
        problems.add(
            f"{method} without calibration",
            f"{where}: {method} needs calibration text.",
            "Add calibration:, or use method: {kind: rtn}.",
        )
    elif spec.role is Role.MTP or spec.table:
        what = "MTP layers see" if spec.role is Role.MTP else "this tensor sees"
        problems.add(
            f"{method} without inputs",
            f"{where}: {what} no calibration tokens.",
            f"Use method: {{kind: rtn}} for role:{spec.role.value}.",
        )


def _unused_rule(
    output: Output, number: int, rule: Rule, target: Target, problems: _Problems, warnings: list[str]
) -> None:
    """A rule that decides nothing is a typing error if it is a glob or asks to quantise roles without linears, else
    worth a warning."""
    where = f"output {output.name}: rule {number} ({rule.match})"
    matches, roles, specs = rule.matcher(), rule.roles, target.specs
    if matched := [spec for spec in specs if matches(spec)]:
        taken = "mtp: drop leaves out" if all(map(target.omits, matched)) else "earlier rules take"
        warnings.append(f"{where}: decides nothing, {taken} all its tensors.")
    elif roles is None:
        problems.add(
            "rules without tensors",
            f"{where}: matches no tensor.",
            "Globs match whole names, e.g. *.self_attn.kv_b_proj.weight.",
        )
    elif rule.scheme is not None and (first := next((spec for spec in specs if spec.role in roles), None)) is not None:
        problems.add(
            "tensors that cannot be quantised",
            f"{where}: {first.name} (role {first.role.value}) is no linear and cannot be quantised.",
            "Give this role keep: source.",
        )
    else:
        warnings.append(f"{where}: this model has no such tensors.")


def _planned(decision: Decision) -> PlannedTensor:
    """The decision as the format sees it."""
    spec, scheme = decision.spec, decision.scheme
    info = TensorInfo(spec.name, spec.shape, decision.source_dtype)
    keep_dtype = decision.dtype if scheme is None else None
    return PlannedTensor(info, scheme, keep_dtype, spec.layer, spec.expert, spec.role.value)


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
    return describe(decision.scheme) + (f" {decision.method.kind}" if decision.method else "")
