"""What transformers does not load of a quantised folder, or loads wrongly. Observed in version 5.23."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from quantkit.formats.planned import PlannedTensor
from quantkit.runtimes.linears import Check, LinearsByScheme, by_scheme, line
from quantkit.schemes import Float8Scheme, IntScheme, Mxfp8Scheme, Nvfp4Scheme, describe


def load(folder: str) -> str:
    """A shell line that loads a folder; ``folder`` is quoted where need be."""
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    return f"python -c '{code}' {folder}"


def problems(planned: Sequence[PlannedTensor], layout: str) -> list[str]:
    """One line for each thing of this layout that it loads wrongly without an error."""
    linears = by_scheme(planned)
    return [text for check in _PROBLEMS_OF.get(layout, ()) for text in check(linears)]


def notes(planned: Sequence[PlannedTensor], layout: str) -> list[str]:
    """One line for each thing that it will not take of this layout, or takes only in part."""
    linears = by_scheme(planned)
    return [text for check in _NOTES_OF.get(layout, ()) for text in check(linears)]


def zero_points(linears: LinearsByScheme) -> Iterator[str]:
    """They are read by vLLM alone."""
    for use in linears.uses:
        if isinstance(use.scheme, IntScheme) and not use.scheme.symmetric:
            yield line(use.tensors, "transformers 5.23 cannot load zero points; vLLM can.")


def float8_experts(linears: LinearsByScheme) -> Iterator[str]:
    """Routed experts; other linears load."""
    for use in linears.uses:
        if isinstance(use.scheme, Float8Scheme | Mxfp8Scheme) and use.experts:
            kind = "FP8 block" if isinstance(use.scheme, Float8Scheme) else "MXFP8"
            yield line(use.experts, f"transformers 5.23 cannot load {kind} routed experts; vLLM can.")


def nvfp4_experts(linears: LinearsByScheme) -> Iterator[str]:
    """Those of other linears are decoded rightly."""
    for use in linears.uses:
        if isinstance(use.scheme, Nvfp4Scheme) and use.experts:
            text = "transformers 5.23 decodes routed experts without their global scale and no error; vLLM loads them."
            yield line(use.experts, text)


def kept_experts(linears: LinearsByScheme) -> Iterator[str]:
    """Experts of a layer that is kept as a whole (MTP) are no matter: transformers does not load it."""
    layers = {tensor.layer for use in linears.uses for tensor in use.tensors}
    experts = [tensor for tensor in linears.kept if tensor.expert is not None and tensor.layer in layers]
    if experts:
        text = "transformers 5.23 loses unquantised routed experts beside quantised linears; vLLM loads them."
        yield line(experts, text)


def expert_schemes(linears: LinearsByScheme) -> Iterator[str]:
    """All routed experts are read as the first group that names experts says."""
    found = [use for use in linears.uses if use.experts]
    if len(found) > 1:
        listed = ", ".join(describe(use.scheme) for use in found)
        yield f"routed experts: {listed} by layer; transformers 5.23 reads all as one scheme, vLLM as they are."


def random_experts(linears: LinearsByScheme) -> Iterator[str]:
    """Its quantisers for GPTQ and AWQ convert no experts."""
    for use in linears.uses:
        if use.experts:
            text = "transformers 5.23 leaves routed experts of this format random, without an error; vLLM loads them."
            yield line(use.experts, text)


_PROBLEMS_OF: Mapping[str, tuple[Check, ...]] = {
    "compressed-tensors": (nvfp4_experts,),
    **{layout: (random_experts,) for layout in ("gptq", "gptq_v2", "awq")},
}
_NOTES_OF: Mapping[str, tuple[Check, ...]] = {
    "compressed-tensors": (zero_points, float8_experts, kept_experts, expert_schemes)
}
