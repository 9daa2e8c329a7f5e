"""Linears of a packed source whose codes and scales are taken over: nothing is computed, nothing is rounded."""

from __future__ import annotations

from quantkit.errors import SchemeError
from quantkit.formats.model_source import ModelSource
from quantkit.plan.decide import LINES_PER_KIND, Decision
from quantkit.plan.plan import Plan
from quantkit.schemes import IntScheme, QuantError, QuantizedTensor
from quantkit.schemes.repacking import check_scale, repacked


def taken_over(source: ModelSource, decision: Decision) -> QuantizedTensor:
    """What an output stores of a linear that keeps its codes and scales. Raises `SchemeError` for a scale that its
    scheme does not hold."""
    name, scheme, stored = decision.spec.name, decision.scheme, decision.stored
    assert scheme is not None, f"{name}: is kept plain"
    assert stored is not None, f"{name}: is plain in the source"
    return QuantizedTensor(name, scheme, repacked(stored, scheme, source.read_stored(name)), QuantError(0.0))


def refuse_misfits(source: ModelSource, plan: Plan) -> None:
    """Raise `SchemeError` naming the linears of which some scale does not fit the scheme that is to hold it exactly.
    Reads scales only, an eighth of 4-bit linears at most, so that a long job does not fail in its midst."""
    lines: list[str] = []
    hints: set[str] = set()
    for output in plan.outputs:
        for decision in output.decisions.values():
            if not decision.repacks or decision.scheme in (None, decision.stored) or decision.stored is None:
                continue
            try:
                check_scale(decision.stored, decision.scheme, source.read_scale(decision.spec.name))
            except SchemeError as error:
                lines.append(f"output {output.output.name}: {decision.spec.name}: {error.message}")
                hints.add(_INTEGERS if isinstance(decision.scheme, IntScheme) else _BLOCKS)
    if lines:
        more = f"\n... and {len(lines) - LINES_PER_KIND:,} more linears." if len(lines) > LINES_PER_KIND else ""
        raise SchemeError("\n".join(lines[:LINES_PER_KIND]) + more, hint=" ".join(sorted(hints)))


_BLOCKS = (
    "Give them (in GGUF all experts of their layer and projection) a rule of their own before: keep: f32 is exact, "
    "scheme: Q8_0 with method: {kind: rtn} rounds."
)
_INTEGERS = (
    "scale_dtype: float16 in the scheme holds all scales of Q4_0, Q5_0 and Q8_0; start vLLM with --dtype float16 then, "
    "else it rounds them."
)
