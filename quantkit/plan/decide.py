"""A rule applied to a tensor: what will happen to it in one output, or the line that says why it cannot."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from quantkit.errors import PlanError, SchemeError
from quantkit.formats.safetensors.header import printable
from quantkit.plan.recipe import Output, Rule
from quantkit.plan.targets import Target
from quantkit.quantizers import AskedMethod, Gptq, Method, Repack, Rtn
from quantkit.schemes import ChosenScheme, Float8Scheme, Scheme, describe
from quantkit.schemes.repacking import repacks
from quantkit.tensors import Role, TensorInfo, TensorSpec

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
    view). ``scheme``: the grid of a quantised weight, also of one whose codes and scales are kept, else None.
    ``stored``: the source's scheme, None for plain tensors. ``method`` only with QUANTIZE. ``rule``: number of the rule
    in the output, from 1, as messages count them; 0 for a preset or an option.
    """

    spec: TensorSpec
    action: Action
    rule: int
    source_dtype: str
    dtype: str
    scheme: Scheme | None = None
    method: Method | None = None
    stored: Scheme | None = None

    @property
    def repacks(self) -> bool:
        """Whether codes and scales of a packed source are kept (FP8 blocks are not meant, which are kept as bytes)."""
        return self.action is Action.KEEP and self.scheme is not None and not isinstance(self.scheme, Float8Scheme)

    @property
    def quantising(self) -> tuple[ChosenScheme, Method] | None:
        """Scheme and method of a tensor whose codes are chosen, None for others."""
        if self.method is None or self.scheme is None or isinstance(self.scheme, Float8Scheme):
            return None
        return self.scheme, self.method

    @property
    def source_nbytes(self) -> int:
        """Bytes of the decoded source tensor, or of the part of it that is meant."""
        return TensorInfo(self.spec.name, self.spec.shape, self.source_dtype).nbytes


@dataclass(slots=True)
class Problems:
    """Lines by kind, so that 40,000 tensors with one fault make five lines and a count."""

    lines: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    hints: dict[str, None] = field(default_factory=dict[str, None])
    rules: dict[tuple[str, str], _FaultyRule] = field(default_factory=dict[tuple[str, str], "_FaultyRule"])
    """By output and rule, as messages name them."""

    def add(self, kind: str, line: str, hint: str = "") -> None:
        self.lines.setdefault(kind, []).append(line)
        if hint:
            self.hints[hint] = None

    def add_for_rule(self, where: tuple[str, str], tensor: str, kind: str, line: str, hint: str = "") -> None:
        """A fault of one tensor that a rule causes: all tensors of the rule make one line."""
        if where not in self.rules:
            self.add(kind, line, hint)
            self.rules[where] = _FaultyRule(kind, len(self.lines[kind]) - 1)
        self.rules[where].tensors.add(tensor)

    def raise_if_any(self) -> None:
        if not self.lines:
            return
        for rule in self.rules.values():
            more = len(rule.tensors) - 1
            if more:
                line = self.lines[rule.kind][rule.place].rstrip(".")
                self.lines[rule.kind][rule.place] = f"{line} (and {more:,} more tensor{'s' * (more > 1)} of this rule)."
        shown: list[str] = []
        for kind, lines in self.lines.items():
            shown += lines[:LINES_PER_KIND]
            if len(lines) > LINES_PER_KIND:
                shown.append(f"... and {len(lines) - LINES_PER_KIND:,} more: {kind}.")
        raise PlanError("\n".join(shown), hint=" ".join(list(self.hints)[:3]))


@dataclass(slots=True)
class _FaultyRule:
    """Where the line of a rule is in `Problems.lines`, and the tensors that it stands for."""

    kind: str
    place: int
    tensors: set[str] = field(default_factory=set[str])


@dataclass(frozen=True, slots=True)
class Decider:
    """A rule applied to a tensor of one output."""

    output: Output
    target: Target
    calibrated: bool
    problems: Problems

    def __call__(self, spec: TensorSpec, number: int, rule: Rule, dtype: str, stored: Scheme | None) -> Decision:
        decision = self._decide(spec, number, rule, dtype, stored)
        _check_decision(self.output, rule, decision, self.calibrated, self.problems)
        return decision

    def _decide(self, spec: TensorSpec, number: int, rule: Rule, dtype: str, stored: Scheme | None) -> Decision:
        if rule.drop:
            return Decision(spec, Action.DROP, number, dtype, dtype)
        if rule.scheme is not None:
            scheme = self._fitting(spec, number, rule.scheme)
            method = self._method(spec, rule)
            if isinstance(method, Repack):
                self._check_repack(spec, number, scheme, dtype, stored)
                return Decision(spec, Action.KEEP, number, dtype, dtype, scheme, None, stored)
            return Decision(spec, Action.QUANTIZE, number, dtype, dtype, scheme, method, stored)
        if rule.keep == "source" and stored is not None:
            return Decision(spec, Action.KEEP, number, dtype, dtype, stored, None, stored)
        kept = dtype if rule.keep in (None, "source") else rule.keep.upper()
        return Decision(spec, Action.KEEP, number, dtype, self.target.kept_dtype(spec, kept))

    def _fitting(self, spec: TensorSpec, number: int, scheme: ChosenScheme) -> ChosenScheme:
        try:
            fitting = self.target.fitting(spec, scheme)
            fitting.check(spec.name, spec.shape)
        except SchemeError as error:
            if _quantisable(spec, scheme):
                line = f"output {self.output.name}: {error.message}"
                where = (self.output.name, named_rule(number))
                self.problems.add_for_rule(where, spec.name, "schemes that do not fit", line, error.hint)
            return scheme
        return fitting

    def _check_repack(
        self, spec: TensorSpec, number: int, scheme: ChosenScheme, dtype: str, stored: Scheme | None
    ) -> None:
        """A problem unless ``scheme`` holds what the source stores exactly."""
        if stored is not None and spec.part_of is None and repacks(stored, scheme):
            return
        found = dtype if stored is None else describe(stored)
        why = "is stored in parts, one of them transposed" if spec.part_of else f"is {found} in the source"
        instead = None if stored is None else self.target.exact_rule(spec, stored)
        where = f"output {self.output.name}: {spec.name} ({named_rule(number)})"
        line = f"{where}: {why}, nothing that {describe(scheme)} holds without rounding."
        hint = f"Take {instead}." if instead else "Give it keep: source or bf16, or method: {kind: rtn}, which rounds."
        self.problems.add_for_rule((self.output.name, named_rule(number)), spec.name, "no exact repack", line, hint)

    def _method(self, spec: TensorSpec, rule: Rule) -> AskedMethod:
        """The rule's method, or the output's where this tensor has the inputs that it needs."""
        if rule.method is not None:
            return rule.method
        wanted = self.output.method or (_GPTQ if self.calibrated else _RTN)
        if self.output.method is not None and not self.calibrated:
            return wanted  # asked for by name: `_check_decision` says what it lacks
        usable = self.calibrated and not spec.table
        return wanted if usable or not wanted.needs_inputs else _RTN


def _check_decision(output: Output, rule: Rule, decision: Decision, calibrated: bool, problems: Problems) -> None:
    """What a rule asks of a tensor must make sense for it."""
    spec = decision.spec
    cause = (output.name, named_rule(decision.rule))
    where = f"output {output.name}: {spec.name} ({cause[1]})"
    if decision.action is Action.DROP and spec.role is not Role.MTP:
        line = f"{where}: role {spec.role.value} cannot be dropped, only mtp tensors can."
        problems.add_for_rule(cause, spec.name, "tensors that cannot be dropped", line)
    if decision.action is Action.KEEP and spec.float32 and decision.source_dtype == "F32" and decision.dtype != "F32":
        line = f"{where}: is float32 and loses its meaning in bf16."
        problems.add_for_rule(cause, spec.name, "float32 tensors", line, "Give it keep: source.")
    if decision.action is not Action.QUANTIZE:
        return
    if not _quantisable(spec, decision.scheme):
        line = f"{where}: role {spec.role.value}, shape {list(spec.shape)} is no linear and cannot be quantised."
        hint = "Put a rule with keep: source before it." if rule.roles else _GLOB_HINT
        problems.add_for_rule(cause, spec.name, "tensors that cannot be quantised", line, hint)
    elif decision.method is not None and decision.method.needs_inputs:
        fault = _missing_inputs(spec, decision.method.kind, calibrated)
        if fault is not None and rule.method is None and not calibrated:
            kind, found, hint = fault
            line = f"output {output.name}: method: {found}"
            if line not in problems.lines.get(kind, ()):  # the output's own fault, and of none of its tensors
                problems.add(kind, line, hint)
        elif fault is not None:
            kind, found, hint = fault
            problems.add_for_rule(cause, spec.name, kind, f"{where}: {found}", hint)


_GLOB_HINT = (
    'Name roles in place of the glob, "role:expert|attention|shared_expert|mlp", and let later rules take the rest: '
    '{match: "role:mtp", drop: true}, {match: "*", keep: source}.'
)


def named_rule(rule: int) -> str:
    """What messages call the rule with this number."""
    return f"rule {rule}" if rule else "preset"


def _quantisable(spec: TensorSpec, scheme: Scheme | None) -> bool:
    return spec.linear or (spec.table and scheme is not None and scheme.fits_tables)


def _missing_inputs(spec: TensorSpec, method: str, calibrated: bool) -> tuple[str, str, str] | None:
    """Kind of fault, what was found, and a hint, where a method that learns from inputs gets none; else None."""
    if not calibrated:
        hint = "Add calibration: (in place of an imatrix), or use method: {kind: rtn}, which takes an imatrix, too."
        return f"{method} without calibration", f"{method} needs calibration text.", hint
    if spec.table:
        hint = f"Use method: {{kind: rtn}} for role:{spec.role.value}."
        return f"{method} without inputs", "this tensor sees no calibration tokens.", hint
    return None


def unused_rule(
    output: Output, number: int, rule: Rule, target: Target, problems: Problems, warnings: list[str]
) -> None:
    """A rule that decides nothing is a typing error if it is a glob or asks to quantise roles without linears, else
    worth a warning."""
    where = f"output {output.name}: rule {number} ({printable(rule.match)})"
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
