"""The layout of experts that most runtimes read: int4 in groups of 32, symmetric, in compressed-tensors, as Kimi
K2-Thinking is released. Read in vLLM 0.33, SGLang 0.5.23, kt-kernel 0.7.2 and mlx-lm 0.32, not tried in all of them."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.formats.planned import PlannedTensor
from quantkit.runtimes import mlx
from quantkit.runtimes.linears import by_scheme, line

COMPRESSED_TENSORS = "compressed-tensors"
READERS = ("vLLM (Marlin, Humming, on B200 mxint4)", "SGLang", "ktransformers (RAWINT4)")


def notes(planned: Sequence[PlannedTensor], layout: str) -> list[str]:
    """One line that names the runtimes which read the experts of this plan; [] if they are stored otherwise. MLX has to
    read all other linears by the same grid."""
    if layout != COMPRESSED_TENSORS:
        return []
    uses = by_scheme(planned).uses
    experts = [tensor for use in uses if mlx.reads(use.scheme) for tensor in use.experts]
    others = all(mlx.reads(use.scheme) for use in uses)
    readers = (*READERS, "MLX") if others else READERS
    return [line(experts, f"{', '.join(readers[:-1])} and {readers[-1]} read this.")] if experts else []
