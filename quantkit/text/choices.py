"""What was chosen for an output with a target, as text and as a document for --json."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.plan.allocation.choose import Choice, ParetoPoint
from quantkit.plan.allocation.draft import DraftGroup
from quantkit.plan.allocation.expected import WITHIN
from quantkit.plan.allocation.rules import ranges
from quantkit.text.tables import both_units, table


def choice_text(found: Choice) -> str:
    """The types by projection and layers, what they are expected to lose, and what other sizes would."""
    rows = [(what, types) for what, types in _by_projection(found.groups).items()]
    lines = [f"chosen for {found.limit}: weight files of {found.nbytes:,} bytes, {both_units(found.nbytes)}"]
    lines += [f"  {found.left}"] if found.left else []
    lines += ["", table(("linears", "types (layers)"), rows, left=2)]
    lines += ["", f"  predicted mean KLD {_shown(found.predicted_kl)} nats, {WITHIN}", ""]
    points = [(f"{p.nbytes:,}", f"{p.bpw:.3f}", _shown(p.predicted_kl)) for p in found.curve]
    lines.append(table(("tensor bytes", "bpw", "predicted KLD"), points))
    return "\n".join(lines)


def _shown(value: float) -> str:
    return f"{value:.2g}"


def _by_projection(groups: tuple[DraftGroup, ...]) -> Mapping[str, str]:
    """ "expert gate" -> "Q3_K 3-10, 12; Q4_K 11"."""
    layers: dict[str, dict[str, list[int]]] = {}
    for group in groups:
        for spec in {(spec.role, spec.projection, _part(spec.name)): spec for spec in group.specs}.values():
            kind = spec.projection.value if spec.projection else ""
            types = layers.setdefault(f"{spec.role.value} {kind}{_part(spec.name)}", {})
            types.setdefault(group.schemes[0].label, []).append(spec.layer or 0)
    return {
        what: "; ".join(f"{label} ({ranges(found)})" for label, found in types.items())
        for what, types in layers.items()
    }


def _part(name: str) -> str:
    """The suffix of a part of a linear."""
    _, colon, part = name.partition(":")
    return colon + part


def choice_document(found: Choice) -> Mapping[str, object]:
    """For --json. ``curve``: the Pareto curve, from the smallest size to the largest; KLD in nats per token."""
    return {
        "target": found.limit,
        "file_bytes": found.nbytes,
        "predicted_kl": found.predicted_kl,
        "nothing_to_choose": found.left or None,
        "types": _by_projection(found.groups),
        "curve": [_point(point) for point in found.curve],
    }


def _point(point: ParetoPoint) -> Mapping[str, object]:
    return {"nbytes": point.nbytes, "bpw": round(point.bpw, 5), "predicted_kl": float(f"{point.predicted_kl:.4g}")}
