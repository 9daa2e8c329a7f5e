"""What a conversion, or an evaluation, needs of RAM, GPU memory and disk, as sums of terms. Estimates, except for the
output's bytes.

    interpreter     Python, torch and its libraries, compiled kernels, the tokenizer
    the work        the largest of the phases in `quantkit.plan.phases`, in RAM or on the GPU that computes
    hidden states   tokens * (streams * hidden + what a block keeps) * 4 B, in RAM, on the GPU or on disk; a block keeps
                    its output projection's inputs, routed experts those of each stream
    resume points   tokens * hidden * 4 B, for each stream, at the borders of two layers at most, on disk

There are two streams if some method follows the unquantised model beside the quantised one. How a memory budget divides
them between RAM, GPU and disk is in `quantkit.plan.batch_sizes`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from quantkit.arch.base import ModelArch
from quantkit.calibrate.chunk_sizes import BATCH_TOKENS, POSITIONS, SCORED_GROUP, VOCAB_BLOCK
from quantkit.errors import PlanError
from quantkit.formats.sizes import short_size
from quantkit.plan.phases import ACTIVATION_COPIES, Phase, Place, Term, phases
from quantkit.plan.plan import Plan
from quantkit.plan.router_memory import fitting_routers
from quantkit.plan.shapes import ModelSizes, Work
from quantkit.plan.tuning_memory import with_tuning
from quantkit.tensors import Role

INTERPRETER_BYTES = 430 * 10**6
"""Resident when the work is done and its tensors are freed: 230 MB for Python and torch, 85 MB for numba, 115 MB for
the code of matrix products, compiled kernels, tokenizer and journal."""
LEAST_CACHE = 64 * 2**20
"""Weights of dense linears that are kept however small the budget is."""
DECODING_COPIES = 4
"""Float32 copies of the largest matrix: as stored, decoded, converted, and kept."""
BYTES_PER_TOKEN = 96
"""Bytes that each model takes for a token: running sums of its logits, and experts chosen."""
BYTES_PER_TOP_TOKEN = 40
"""Bytes for one of a position's most likely tokens, while a group of positions is in memory."""
HEADER_BYTES_PER_TENSOR = 140
"""Room in a safetensors header; V3's release uses 129."""
STORED_PER_TENSOR = 3
"""A linear on an integer grid is stored as codes, scales and shape."""
JOURNAL_BYTES_PER_TENSOR = 200
DESCRIPTION_BYTES = 65_536
"""Of config.json, README.md and what quantkit.json says of the whole."""
DESCRIPTION_BYTES_PER_TENSOR = 600
"""250 in quantkit.json, 100 in an index for each of `STORED_PER_TENSOR`; the rest for long names."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a conversion needs for its ``work``. ``working``: of RAM, if the hidden states lie on disk and one expert is
    quantised at a time. Hidden states are a term of their own: a memory budget moves them between RAM and disk."""

    work: Work
    working: tuple[Term, ...]
    hidden_states: Term | None
    disk: tuple[Term, ...]

    @property
    def working_bytes(self) -> int:
        """RAM that no budget can avoid, where the processor computes."""
        return total(self.working)

    @property
    def ram_bytes(self) -> int:
        """RAM with the hidden states in it."""
        return self.working_bytes + (self.hidden_states.nbytes if self.hidden_states else 0)

    @property
    def disk_bytes(self) -> int:
        """Disk at the peak, hidden states there."""
        return total(self.disk)


def total(terms: tuple[Term, ...]) -> int:
    """Bytes of all terms."""
    return sum(term.nbytes for term in terms)


def interpreter() -> Term:
    """What no budget counts."""
    return Term("interpreter", INTERPRETER_BYTES, "Python, torch, libraries, kernels")


def least_budget(needs: Needs) -> int:
    """Bytes that a memory budget must have at least, the interpreter apart."""
    return needs.working_bytes - INTERPRETER_BYTES


def check_budget(needs: Needs, budget: int) -> None:
    """Raise `PlanError` if ``budget`` bytes, which the interpreter does not count against, are less than the work
    needs."""
    least = least_budget(needs)
    if budget < least:
        largest = max(needs.working[1:], key=lambda term: term.nbytes)  # the first is the interpreter
        raise PlanError(
            f"memory budget {budget / 2**30:.2f} GiB: this conversion needs at least {least / 2**30:.2f} GiB "
            f"beside the interpreter's {INTERPRETER_BYTES / 1e6:.0f} MB.",
            hint=f"Raise --memory-budget. The largest need is {largest.what}: {largest.formula}.",
        )


def conversion_needs(plan: Plan, arch: ModelArch, side_files: int = 0) -> Needs:
    """Terms of what `convert` needs at least for this plan. ``side_files``: bytes beside the source's weights that go
    along."""
    work = Work.of(plan, arch)
    hidden = _hidden_states(work)
    least = max(conversion_phases(work, Place.of(work, None), 1, LEAST_CACHE), key=lambda phase: phase.nbytes)
    return Needs(work, (interpreter(), *least.terms), hidden, _disk(plan, work, hidden, side_files))


def conversion_phases(work: Work, place: Place, experts: int, cache: int) -> tuple[Phase, ...]:
    """All phases, validation included, with so many experts at once and ``cache`` bytes for weights."""
    found = (*phases(work, place, experts, cache), *fitting_routers(work, place))
    if work.tune is not None:
        found = with_tuning(work, work.tune, place, found)
    return found if work.windows is None else (*found, _validation(work, work.windows, cache // 2))


def _validation(work: Work, windows: tuple[int, int], cache: int) -> Phase:
    """Source and result side by side, when the streams are closed: only its own stores exist."""
    layer = work.sizes.layer * 4
    kept = Term("weight cache", 2 * min(cache, layer), f"2 x a layer's {layer:,} B, {cache:,} B at most")
    stores = (windows[0] * windows[1] * work.hidden * 4,) * 3
    return Phase("validation", (*evaluation_needs(work.sizes, 2, windows), kept), stores, streams_open=False)


def evaluation_needs(sizes: ModelSizes, n_models: int, shape: tuple[int, int], top: int = 0) -> tuple[Term, ...]:
    """Terms of RAM of models that run side by side over ``shape`` = (windows, tokens of one), beside their hidden
    states and the weights that are kept. ``top``: most likely tokens of each position that are read or written."""
    largest, widest = sizes.largest, sizes.longest
    n_rows, length = shape
    tokens, batch = n_rows * length, min(max(BATCH_TOKENS, length), n_rows * length)
    block, head = min(VOCAB_BLOCK, sizes.vocabulary), sizes.hidden
    listed = min(tokens, max(SCORED_GROUP, length)) * top
    terms = (
        Term("decoding", DECODING_COPIES * largest * 4, f"{DECODING_COPIES} x {largest:,} x 4 B"),
        Term(
            "activations", ACTIVATION_COPIES * 4 * batch * widest, f"{ACTIVATION_COPIES} x {batch:,} x {widest:,} x 4 B"
        ),
        Term("output matrix", n_models * block * head * 4, f"{n_models} x {block:,} x {head:,} x 4 B"),
        Term("logits", 6 * POSITIONS * block * 4, f"6 x {POSITIONS:,} x {block:,} x 4 B"),
        Term("scores", n_models * tokens * BYTES_PER_TOKEN, f"{n_models} x {tokens:,} x {BYTES_PER_TOKEN} B"),
        Term("most likely tokens", listed * BYTES_PER_TOP_TOKEN, f"{listed:,} x {BYTES_PER_TOP_TOKEN} B"),
    )
    return tuple(term for term in terms if term.nbytes)


def check_free_disk(needs: Needs, out: Path, already_written: int = 0) -> None:
    """Raise `PlanError` unless the file system of ``out`` has room. ``already_written``: bytes that a resumed run has
    there already."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = max(0, needs.disk_bytes - already_written)
    if free >= needed:
        return
    raise PlanError(
        f"{out}: needs {short_size(needed)} of disk, {folder} has {short_size(free)} free.",
        hint="Choose another place with -o" + (", or fewer calibration tokens." if needs.hidden_states else "."),
    )


def _hidden_states(work: Work) -> Term | None:
    """The streams, and the widest scratch that a block keeps beside them: what its output projection reads in the
    calibrated stream; or what routed experts read in each, while the shared one passes; or the first stream on its way
    into an MTP layer."""
    if not work.tokens:
        return None
    streams = work.streams * work.hidden
    shared = max((block.context for block in work.blocks if block.role is Role.SHARED_EXPERT), default=0)
    routed = streams + shared if work.experts else 0
    entering = work.hidden if work.mtp_layers else 0
    scratch = max(routed, entering, *(block.context for block in work.blocks))
    tuned = work.hidden * (work.tune is not None)  # what entered the layer, and its target
    nbytes = work.tokens * (streams + tuned + max(scratch, 2 * tuned)) * 4
    formula = f"{work.tokens:,} tokens x ({work.stores} x {work.hidden:,} + {max(scratch, 2 * tuned):,}) x 4 B"
    return Term("hidden states", nbytes, formula)


def _disk(plan: Plan, work: Work, hidden: Term | None, side_files: int) -> tuple[Term, ...]:
    terms: list[Term] = []
    for output in plan.outputs:
        overhead = STORED_PER_TENSOR * output.tensors * HEADER_BYTES_PER_TENSOR
        terms.append(Term(f"output {output.output.name}", output.nbytes + overhead, "tensor data and headers"))
        if beside := output.target.companion_bytes:
            terms.append(Term(f"imatrix of {output.output.name}", beside, "mean squares of all inputs"))
    if hidden is not None:
        # A killed run resumes from the last finished layer: its state must live until the next layer's is complete.
        saved = work.tokens * work.hidden * 4 * work.streams
        terms.append(Term("hidden states", hidden.nbytes, f"{hidden.formula} (if not in RAM)"))
        terms.append(Term("resume points", 2 * saved, f"2 x {short_size(saved)}, at the borders of two layers"))
    n_tensors, n_outputs = sum(output.tensors for output in plan.outputs), len(plan.outputs)
    described = n_outputs * DESCRIPTION_BYTES + n_tensors * DESCRIPTION_BYTES_PER_TENSOR
    formula = f"{DESCRIPTION_BYTES:,} B + {n_tensors:,} tensors x {DESCRIPTION_BYTES_PER_TENSOR} B"
    terms.append(Term("quantkit.json, config and index", described, formula))
    if side_files:
        terms.append(Term("side files", n_outputs * side_files, f"{n_outputs} x tokenizer, licence and the like"))
    terms.append(
        Term("journal", n_tensors * JOURNAL_BYTES_PER_TENSOR, f"{n_tensors:,} tensors x {JOURNAL_BYTES_PER_TENSOR} B")
    )
    return tuple(terms)
