"""Memory of tuning whole layers: what its codes and their latents take, and what is held until a layer is tuned."""

from __future__ import annotations

from quantkit.plan.phases import CODE_BYTES, Phase, Place
from quantkit.plan.shapes import Work
from quantkit.plan.terms import Term
from quantkit.plan.tune import Tune

DECODED_BYTES = 2**30
"""Of the weights of experts that are decoded together, at least those of one."""
LATENT_BYTES, ADAM_BYTES = 4, 8
"""Of a weight that moves: code, offset, the best code; and moments of its gradient."""
PASS_COPIES = 6
"""Activations of an update's tokens that autograd keeps: projections, their products, and gradients."""


def with_tuning(work: Work, tune: Tune, place: Place, found: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """The phases of a conversion whose layers are tuned: until then what the methods gave is held."""
    held = Term("held results", int(work.sizes.layer * CODE_BYTES), f"{work.sizes.layer:,} x {CODE_BYTES} B")
    kept = tuple(Phase(p.what, (*p.terms, held), p.scratch, p.streams_open) for p in found)
    numbers = work.tokens * work.hidden
    scratch = (numbers * 4, numbers * place.width)  # the target, and what the stream's way through the layer needs
    return (*kept, Phase("tuning", (held, *_terms(work, tune, place)), scratch))


def _terms(work: Work, tune: Tune, place: Place) -> tuple[Term, ...]:
    layer, width, hidden = work.sizes.layer, place.width, work.hidden
    each = LATENT_BYTES + ADAM_BYTES * (tune.optimizer == "adam")
    dense = max((block.parameters for block in work.blocks), default=0)
    inter = max((shape.inter for shape in work.experts), default=0)
    all_experts = max((shape.count for shape in work.experts), default=0) * 3 * inter * hidden * width
    decoded = min(all_experts, max(DECODED_BYTES, 3 * inter * hidden * width))
    tokens = min(work.tokens, max(tune.step_tokens, work.length))
    numbers = max((block.widest for block in work.blocks), default=0) + (work.top_k * (hidden + inter) if inter else 0)
    return (
        Term("latents", layer * each, f"{layer:,} weights x {each} B"),
        Term("decoded dense weights", 4 * dense * width, f"weights and gradients: 4 x {dense:,} x {width} B"),
        Term("decoded experts", 3 * decoded, f"weights and gradients: 3 x {decoded:,} B"),
        Term("activations", PASS_COPIES * tokens * numbers * 4, f"{PASS_COPIES} x {tokens:,} x {numbers:,} x 4 B"),
    )
