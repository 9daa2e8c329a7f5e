"""The phases of a conversion, each with what it holds in the memory where the arithmetic runs (RAM, or a GPU's).

Only one phase runs at a time, so the peak is that of the largest, beside what lasts longer: the interpreter and the
stores of hidden states. Within a phase the terms exist together:

    weights          of the linears that are quantised together, float32 (on a GPU with kernels bfloat16)
    Hessian set      in_features^2 * 4 B for each matrix: the Hessian, its factor, the cross term toward the unquantised
                     stream, and what a codebook or a second method needs beside them
    slices           rows are quantised in slices of bounded size; the method decides how many such buffers exist
    activations      of one batch of tokens, or of one chunk of an expert's tokens
    hidden units     what the down projections of the experts at hand read, as far as they are kept
    weight cache     dense weights that each batch of tokens asks for again

Numbers of buffers were counted in the code and measured: see `benchmarks/memory_model.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.calibrate.chunk_sizes import BATCH_TOKENS, DEVICE_TIMES, EXPERT_CHUNK
from quantkit.plan import output_memory
from quantkit.plan.decide import Decision
from quantkit.plan.hardware import Gpu
from quantkit.plan.method_memory import buffers_of, hessian_copies, learns, rescales, search_buffers_of
from quantkit.plan.shapes import DenseShape, Experts, Work, matrices
from quantkit.plan.terms import Term
from quantkit.quantizers.batch import DEVICE_SLICE_BYTES, SLICE_BYTES
from quantkit.tensors import Role

KEPT_CHUNK_BYTES = 64 * 2**20
"""Tensors that are not quantised pass through in pieces of this size."""
KEPT_HIDDEN = 4
"""What is kept of a batch's hidden units takes at most so many times the experts' own weights, about what sweeping gate
and up took before. The rest (of an expert that nearly all tokens choose) is computed again."""
READ_AHEAD_BYTES = 2 * 2**30
"""Decoded weights that may wait on a GPU."""
MOST_WAITING = 4
"""Finished projections of a batch that may wait to be written: what they hold is GPU memory."""
ACTIVATION_COPIES = 4
"""Activations of one batch of tokens: two projections and their product, and the other stream's."""
READ_BYTES = 6
"""Bytes that a weight takes while it is read: as the source stores it, and in float32."""
CODE_BYTES = 1.25
"""Bytes that a quantised weight takes before it is packed: a code, and its share of scales, offsets and losses."""
DECODE_COPIES = 3
"""Decoding a linear on a processor: codes in float32, their product with the scales, and the result."""
ROUTING_BYTES = 40
"""Bytes for each expert that a token takes, in each stream: its number and gate weight, sorted by token and by
expert."""
POPULAR = 2
"""Some experts see so many times the mean of tokens."""


@dataclass(frozen=True, slots=True)
class Phase:
    """``terms`` exist together. ``scratch``: bytes of each store for all tokens that lives within the block, in the
    order in which they are made; ``streams_open``: whether the calibration's streams exist beside them."""

    what: str
    terms: tuple[Term, ...]
    scratch: tuple[int, ...] = ()
    streams_open: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the terms; the stores may lie elsewhere."""
        return sum(term.nbytes for term in self.terms)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the arithmetic runs. ``narrow``: activations and experts' weights are bfloat16."""

    gpu: Gpu | None
    narrow: bool

    @classmethod
    def of(cls, work: Work, gpu: Gpu | None) -> Place:
        """Products are made in bfloat16 by the kernels, if the source's linears are."""
        return cls(gpu, gpu is not None and gpu.kernels and work.bf16)

    @property
    def width(self) -> int:
        """Bytes of an activation, and of a weight as the streams compute with it."""
        return 2 if self.narrow else 4

    @property
    def times(self) -> int:
        """How many times the tokens that a processor takes at once."""
        return 1 if self.gpu is None else DEVICE_TIMES

    @property
    def slice_bytes(self) -> int:
        """Float32 bytes of rows that are quantised at once."""
        return SLICE_BYTES if self.gpu is None else DEVICE_SLICE_BYTES


def phases(work: Work, place: Place, experts: int, cache: int) -> Iterator[Phase]:
    """All phases of the work, with so many experts at once and ``cache`` bytes for weights of dense linears."""
    yield Phase("copying", (_passing("kept chunk", work.largest_kept),))
    yield from (_table(table) for table in work.tables)
    for block in work.blocks:
        yield from _dense_phases(work, block, place, cache)
    for shape in work.experts:
        yield from expert_phases(work, shape, place, min(experts, shape.count))
    for shape in work.untaught:
        yield _untaught(shape, place, min(experts, shape.count))
    if work.mtp_layers:
        yield _entering_mtp(work, place)


# --------------------------------------------------------------------------------------------------- outside the layers


def _passing(what: str, nbytes: int) -> Term:
    piece = min(KEPT_CHUNK_BYTES, nbytes)
    return Term(what, 2 * piece, f"2 x {piece:,} B: a piece as read and as stored, 64 MiB at most")


def _table(decision: Decision) -> Phase:
    """A matrix that no input reaches, stored in blocks: a piece in float32, as read, and the buffers of its method."""
    count, rows, columns = matrices(decision)
    piece = min(KEPT_CHUNK_BYTES, 4 * count * rows * columns)
    copies = 1.5 + buffers_of(decision)
    formula = f"{decision.spec.name}: {piece:,} B x {copies}"
    return Phase("quantising a table", (Term("rows of a table", int(piece * copies), formula),))


def _entering_mtp(work: Work, place: Place) -> Phase:
    """A stream on its way into an MTP layer: its successor is made beside it."""
    tokens = min(work.tokens, max(place.times * BATCH_TOKENS, work.length))
    weight, wide, copies = 2 * work.hidden**2, 2 * work.hidden, ACTIVATION_COPIES
    terms = (
        Term("weight", weight * READ_BYTES, f"{weight:,} x {READ_BYTES} B"),
        Term("activations", tokens * wide * 4 * copies, f"{tokens:,} x {wide:,} x 4 B x {copies}"),
    )
    return Phase("entering an MTP layer", terms, (work.tokens * work.hidden * 4,))


# --------------------------------------------------------------------------------------------------------- dense blocks


def _dense_phases(work: Work, block: DenseShape, place: Place, cache: int) -> Iterator[Phase]:
    context = (work.tokens * block.context * place.width,) if work.tokens else ()
    # Shared and routed experts read the same, which the routed ones keep for later.
    routed = _routed_inputs(work, place) if block.role is Role.SHARED_EXPERT and work.experts else ()
    gradients = output_memory.gradient_stores(work, (decision for group in block.groups for decision in group))
    scratch = gradients + routed + context
    kept = (*_cached(block, place, cache), *output_memory.hessians_of_dense(work, block)) if work.tokens else ()
    if gradients:
        collecting = (*_cached(block, place, cache), *output_memory.collecting_gradients(work, block))
        yield Phase(f"{block.role.value}: output gradients", collecting, gradients)
    if work.tokens:
        yield Phase(f"{block.role.value}: collecting", (*kept, *_collecting(work, block, place)), scratch)
    for group in block.groups:
        if any(map(rescales, group)):
            yield Phase(f"{block.role.value}: rescaling", (*kept, *_rescaling(group, place)), scratch)
        terms = (*kept, *quantising(work, group, place), *output_memory.rounding_of_dense(work, group))
        yield Phase(f"{block.role.value}: quantising", terms, scratch)


def _routed_inputs(work: Work, place: Place) -> tuple[int, ...]:
    """Stores of what routed experts read, of each stream."""
    return (work.tokens * work.hidden * place.width,) * work.streams


def _cached(block: DenseShape, place: Place, cache: int) -> tuple[Term, ...]:
    """The original weights and those that the quantised stream computes with share the cache."""
    weights = place.width * block.parameters
    nbytes = 2 * min(cache // 2, weights)
    return (Term("weight cache", nbytes, f"2 x the block's {weights:,} B, {cache // 2:,} B at most"),)


def _collecting(work: Work, block: DenseShape, place: Place) -> tuple[Term, ...]:
    """While a batch of tokens passes, through kept linears too, and the moments of its inputs are added up."""
    tokens = min(work.tokens, max(place.times * BATCH_TOKENS, work.length))
    width, largest, widest = place.width, block.largest, block.widest
    squares = max((d.spec.shape[-1] ** 2 * matrices(d)[0] for g in block.groups for d in g if learns(d)), default=0)
    return (
        Term("rows", tokens * work.hidden * 4 * work.streams, f"{tokens:,} x {work.hidden:,} x 4 B x {work.streams}"),
        Term(
            "activations",
            tokens * widest * width * ACTIVATION_COPIES,
            f"{tokens:,} tokens x {widest:,} x {width} B x {ACTIVATION_COPIES}",
        ),
        Term("weight", largest * READ_BYTES, f"{largest:,} x {READ_BYTES} B"),
        Term("moments", squares * 4 * work.streams, f"{squares:,} x 4 B x {work.streams}"),
    )


def quantising(work: Work, group: tuple[Decision, ...], place: Place) -> tuple[Term, ...]:
    """While linears that read the same are quantised. ``group`` has a decision for each linear and output."""
    linears = {decision.spec.name: matrices(decision) for decision in group}
    name, most = next(iter(linears)), max(group, key=buffers_of)
    weights = sum(count * rows * columns for count, rows, columns in linears.values())
    largest = max(count * rows * columns for count, rows, columns in linears.values())
    at_once = largest if place.gpu is None else weights
    weight = Term("weight set", int(weights * (4 + CODE_BYTES)), f"{name}: {weights:,} x {4 + CODE_BYTES} B")
    return (*_hessian_set(work, group), weight, _slices(most, 4 * at_once, place))


def _rescaling(group: tuple[Decision, ...], place: Place) -> tuple[Term, ...]:
    """While factors for the inputs of some linears are searched, one linear after the other."""
    largest = max((matrices(decision) for decision in group), key=lambda sizes: sizes[0] * sizes[1] * sizes[2])
    weight = largest[0] * largest[1] * largest[2]
    return (Term("weight", weight * READ_BYTES, f"{weight:,} x {READ_BYTES} B"), _searched(group, 4 * weight, place))


def _searched(decisions: tuple[Decision, ...], nbytes: int, place: Place) -> Term:
    """Buffers of the rows whose rounding is tried."""
    return _buffers(max(map(search_buffers_of, decisions)), nbytes, place)


def _hessian_set(work: Work, group: tuple[Decision, ...]) -> tuple[Term, ...]:
    learners = [decision for decision in group if learns(decision)]
    if not learners:
        return ()
    count, _, columns = matrices(learners[0])
    copies = hessian_copies(work, learners)
    formula = f"{learners[0].spec.name}: {count} x {columns:,}^2 x 4 B x {copies}"
    return (Term("Hessian set", count * columns**2 * 4 * copies, formula),)


def _slices(decision: Decision, nbytes: int, place: Place) -> Term:
    """Buffers of the rows in work. A GPU also joins linears and widens them to float32 first."""
    return _buffers(buffers_of(decision) + (place.gpu is not None), nbytes, place)


def _buffers(copies: int, nbytes: int, place: Place) -> Term:
    size, most = min(place.slice_bytes, nbytes), place.slice_bytes
    return Term("slices", copies * size, f"{copies} buffers of {size:,} B ({most:,} B at most)")


# ------------------------------------------------------------------------------------------------------- routed experts


def expert_phases(work: Work, shape: Experts, place: Place, count: int) -> Iterator[Phase]:
    """``count`` experts of one shape at a time, with calibration."""
    parts = _ExpertTerms(work, shape, place, count)
    scratch = output_memory.gradient_stores(work, shape.decisions) + _routed_inputs(work, place)
    always = (parts.originals, parts.routing, parts.beside, *output_memory.hessians_of_experts(shape, count))
    carried = parts.weights("carried weights", 2)
    gate = parts.hessians(work.hidden, 1)
    down = parts.hessians(shape.inter, 1)
    activations = parts.chunk(work.streams * work.hidden + 4 * shape.inter)
    wide = 2 if place.gpu is not None else 1  # a GPU takes gate and up as one
    if any(map(rescales, shape.decisions)):
        searched = _searched(shape.decisions, 4 * count * work.hidden * shape.inter, place)
        yield Phase(f"{count} experts: rescaling", (*always, searched), scratch)
    for what, terms in (
        ("collecting inputs", (gate, parts.chunk(3 * work.hidden))),
        (
            "quantising gate and up",
            (
                parts.hessians(work.hidden),
                parts.codes(2),
                parts.slices(wide),
                *output_memory.rounding_of_experts(shape, count, wide, down=False),
            ),
        ),
        ("decoding gate and up", (gate, parts.codes(2), parts.decoded)),
        ("hidden units", (carried, parts.kept, down, activations)),
        (
            "quantising down",
            (
                carried,
                parts.kept,
                *_left_between(activations, place),
                parts.hessians(shape.inter),
                parts.codes(1),
                parts.slices(1),
                *output_memory.rounding_of_experts(shape, count, 1, down=True),
            ),
        ),
        (
            "carrying on",
            (
                parts.weights("carried weights", 3),
                parts.kept,
                *_left_between(activations, place),
                parts.chunk(3 * work.hidden),
            ),
        ),
    ):
        yield Phase(f"{count} experts: {what}", tuple(t for t in (*always, *terms) if t.nbytes), scratch)


def _left_between(activations: Term, place: Place) -> tuple[Term, ...]:
    """Activations are freed, but they lie between the hidden units that are kept: the C library's heap does not give
    such gaps back, and what comes next is too large for them. On a GPU torch counts them as free."""
    if place.gpu is not None:
        return ()
    return (Term("gaps in the heap", activations.nbytes, f"freed activations, {activations.formula}"),)


@dataclass(frozen=True, slots=True)
class _ExpertTerms:
    """What a batch of ``count`` experts holds."""

    work: Work
    shape: Experts
    place: Place
    count: int

    @property
    def _matrix(self) -> int:
        """Weights of one projection of all experts of the batch."""
        return self.count * self.work.hidden * self.shape.inter

    def weights(self, what: str, projections: int) -> Term:
        nbytes = projections * self._matrix * self.place.width
        formula = f"{self.count} x {projections} x {self.work.hidden:,} x {self.shape.inter:,} x {self.place.width} B"
        return Term(what, nbytes, formula)

    @property
    def originals(self) -> Term:
        return self.weights("weights", 3)

    @property
    def routing(self) -> Term:
        work = self.work
        nbytes = work.streams * (work.tokens * work.top_k * ROUTING_BYTES + work.hidden**2 * 4)
        chosen = f"{work.tokens:,} tokens x {work.top_k} x {ROUTING_BYTES} B"
        formula = f"{work.streams} x ({chosen} + {work.hidden:,}^2 x 4 B)"
        return Term("routing and pooled moments", nbytes, formula)

    @property
    def beside(self) -> Term:
        """Threads that read and write beside a GPU."""
        return reading_and_writing(self.shape, self.place, self.work.hidden, self.count)

    def hessians(self, columns: int, copies: int = 0) -> Term:
        """Sums while they are collected (``copies`` = 1, for each stream), or all that a method makes of them."""
        learners = [d for d in self.shape.decisions if learns(d) and d.spec.shape[-1] == columns]
        if not learners:
            return Term("Hessian set", 0, "")
        number = copies * self.work.streams or hessian_copies(self.work, learners)
        return Term(
            "Hessian set", self.count * columns**2 * 4 * number, f"{self.count} x {columns:,}^2 x 4 B x {number}"
        )

    def codes(self, projections: int) -> Term:
        nbytes = int(projections * self._matrix * CODE_BYTES) if self.shape.decisions else 0
        return Term("codes and scales", nbytes, f"{projections} x {self._matrix:,} x {CODE_BYTES} B")

    def slices(self, projections: int) -> Term:
        if not self.shape.decisions:
            return Term("slices", 0, "")
        nbytes = output_memory.rows_at_once_of(self.shape.decisions, 4 * projections * self._matrix)
        return _slices(max(self.shape.decisions, key=buffers_of), nbytes, self.place)

    @property
    def decoded(self) -> Term:
        copies = (1 + (DECODE_COPIES if self.place.gpu is None else 1)) if self.shape.decisions else 0
        return Term("decoded weights", copies * self._matrix * 4, f"{copies} x {self._matrix:,} x 4 B")

    @property
    def kept(self) -> Term:
        """What their down projections read, as far as there is room for it."""
        most = KEPT_HIDDEN * 3 * self._matrix * self.place.width
        tokens = min(self.work.tokens * self.work.top_k, self.count * self._tokens)
        formula = (
            f"{tokens:,} tokens x {self.shape.inter:,} x {self.place.width} B, {KEPT_HIDDEN} x the weights at most"
        )
        return Term("hidden units", min(most, tokens * self.shape.inter * self.place.width), formula)

    @property
    def _tokens(self) -> int:
        """Tokens that a popular expert sees."""
        return min(self.work.tokens, POPULAR * self.work.tokens * self.work.top_k // self.shape.count)

    def chunk(self, widths: int) -> Term:
        tokens = min(self.place.times * EXPERT_CHUNK, self._tokens)
        formula = f"{tokens:,} tokens x {widths:,} x {self.place.width} B"
        return Term("activations", tokens * widths * self.place.width, formula)


def reading_and_writing(shape: Experts, place: Place, hidden: int, count: int) -> Term:
    """Weights that were read ahead, and results that wait to be written, beside a GPU."""
    if place.gpu is None:
        return Term("reading and writing beside", 0, "")
    matrix = hidden * shape.inter
    ahead = min(READ_AHEAD_BYTES, 3 * shape.count * matrix * 2)
    waiting = int((MOST_WAITING + 1) * count * matrix * CODE_BYTES)
    formula = f"{ahead:,} B read ahead + {MOST_WAITING + 1} x {count} x {matrix:,} x {CODE_BYTES} B to be written"
    return Term("reading and writing beside", ahead + waiting, formula)


def _untaught(shape: Experts, place: Place, count: int) -> Phase:
    """One projection of ``count`` experts at a time, rounded without calibration."""
    matrix = count * shape.inter * shape.hidden
    weights = Term("weights", int(matrix * (place.width + CODE_BYTES)), f"{matrix:,} x {place.width + CODE_BYTES} B")
    beside = reading_and_writing(shape, place, shape.hidden, count)
    slices = _slices(max(shape.decisions, key=buffers_of), 4 * matrix, place)
    return Phase(f"{count} experts, data-free", tuple(t for t in (weights, slices, beside) if t.nbytes))
