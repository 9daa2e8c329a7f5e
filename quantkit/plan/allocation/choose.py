"""Losses and a size -> the scheme of each group of linears: the output of a recipe with a target becomes one with
ordinary rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from quantkit.arch.base import ModelArch
from quantkit.documents.sensitivity import SensitivityDocument
from quantkit.errors import PlanError
from quantkit.formats.planned import PlannedTensor
from quantkit.plan.allocation.draft import DROP_MTP, KEEP_REST, DraftGroup, OpenOutput, measured, planned_with
from quantkit.plan.allocation.expected import expected_kl
from quantkit.plan.allocation.felt import felt
from quantkit.plan.allocation.rules import rules_of
from quantkit.plan.allocation.solve import Option, smallest, solve, total_bytes
from quantkit.plan.recipe import Output
from quantkit.runtimes.gpus import Gpus
from quantkit.runtimes.llama_cpp.memory import fit_llama
from quantkit.runtimes.vllm.memory import fit
from quantkit.schemes import ChosenScheme, describe
from quantkit.tensors import Role

NEAR = 32
"""Bytes to which the budget of the weights is found: no tensor of a GGUF file begins nearer to the next."""
GPU_STEPS = 24
POINTS = 9
"""Of the Pareto curve."""
CONTEXT = 32768
"""Tokens of a sequence that GPUs must fit, if nothing else is said and the model is made for as many."""


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """``nbytes``: of tensor data; ``bpw``: of the whole checkpoint; ``predicted_kl``: nats per token."""

    nbytes: int
    bpw: float
    predicted_kl: float


@dataclass(frozen=True, slots=True)
class Choice:
    """``output``: with rules in place of the target, and the predicted KL divergence; ``groups``: the linears that
    share a scheme, with it; ``nbytes``: of the weight files, headers included; ``limit``: the target in words;
    ``curve``: what other sizes would lose, from the smallest to the largest; ``left``: why nothing was chosen, or
    ""."""

    output: Output
    groups: tuple[DraftGroup, ...]
    nbytes: int
    limit: str
    curve: tuple[ParetoPoint, ...]
    left: str

    @property
    def predicted_kl(self) -> float:
        """Nats per token."""
        return self.output.predicted_kl or 0.0


def choose(draft: OpenOutput, document: SensitivityDocument, arch: ModelArch, source: Path) -> Choice:
    """The choice that the target asks for. ``document``: with every loss that ``draft`` needs; ``source``: the
    checkpoint's folder. Raises `PlanError` for a size below the smallest choice or above the largest, and GPUs that
    hold none."""
    work = _Work(draft, document, arch, source)
    chosen = work.chosen()
    groups = tuple(
        replace(group, schemes=(group.schemes[place],)) for group, place in zip(draft.groups, chosen, strict=True)
    )
    curve = work.curve()
    return Choice(
        output=_settled(draft, groups, work.predicted(chosen), curve),
        groups=groups,
        nbytes=draft.target.file_bytes(source, work.planned(chosen)),
        limit=str(draft.wanted),
        curve=curve,
        left=_left(groups, draft),
    )


def _settled(draft: OpenOutput, groups: Sequence[DraftGroup], predicted: float, curve: Sequence[ParetoPoint]) -> Output:
    """The output with rules: the user's, those of the choice, and what is done with the rest; and what reports show of
    the choice."""
    user = draft.output.rules
    assigned = [(spec, group.schemes[0]) for group in groups for spec in group.specs]
    others = [(spec, scheme) for spec, scheme in draft.others if spec.linear or scheme is not None]
    decided = {spec.name for spec, _ in (*assigned, *others)}
    rest = [d.spec for d in draft.plan.decisions.values() if d.rule > len(user) and d.spec.name not in decided]
    dropped = [spec for spec in rest if spec.role is Role.MTP and not draft.output.keeps_mtp]
    drops = (DROP_MTP,) if dropped else ()
    keeps = (KEEP_REST,) if len(rest) > len(dropped) else ()
    made = (*user, *rules_of(assigned), *rules_of(others), *drops, *keeps)
    # As objects: written out, what was made by its class and not read from a file would lack its kind.
    given = {key: getattr(draft.output, key) for key in draft.output.model_fields_set - {"target"}}
    points = tuple((point.nbytes, _rounded(point.predicted_kl)) for point in curve)
    told = {"predicted_kl": _rounded(predicted), "predicted_curve": points}
    return type(draft.output).model_validate({**given, "rules": made, **told})


def _rounded(value: float) -> float:
    """To four digits: an estimate."""
    return float(f"{value:.4g}")


def _left(groups: Sequence[DraftGroup], draft: OpenOutput) -> str:
    """Why nothing was chosen, "" if something was."""
    if all(len(group.schemes) == 1 for group in draft.groups):
        return "each linear has one type only that fits it: there is nothing to choose"
    labels = {describe(group.schemes[0]) for group in groups}
    return f"{labels.pop()} everywhere is all that fits: there is nothing to choose" if len(labels) == 1 else ""


@dataclass(frozen=True)
class _Work:
    """What the steps share. A choice is the place of each group's scheme."""

    draft: OpenOutput
    document: SensitivityDocument
    arch: ModelArch
    source: Path

    def chosen(self) -> list[int]:
        """Within the target. Raises `PlanError`."""
        wanted = self.draft.wanted
        if wanted.parsed_gpus is not None:
            usual = min(CONTEXT, self.arch.serving().max_positions)
            return self._on_gpus(wanted.parsed_gpus, wanted.context or usual)
        if wanted.nbytes is not None:
            return self._within(wanted.nbytes, lambda tensors: self.draft.target.file_bytes(self.source, tensors))
        assert wanted.bpw is not None, "a target has one limit"
        weights = sum(tensor.info.numel for tensor in self.draft.plan.planned)
        return self._within(int(wanted.bpw * weights / 8), self._data_bytes)

    def predicted(self, chosen: Sequence[int]) -> float:
        """Mean KL divergence, nats per token: with the linears whose schemes rules fix."""
        layers: dict[int | None, float] = dict(self._fixed)
        for group, options, place in zip(self.draft.groups, self.options, chosen, strict=True):
            layer = group.specs[0].layer
            layers[layer] = layers.get(layer, 0.0) + options[place].loss
        return expected_kl(layers.values())

    @cached_property
    def _fixed(self) -> Mapping[int | None, float]:
        """Layer -> loss of linears whose schemes rules fix."""
        layers: dict[int | None, float] = {}
        for group in self.draft.fixed:
            layer = group.specs[0].layer
            layers[layer] = layers.get(layer, 0.0) + self._loss(group, group.schemes[0])
        return layers

    def planned(self, chosen: Sequence[int]) -> list[PlannedTensor]:
        """All tensors of the output."""
        pairs = zip(self.draft.groups, chosen, strict=True)
        return planned_with(self.draft, {s.name: group.schemes[place] for group, place in pairs for s in group.specs})

    def curve(self) -> tuple[ParetoPoint, ...]:
        """Choices of sizes evenly spread between the smallest and the largest."""
        low = total_bytes(self.options, smallest(self.options))
        high = total_bytes(self.options, self._best())
        weights = sum(tensor.info.numel for tensor in self.draft.plan.planned)
        beside = self._data_bytes(self.planned(smallest(self.options))) - low
        points: dict[int, ParetoPoint] = {}
        for step in range(POINTS):
            found = solve(self.options, low + (high - low) * step // (POINTS - 1))
            assert found is not None, "no budget is below the smallest"
            nbytes = beside + total_bytes(self.options, found)
            points[nbytes] = ParetoPoint(nbytes, 8 * nbytes / weights, self.predicted(found))
        return tuple(points.values())

    @cached_property
    def options(self) -> list[list[Option]]:
        """Of each group, one for each scheme."""
        return [[self._option(group, scheme) for scheme in group.schemes] for group in self.draft.groups]

    def _option(self, group: DraftGroup, scheme: ChosenScheme) -> Option:
        sizes = {spec.shape: self._nbytes(group, spec.shape, scheme) for spec in group.specs}
        return Option(sum(sizes[spec.shape] for spec in group.specs), self._loss(group, scheme))

    def _nbytes(self, group: DraftGroup, shape: tuple[int, ...], scheme: ChosenScheme) -> int:
        spec = next(spec for spec in group.specs if spec.shape == shape)
        info = self._infos[spec.name]
        return self.draft.target.nbytes(PlannedTensor(info.info, scheme, None, spec))

    @cached_property
    def _infos(self) -> Mapping[str, PlannedTensor]:
        return {tensor.name: tensor for tensor in self.draft.plan.planned}

    @cached_property
    def _felt(self) -> Mapping[str, float]:
        return felt(self.arch.tensors(), self.document.linears)

    def _loss(self, group: DraftGroup, scheme: ChosenScheme) -> float:
        """Of all linears, those that were not measured like the measured ones of their projection."""
        losses, scalars = self.document.losses or {}, self._felt
        total = 0.0
        for projection in {spec.projection for spec in group.specs}:
            own = [spec for spec in group.specs if spec.projection is projection]
            seen = list(measured(own))
            known = sum(scalars[spec.official] for spec in seen)
            share = sum(scalars[spec.official] for spec in own) / known if known else 1.0
            total += share * sum(losses[spec.name][scheme.label] for spec in seen)
        return total

    def _within(self, limit: int, size: Callable[[list[PlannedTensor]], int]) -> list[int]:
        """The choice whose ``size`` comes nearest to ``limit`` from below. Headers depend on the choice, so what is
        allowed for the data shrinks by what is too much until the size is kept, and grows again while it is."""
        least, best = smallest(self.options), self._best()
        self._check(limit, size(self.planned(least)), size(self.planned(best)), best)
        found, low = least, total_bytes(self.options, least)
        allowed = limit - size(self.planned(least)) + low
        high = allowed + 1  # what keeps the size lies below it, and `low` keeps it
        while high - low > NEAR:
            tried = solve(self.options, allowed) or least
            excess = size(self.planned(tried)) - limit
            if excess > 0:
                high, allowed = allowed, max(low, allowed - excess)
            else:
                found, low, allowed = tried, allowed, (allowed + high) // 2
        return found

    def _check(self, limit: int, least: int, most: int, best: Sequence[int]) -> None:
        name, wanted = self.draft.output.name, self.draft.wanted
        if limit < least:
            raise PlanError(
                f"output {name}: target {wanted}: the smallest choice of types takes {least:,} bytes, "
                f"{least - limit:,} more.",
                hint="Give it more, or let smaller types in (types:, and rules that fix linears or tables).",
            )
        if limit > most:
            labels = {group.schemes[place].label for group, place in zip(self.draft.groups, best, strict=True)}
            raise PlanError(
                f"output {name}: target {wanted}: the choice of types that loses least ({', '.join(sorted(labels))}) "
                f"takes {most:,} bytes, {limit - most:,} fewer.",
                hint="Give it less: there is nothing to choose above.",
            )

    def _on_gpus(self, gpus: Gpus, context: int) -> list[int]:
        """The choice with the most bytes that the GPUs hold. Raises `PlanError` if they do not hold the smallest."""
        least, most = smallest(self.options), self._best()
        if self._fits(most, gpus, context):
            return most
        if not self._fits(least, gpus, context):
            nbytes = self._data_bytes(self.planned(least))
            raise PlanError(
                f"output {self.draft.output.name}: target {gpus}: the smallest choice of types, {nbytes:,} bytes, does "
                f"not fit these GPUs with a sequence of {context:,} tokens.",
                hint="`quantkit plan --gpus` shows what a layout needs; take a shorter context or more GPUs.",
            )
        low, high = total_bytes(self.options, least), total_bytes(self.options, most)
        for _ in range(GPU_STEPS):
            middle = (low + high) // 2
            found = solve(self.options, middle) or least
            if self._fits(found, gpus, context):
                least, low = found, middle
            else:
                high = middle
        return least

    def _fits(self, chosen: Sequence[int], gpus: Gpus, context: int) -> bool:
        sized = _Sized(tuple(self.planned(chosen)), self.draft)
        if self.draft.output.format == "gguf":
            return fit_llama(sized, self.arch, gpus, context).fits
        return fit(sized, self.arch, gpus, context).utilization is not None

    def _best(self) -> list[int]:
        """The options with the least loss."""
        return [min(range(len(group)), key=lambda n: (group[n].loss, group[n].nbytes)) for group in self.options]

    def _data_bytes(self, tensors: Sequence[PlannedTensor]) -> int:
        """Exact bytes of tensor data. Tensors of one shape and scheme are measured once."""
        sized = _Sized(tuple(tensors), self.draft)
        known: dict[tuple[object, ...], int] = {}
        total = 0
        for tensor in tensors:
            key = (tensor.info.shape, tensor.keep_dtype, tensor.scheme)
            if key not in known:
                known[key] = sized.stored_bytes(tensor)
            total += known[key]
        return total


@dataclass(frozen=True, slots=True)
class _Sized:
    """A choice as the memory models of runtimes look at it."""

    planned: tuple[PlannedTensor, ...]
    draft: OpenOutput

    def stored_bytes(self, tensor: PlannedTensor) -> int:
        """Of one tensor, scales included."""
        return self.draft.target.nbytes(tensor)
