"""What a method holds beside the weights that it quantises: buffers of a slice's size, and copies of a Hessian."""

from __future__ import annotations

from quantkit.plan.decide import Decision
from quantkit.plan.shapes import Work
from quantkit.quantizers import Awq, Gptq

RTN_BUFFERS, PLAIN_BUFFERS, CROSS_BUFFERS, POLISH_BUFFERS, CODEBOOK_BUFFERS = 4, 3, 1, 3, 3
"""Buffers of a slice's size beside the weight: rounding to nearest; GPTQ's sweep; more for targets that follow the
unquantised stream; more for coordinate descent; more for vectors of a codebook."""
RESCALING_BUFFERS = 1
"""More than rounding to nearest has, while factors of input channels are searched: the rescaled rows."""


def hessian_copies(work: Work, learners: list[Decision]) -> int:
    """The damped Hessian and its factor; the cross term of a second stream; the factor in another order for a codebook;
    a Hessian and a cross term of its own for a second method."""
    codebook = any(map(in_vectors, learners))
    return 1 + work.streams + codebook + work.streams * (work.methods > 1)


def learns(decision: Decision) -> bool:
    """Whether a method takes whole second moments of the inputs."""
    return decision.method is not None and decision.method.needs_hessian


def rescales(decision: Decision) -> bool:
    """Whether the method searches factors of the linear's input channels first."""
    return isinstance(decision.method, Awq)


def in_vectors(decision: Decision) -> bool:
    """Whether codes stand for several weights at once."""
    return decision.quantising is not None and not decision.quantising[0].has_grid


def buffers_of(decision: Decision) -> int:
    """Buffers of a slice's size that the method works with, beside the weight."""
    method, codebook = decision.method, in_vectors(decision)
    if isinstance(method, Awq):
        method = method.then
    if not isinstance(method, Gptq):
        return RTN_BUFFERS + CODEBOOK_BUFFERS * codebook
    more = CODEBOOK_BUFFERS if codebook else POLISH_BUFFERS * (method.polish > 0)
    return PLAIN_BUFFERS + CROSS_BUFFERS * (method.cross > 0) + more + CODEBOOK_BUFFERS * codebook


def search_buffers_of(decision: Decision) -> int:
    """Buffers of a slice's size while factors of a linear's input channels are searched, beside the weight."""
    return RTN_BUFFERS + RESCALING_BUFFERS + CODEBOOK_BUFFERS * in_vectors(decision)
