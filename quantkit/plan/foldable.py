"""Whether what a method rescales can be folded into the model: refused in the plan, because a producer that stays as it
is would silently leave the method without effect.

What reads a producer is part of how a family computes its layers, so a plan with such a method loads torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from quantkit.arch.base import DenseBlock, ModelArch, Producer
from quantkit.plan.decide import Action, Decision, Problems, named_rule
from quantkit.quantizers import Method
from quantkit.quantizers.rescaling import RescalingMethod


def refuse_unfoldable(output: str, decisions: Mapping[str, Decision], arch: ModelArch, problems: Problems) -> None:
    """Add a problem for each tensor of an output that keeps its bytes although factors would be folded into it, and for
    linears that read the same and ask two methods for factors."""
    by_official: dict[str, list[Decision]] = {}
    for decision in decisions.values():
        by_official.setdefault(decision.spec.official, []).append(decision)
    asking = {d.spec.layer for d in decisions.values() if _rescales(d)}
    for layer in sorted(layer for layer in asking if layer is not None):
        for producer in dict.fromkeys(_producers(arch, layer)):
            readers = [d for name in producer.readers for d in by_official.get(name, ())]
            absorbing = by_official.get(producer.tensor, [])
            _refuse(output, [d for d in readers if _rescales(d)], [*absorbing, *readers], problems)


def _refuse(output: str, rescaling: list[Decision], changing: list[Decision], problems: Problems) -> None:
    """``rescaling``: readers of one producer whose method asks for factors; ``changing``: all that these would change,
    the producer included."""
    if not rescaling:
        return
    first = rescaling[0]
    by = f"{first.spec.name} ({named_rule(first.rule)}: {_kind(first)})"
    for decision in changing:
        if decision.action is Action.KEEP and decision.scheme is not None:
            name, rule = decision.spec.name, named_rule(decision.rule)
            what = "codes" if decision.repacks else "FP8 bytes"
            line = f"output {output}: {name} ({rule}): keeps its {what}, which factors for {by} would change."
            hint = "Quantise it too, give it keep: bf16, or take gptq in place of awq."
            problems.add_for_rule((output, rule), name, "tensors that cannot be folded", line, hint)
    for decision in rescaling:
        scheme = decision.quantising[0] if decision.quantising else None
        if scheme is not None and scheme.shares_scale:
            name, rule = decision.spec.name, named_rule(decision.rule)
            line = (
                f"output {output}: {name} ({rule}): {_kind(decision)} changes how far its weights reach, and "
                f"{scheme.label} shares a scale with the linears that runtimes join it with."
            )
            problems.add_for_rule((output, rule), name, "methods that change a shared scale", line, "Take gptq or rtn.")
        if decision.method != first.method:
            name, rule = decision.spec.name, named_rule(decision.rule)
            line = f"output {output}: {name} ({rule}): reads what {by} reads, needed the same {_kind(first)} for both."
            problems.add_for_rule((output, rule), name, "methods that rescale the same", line)


def _producers(arch: ModelArch, layer: int) -> Iterator[Producer]:
    """What makes the inputs of a layer's linears."""
    for block in (block for sublayer in arch.sublayers(layer) for block in sublayer):
        found: Iterable[Producer | None]
        if isinstance(block, DenseBlock):
            found = [group.producer for stage in block.stages for group in stage.groups]
        else:
            found = [block.producer, *block.down_producers]
        yield from (producer for producer in found if producer is not None)


def _rescales(decision: Decision) -> bool:
    return decision.method is not None and _is_rescaling(decision.method)


@lru_cache(maxsize=64)
def _is_rescaling(method: Method) -> bool:
    # A look at a protocol takes as many calls as much of what is planned of a tensor, and few methods are asked often.
    return isinstance(method, RescalingMethod)


def _kind(decision: Decision) -> str:
    return "" if decision.method is None else decision.method.kind
