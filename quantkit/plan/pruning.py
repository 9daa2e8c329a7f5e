"""Pruning of routed experts, as far as headers tell: how many stay, what is refused, and the model that is left.

Which experts stay is known once they are scored; their number fixes names, shapes and bytes, so a plan needs no scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from quantkit.arch.base import ModelArch, RoutedExperts
from quantkit.errors import PlanError
from quantkit.formats.pruned_source import PrunedView
from quantkit.formats.source import language_config
from quantkit.plan.decide import Action, Problems
from quantkit.plan.headers import SourceHeaders
from quantkit.plan.plan import Plan
from quantkit.plan.recipe_prune import Prune
from quantkit.plan.source_tensors import listed_specs, match_source
from quantkit.tensors import Projection, TensorInfo, TensorSpec


def experts_left(prune: Prune, experts: RoutedExperts | None) -> int:
    """Routed experts of a layer that stay. Raises `PlanError` for what the model's router does not allow: groups of
    unequal size, and fewer experts than a token takes."""
    if experts is None:
        raise PlanError("prune: the model has no routed experts.", hint="Leave prune out.")
    step = experts.groups
    asked = int(experts.count * prune.share + 1e-9) // step * step if prune.share is not None else int(prune.experts)
    least = max(experts.ranked_by, -(-experts.top_k // experts.top_groups))
    most = experts.count - least * step
    allowed = f"the same number of each of {step} groups" if step > 1 else "whole experts"
    if asked % step or asked < 1:
        raise PlanError(
            f"prune: found experts {prune.experts}, needed at least {step} and a multiple of {step}: the router ranks "
            f"{step} groups as wholes, which stay of one size, so {allowed} go.",
            hint=f"Of {experts.count} experts {step} are {100 * step / experts.count:.1f} %.",
        )
    if asked > most:
        raise PlanError(
            f"prune: found experts {prune.experts}, {asked} of {experts.count}; needed at most {max(0, most)}: a token "
            f"takes {experts.top_k} experts, from {experts.top_groups} of {step} groups, so at least {least} of each "
            "group stay.",
        )
    return experts.count - asked


def kept_experts(scores: Sequence[float], experts: RoutedExperts, left: int) -> tuple[int, ...]:
    """Numbers of the experts of a layer that stay, rising: of each group those with the highest scores, of equal ones
    the first."""
    size, stay = experts.count // experts.groups, left // experts.groups
    kept: list[int] = []
    for group in range(experts.groups):
        own = range(group * size, (group + 1) * size)
        kept += sorted(sorted(own, key=lambda expert: (-scores[expert], expert))[:stay])
    return tuple(kept)


def pruned_view(arch: ModelArch, kept: Mapping[int, Sequence[int]]) -> PrunedView:
    """What is shown of a checkpoint of the whole model ``arch`` if these experts stay, by layer. Layers that ``kept``
    lacks are shown as they are."""
    experts: dict[tuple[int, Projection | None], dict[int, str]] = {}
    rows: dict[str, tuple[int, ...]] = {}
    for spec in arch.tensors():
        if spec.layer is None or spec.layer not in kept:
            continue
        if spec.by_expert:
            rows[spec.name] = tuple(kept[spec.layer])
        elif spec.expert is not None:
            experts.setdefault((spec.layer, spec.projection), {})[spec.expert] = spec.name
    origins: dict[str, str] = {}
    for (layer, _), names in experts.items():
        origins |= {names[new]: names[old] for new, old in enumerate(kept[layer])}
    gone = frozenset(name for names in experts.values() for name in names.values() if name not in origins)
    return PrunedView(origins, gone, rows)


def pruned_config(config: Mapping[str, object], experts: RoutedExperts, left: int) -> dict[str, object]:
    """config.json of the model that is left."""
    text = {**language_config(config), experts.config_key: left}
    return {**config, "text_config": text} if language_config(config) is not config else text


def pruned_headers(headers: SourceHeaders, prune: Prune) -> SourceHeaders:
    """The headers of the model that is left, whichever experts stay.

    Raises `PlanError` as `experts_left` does, for a source that is not all of its model, and where experts of a layer
    are stored in several ways: what the result weighs would depend on which of them stay.
    """
    experts = headers.arch.routed_experts()
    left = experts_left(prune, experts)
    assert experts is not None, "refused by experts_left"
    infos = _complete(headers)
    _refuse_mixed(headers)
    # Any experts do: those of a layer are stored alike.
    kept = kept_experts([0.0] * experts.count, experts, left)
    view = pruned_view(headers.arch, dict.fromkeys(expert_layers(headers.arch), kept))
    return replace(
        headers,
        arch=headers.arch.with_experts(left),
        config=pruned_config(headers.config, experts, left),
        infos=view.infos(infos),
        stored=view.stored({name: scheme for name, scheme in headers.stored.items() if name in infos}),
    )


def expert_layers(arch: ModelArch) -> tuple[int, ...]:
    """Layers with routed experts, MTP layers included, in order."""
    found = {spec.layer for spec in arch.tensors() if spec.expert is not None and spec.layer is not None}
    return tuple(sorted(found))


def layers_to_score(plan: Plan) -> tuple[int, ...]:
    """Layers with routed experts that some output stores, in order: MTP layers that all outputs drop stay unscored."""
    decisions = (decision for output in plan.outputs for decision in output.decisions.values())
    stored = (d.spec for d in decisions if d.action is not Action.DROP and d.spec.expert is not None)
    return tuple(sorted({spec.layer for spec in stored if spec.layer is not None}))


def pruning_notes(prune: Prune | None, whole: RoutedExperts | None, arch: ModelArch) -> tuple[str, ...]:
    """A line about the experts that go. ``arch``: the model that is left."""
    left = arch.routed_experts()
    if prune is None or whole is None or left is None:
        return ()
    gone = whole.count - left.count
    scored = "" if prune.scores else " The text goes through the original model once before, to score the experts."
    return (
        f"{gone} of {whole.count} routed experts of each layer are left out ({100 * gone / whole.count:.1f} %): what "
        f"the calibration text does not use is lost.{scored}",
    )


def _complete(headers: SourceHeaders) -> dict[str, TensorInfo]:
    """The source's tensors, of MTP layers only if they are there with all experts. Raises `PlanError` for what is wrong
    with the others: an expert that is missing may be one that stays."""
    problems = Problems()
    found = match_source(headers.arch, listed_specs(headers.arch, headers.infos), headers.infos, problems)
    problems.raise_if_any()
    layers = {spec.name: spec.layer for spec in headers.arch.tensors() if spec.expert is not None}
    broken = {layers[name] for name in found.faults if name in layers}
    left_out = {name for name, layer in layers.items() if layer in broken}
    return {name: info for name, info in headers.infos.items() if name not in left_out}


def _refuse_mixed(headers: SourceHeaders) -> None:
    first: dict[tuple[int | None, Projection | None], TensorSpec] = {}
    for spec in headers.arch.tensors():
        if spec.expert is None or spec.name not in headers.infos:
            continue
        like = first.setdefault((spec.layer, spec.projection), spec)
        ours, theirs = ((headers.infos[one.name].dtype, headers.stored.get(one.name)) for one in (spec, like))
        if ours != theirs:
            raise PlanError(
                f"prune: {spec.name} is stored otherwise than {like.name}: what is written would depend on which of "
                "them stays.",
                hint="Convert the source so that the experts of a layer are stored alike, and prune that.",
            )
