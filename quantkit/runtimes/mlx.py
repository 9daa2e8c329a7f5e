"""What MLX (mlx-lm) does not read of a folder. Read in mlx-lm 0.32, not tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from quantkit.formats.planned import PlannedTensor
from quantkit.runtimes.linears import Check, LinearsByScheme, by_scheme, line
from quantkit.schemes import IntScheme, Scheme

BITS, GROUP_SIZE = 4, 32
"""Of every pack-quantized linear, whatever config.json says."""


def notes(planned: Sequence[PlannedTensor], layout: str) -> list[str]:
    """One line for each thing of this layout that MLX does not take."""
    linears = by_scheme(planned)
    return [text for check in _NOTES_OF.get(layout, ()) for text in check(linears)]


def reads(scheme: Scheme) -> bool:
    """Whether it decodes compressed-tensors linears of this scheme as they were written."""
    grid = isinstance(scheme, IntScheme) and scheme.symmetric and (scheme.bits, scheme.group_size)
    return grid == (BITS, GROUP_SIZE)


def other_grids(linears: LinearsByScheme) -> Iterator[str]:
    """One line, however many schemes there are that it does not take."""
    foreign = [tensor for use in linears.uses if not reads(use.scheme) for tensor in use.tensors]
    if foreign:
        yield line(foreign, "of compressed-tensors mlx-lm 0.32 reads int4 g32 alone, whatever config.json says.")


def bitsandbytes(linears: LinearsByScheme) -> Iterator[str]:
    """It knows the quant_method not at all."""
    for use in linears.uses:
        yield line(use.tensors, "mlx-lm 0.32 does not read bitsandbytes; transformers does.")


_NOTES_OF: Mapping[str, tuple[Check, ...]] = {"compressed-tensors": (other_grids,), "bitsandbytes": (bitsandbytes,)}
