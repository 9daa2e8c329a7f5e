"""What a Fisher pass needs of disk, memory and time: estimates, but for the bytes of the layers' files."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.arch.base import ModelArch
from quantkit.calibrate.chunk_sizes import BATCH_TOKENS, POSITIONS, SCORED_GROUP, VOCAB_BLOCK
from quantkit.documents.sensitivity import FisherJob
from quantkit.errors import PlanError
from quantkit.plan.costs import BACKWARD
from quantkit.plan.machine import Machine
from quantkit.plan.memory import DECODING_COPIES, INTERPRETER_BYTES, total
from quantkit.plan.output_memory import GRAPH_COPIES
from quantkit.plan.phases import Term
from quantkit.plan.schedule import Cost, Schedule, Step, layer_work
from quantkit.plan.shapes import ModelSizes
from quantkit.sensitivity.layer_files import layout_of

STORES = 4
"""Vectors of the residual stream's width that exist at once for each token: the stream and its gradient, what routed
experts read and the gradient there."""
BYTES_PER_LINEAR = 200
"""In the documents, of which two exist for a moment."""
HEAD_PRODUCTS = 3
"""With the output matrix: logits twice, and the gradient."""
SHARE_OF_RATE = 0.5
"""Of the rate of large matrix products, what a layer reaches with all that lies between its products."""


@dataclass(frozen=True, slots=True)
class FisherNeeds:
    """``disk``: bytes of the folder; ``working``: terms of memory where the arithmetic runs, hidden states apart;
    ``stores``: bytes of hidden states, in memory or on disk."""

    disk: int
    working: tuple[Term, ...]
    stores: int

    @property
    def memory(self) -> int:
        """Bytes with the hidden states in memory, the interpreter too."""
        return INTERPRETER_BYTES + total(self.working) + self.stores


def needs_of(arch: ModelArch, job: FisherJob) -> FisherNeeds:
    """What a job takes."""
    sizes = ModelSizes.of(arch)
    linears = sum(spec.linear for spec in arch.tensors())
    files = sum(layout_of(job, layer).nbytes for layer in range(len(job.sublayers)))
    width, batch = 2 if job.dtype == "BF16" else 4, max(BATCH_TOKENS, job.length)
    batch = min(batch, job.tokens)
    group = min(max(SCORED_GROUP, job.length), job.tokens)
    block = min(VOCAB_BLOCK, sizes.vocabulary)
    working = (
        Term("decoding", DECODING_COPIES * sizes.largest * 4, f"{DECODING_COPIES} x {sizes.largest:,} x 4 B"),
        Term(
            "autograd",
            GRAPH_COPIES * batch * sizes.longest * width,
            f"{GRAPH_COPIES} x {batch:,} tokens x {sizes.longest:,} x {width} B",
        ),
        Term("output matrix", block * sizes.hidden * 4, f"{block:,} x {sizes.hidden:,} x 4 B"),
        Term("logits", 8 * POSITIONS * block * 4, f"8 x {POSITIONS:,} x {block:,} x 4 B"),
        Term("head", 4 * group * sizes.hidden * 4, f"4 x {group:,} x {sizes.hidden:,} x 4 B"),
    )
    return FisherNeeds(files + 2 * BYTES_PER_LINEAR * linears, working, STORES * job.tokens * job.hidden * 4)


def check_memory(needs: FisherNeeds, machine: Machine) -> None:
    """Raise `PlanError` if the budget is less than the work needs with its hidden states on disk."""
    least = total(needs.working)
    if machine.device.type == "cpu" and machine.budget < least:
        largest = max(needs.working, key=lambda term: term.nbytes)
        raise PlanError(
            f"memory budget {machine.budget / 2**30:.2f} GiB: this pass needs at least {least / 2**30:.2f} GiB.",
            hint=f"Raise --memory-budget. The largest need is {largest.what}: {largest.formula}.",
        )


def schedule_of(arch: ModelArch, job: FisherJob, rate: float) -> Schedule:
    """A step for each layer forward, the head within the last, then one for each backward. ``rate``: floating-point
    operations a second of matrix products."""
    each = [2 * work / (SHARE_OF_RATE * rate) for work in layer_work(arch, job.tokens)]
    head = HEAD_PRODUCTS * 2 * job.tokens * arch.vocab_size * arch.hidden_size / (SHARE_OF_RATE * rate)
    forward = [Step("forward", layer, Cost(seconds)) for layer, seconds in enumerate(each)]
    forward[-1] = Step("forward", len(each) - 1, Cost(each[-1] + head))
    backward = [Step("backward", layer, Cost(BACKWARD * each[layer])) for layer in reversed(range(len(each)))]
    return (*forward, *backward)
