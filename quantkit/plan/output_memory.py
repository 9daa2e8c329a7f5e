"""What output-aware methods hold beside the others: output Hessians and their factors, buffers of whole matrices in
place of slices, and the Fisher pass's gradients of the sublayer at work."""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.calibrate.chunk_sizes import BATCH_TOKENS
from quantkit.plan.decide import Decision
from quantkit.plan.shapes import DenseShape, Experts, Work, matrices
from quantkit.plan.terms import Term
from quantkit.quantizers.ldlq.rows import ROW_STEPS
from quantkit.tensors import Projection

STORES = 3
"""Of all tokens of the Fisher pass: a sublayer's input, the gradient at its output, and one that is passed on or that
routed experts read."""
GRAPH_COPIES = 12
"""Numbers that autograd keeps of a token at the widest place of a block: in an attention queries, keys, values and
contexts, each before and after, and their gradients."""
FACTOR_COPIES = 4
"""An output Hessian damped, in the order of rounding, and its factor twice."""
WHOLE_BUFFERS = 5
"""Of a whole matrix: targets, the same in the order of rows, errors, what later rows leave over, and a product."""
BY_HEADS = (Projection.Q, Projection.Q_B, Projection.KV_B)
"""Linears whose rows belong to heads, between which no moments are taken."""


def aware(decisions: Iterable[Decision]) -> tuple[Decision, ...]:
    """Those whose method takes output Hessians."""
    return tuple(d for d in decisions if d.method is not None and d.method.output_aware)


def rows_at_once_of(decisions: Iterable[Decision], nbytes: int) -> int:
    """Of ``nbytes`` of weights, those of the rows that are rounded at once."""
    methods = [d.method for d in decisions if d.method is not None]
    return nbytes // ROW_STEPS if all(method.output_aware for method in methods) else nbytes


def squares(decision: Decision, heads: int) -> int:
    """Numbers of a linear's output Hessian."""
    count, rows, _ = matrices(decision)
    return count * rows**2 // (heads if decision.spec.projection in BY_HEADS and count == 1 else 1)


def gradient_stores(work: Work, decisions: Iterable[Decision]) -> tuple[int, ...]:
    """Bytes of each store that is open while a sublayer is at work."""
    return (work.fisher_tokens * work.hidden * 4,) * STORES if aware(decisions) else ()


def hessians_of_dense(work: Work, block: DenseShape) -> tuple[Term, ...]:
    """Output Hessians of a dense block, which all exist until it is done."""
    found = {d.spec.name: squares(d, work.heads) for group in block.groups for d in aware(group)}
    total = sum(found.values())
    return (Term("output Hessians", 4 * total, f"{total:,} x 4 B"),) if found else ()


def collecting_gradients(work: Work, block: DenseShape) -> tuple[Term, ...]:
    """While the gradients of a batch of rows go back through a dense block."""
    tokens = min(work.fisher_tokens, max(BATCH_TOKENS, work.length))
    formula = f"{tokens:,} tokens x {block.widest:,} x 4 B x {GRAPH_COPIES}"
    graph = Term("autograd's graph", tokens * block.widest * 4 * GRAPH_COPIES, formula)
    return (*hessians_of_dense(work, block), graph)


def rounding_of_dense(work: Work, group: tuple[Decision, ...]) -> tuple[Term, ...]:
    """While linears that read the same are quantised: of the largest one."""
    found = aware(group)
    if not found:
        return ()
    square = max(squares(d, work.heads) for d in found)
    count, rows, columns = max((matrices(d) for d in found), key=lambda sizes: sizes[0] * sizes[1] * sizes[2])
    return _rounding(square, count * rows * columns)


def hessians_of_experts(shape: Experts, count: int) -> tuple[Term, ...]:
    """Of gate and up of ``count`` experts, and the one of all downs."""
    if not aware(shape.decisions):
        return ()
    formula = f"(2 x {count} x {shape.inter:,}^2 + {shape.hidden:,}^2) x 4 B"
    return (Term("output Hessians", 4 * (2 * count * shape.inter**2 + shape.hidden**2), formula),)


def rounding_of_experts(shape: Experts, count: int, together: int, *, down: bool) -> tuple[Term, ...]:
    """While ``together`` projections of ``count`` experts are quantised."""
    if not aware(shape.decisions):
        return ()
    square = shape.hidden**2 if down else together * count * shape.inter**2
    return _rounding(square, together * count * shape.inter * shape.hidden)


def _rounding(square: int, weights: int) -> tuple[Term, ...]:
    return (
        Term("factors of output Hessians", 4 * FACTOR_COPIES * square, f"{square:,} x 4 B x {FACTOR_COPIES}"),
        Term("whole matrices", 4 * WHOLE_BUFFERS * weights, f"{weights:,} x 4 B x {WHOLE_BUFFERS}"),
    )
