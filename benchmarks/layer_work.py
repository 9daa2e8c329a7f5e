"""What the stages of `moe_layer.py` have to compute, from the sizes alone: the arithmetic behind its rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """``slots``: tokens times the experts that each chooses; ``context``: inputs of the output projection."""

    tokens: int
    slots: int
    experts: int
    hidden: int
    inter: int
    context: int
    cross: bool
    polish: int


def stage_tflop(sizes: Sizes) -> dict[str, tuple[float, str]]:
    """Stage -> TFLOP and the precision of its products ("bf16", "tf32"), for stages that products dominate.

    A product of m x k and k x n counts 2 m k n, a symmetric one (X^T X) half of it, Cholesky n^3 / 3, the sweep and a
    triangular solve rows n^2. Of the experts only: attention's own factors and sweeps (2 to 5 %) are not counted.
    """
    d, i, slots, experts = sizes.hidden, sizes.inter, sizes.slots, sizes.experts
    streams = 2 if sizes.cross else 1
    swept = experts * (2 * i * d * d + d * i * i)  # rows n^2 of gate, up and down
    counted = {
        "experts: moments of gate, up": (slots * d * d * (3 if sizes.cross else 1), "bf16"),
        "experts: hidden, moments of down": (
            streams * 4 * slots * d * i + slots * i * i * (3 if sizes.cross else 1),
            "bf16",
        ),
        "experts: down, scatter": (2 * slots * d * i, "bf16"),
        "experts: original stream": (6 * slots * d * i if sizes.cross else 0, "bf16"),
        "dense: output": (2 * sizes.tokens * sizes.context * d, "bf16"),
        "quantise: norms of the report": (swept, "bf16"),
        "quantise: polish (or loss)": ((2 * sizes.polish + 2) * swept if sizes.polish else 0, "bf16"),
        "quantise: Cholesky": (experts * (d**3 + i**3) / 3, "tf32"),
        "quantise: sweep": (swept, "tf32"),
        "quantise: targets of the cross term": (4 * swept if sizes.cross else 0, "tf32"),
    }
    return {stage: (flop / 1e12, kind) for stage, (flop, kind) in counted.items() if flop}


def stage_rates(
    sizes: Sizes, seconds: Mapping[str, float], ceilings: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Of each stage in ``seconds``: TFLOP, TFLOP/s and the share of the card's measured ceiling; of reading and
    decoding GB/s (one byte of FP8 in, two of bfloat16 out)."""
    found: dict[str, dict[str, float]] = {}
    for stage, (tflop, kind) in stage_tflop(sizes).items():
        if stage in seconds:
            rate = tflop / seconds[stage]
            found[stage] = {
                "TFLOP": round(tflop, 1),
                "TFLOP/s": round(rate, 1),
                f"of the ceiling in {kind}": round(rate / ceilings[f"{kind} TFLOP/s"], 3),
            }
    reading = "experts: read, decode FP8"
    if reading in seconds:
        moved = 3 * 3 * sizes.experts * sizes.hidden * sizes.inter / 1e9
        found[reading] = {"GB": round(moved, 1), "GB/s": round(moved / seconds[reading], 1)}
    return found
