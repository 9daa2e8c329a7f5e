"""What moving routers by least squares holds, before a layer's experts are at work."""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.calibrate.chunk_sizes import BATCH_TOKENS
from quantkit.plan.phases import Phase, Place
from quantkit.plan.shapes import Work
from quantkit.plan.terms import Term

FLOAT64_COPIES = 3
"""The second moments and the cross term in float64, and the Cholesky factor."""
ACTIVATIONS = 4
"""Of a batch of tokens: what either stream holds and what its router reads."""


def fitting_routers(work: Work, place: Place) -> Iterator[Phase]:
    """The phase of a layer's router, if routers are fitted and the model has routed experts."""
    if not work.fits_routers or not work.experts:
        return
    moments = Term("moments", 2 * 4 * work.hidden**2, f"2 x {work.hidden:,}^2 x 4 B")
    solving = Term("solving", FLOAT64_COPIES * 8 * work.hidden**2, f"{FLOAT64_COPIES} x {work.hidden:,}^2 x 8 B")
    tokens = min(work.tokens, max(place.times * BATCH_TOKENS, work.length))
    formula = f"{ACTIVATIONS} x {tokens:,} tokens x {work.hidden:,} x 4 B"
    yield Phase(
        "router by least squares",
        (moments, solving, Term("activations", ACTIVATIONS * tokens * work.hidden * 4, formula)),
    )
