"""What a conversion needs of RAM, device memory and disk, as a sum of terms. Estimates, except for the output's bytes.

    hidden states   tokens * (streams * hidden + what a block keeps) * 4 B, in RAM, on the GPU or on disk; a block keeps
                    its output projection's inputs, routed experts those of each stream
    resume points   tokens * hidden * 4 B, for each stream, at the borders of two layers at most, on disk
    Hessian set     in_features^2 * 4 B * HESSIAN_COPIES of a GPTQ linear
    slices          rows are quantised in slices of bounded size (on a GPU in longer ones)
    weight set      out_features * in_features * 4 B * WEIGHT_COPIES of the linears that are quantised together
    passing         one batch of rows at the widest linear, and the largest weight on its way from the disk; never
                    while something is quantised, so the larger of the two counts
    kept chunk      tensors that are not quantised pass through in pieces
    interpreter     Python, torch and libraries

The widest linear of DeepSeek V3 is its dense layers' down_proj: one copy of its Hessian (18432^2) is 1.36 GB. There are
two streams if some method follows the unquantised model beside the quantised one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from quantkit.arch.base import ModelArch
from quantkit.calibrate.chunk_sizes import BATCH_TOKENS
from quantkit.calibrate.dataset import Calibration
from quantkit.errors import PlanError
from quantkit.plan.decide import Action, Decision
from quantkit.plan.plan import Plan
from quantkit.quantizers.batch import SLICE_BYTES
from quantkit.schemes import GgmlScheme
from quantkit.tensors import Role

HESSIAN_COPIES = 3
"""The damped Hessian, its factor, and the cross term toward the unquantised stream. Codebooks need the factor in
another order too, and a second method a Hessian and a cross term of its own."""
WEIGHT_COPIES = 1.5
"""Of each linear of a group: the float32 original, and codes and scales twice (in slices and joined)."""
SLICE_BUFFERS = 6
"""Methods take rows in slices, with about so many buffers of a slice's size."""
KEPT_CHUNK_BYTES = 64 * 2**20
INTERPRETER_BYTES = 400 * 10**6
ACTIVATION_COPIES = 4
"""Activations of one batch of rows: two projections and their product, and the other stream's."""
READ_BYTES = 6
"""Of a weight: as the source stores it, and in float32."""
HEADER_BYTES_PER_TENSOR = 140
"""Room in a safetensors header; V3's release uses 129."""
STORED_PER_TENSOR = 3
"""A linear on an integer grid is stored as codes, scales and shape."""
JOURNAL_BYTES_PER_TENSOR = 200


@dataclass(frozen=True, slots=True)
class Term:
    """One reason to need memory. ``formula`` is how ``nbytes`` came about, for people."""

    what: str
    nbytes: int
    formula: str


@dataclass(frozen=True, slots=True)
class Needs:
    """What a conversion needs. Hidden states are a term of their own, because a memory budget moves them between RAM
    and disk."""

    working: tuple[Term, ...]
    hidden_states: Term | None
    disk: tuple[Term, ...]

    @property
    def working_bytes(self) -> int:
        """RAM (or device memory, without the interpreter) that no budget can avoid."""
        return sum(term.nbytes for term in self.working)

    @property
    def ram_bytes(self) -> int:
        """RAM with the hidden states in it."""
        return self.working_bytes + (self.hidden_states.nbytes if self.hidden_states else 0)

    @property
    def disk_bytes(self) -> int:
        """Disk at the peak, hidden states there."""
        return sum(term.nbytes for term in self.disk)


def check_budget(needs: Needs, budget: int) -> None:
    """Raise `PlanError` if ``budget`` bytes, which the interpreter does not count against, are less than the work
    needs."""
    least = needs.working_bytes - INTERPRETER_BYTES
    if budget < least:
        largest = max(needs.working[1:], key=lambda term: term.nbytes)  # the first is the interpreter
        raise PlanError(
            f"memory budget {budget / 2**30:.2f} GiB: this conversion needs at least {least / 2**30:.2f} GiB "
            f"beside the interpreter's {INTERPRETER_BYTES / 1e6:.0f} MB.",
            hint=f"Raise --memory-budget. The largest need is {largest.what}: {largest.formula}.",
        )


def conversion_needs(plan: Plan, arch: ModelArch) -> Needs:
    """Terms of the peak of `convert` for this plan."""
    quantized = [decision for output in plan.outputs for decision in _distinct(output.decisions.values())]
    quantized = [decision for decision in quantized if decision.action is Action.QUANTIZE]
    hidden = _hidden_states(plan, arch)
    return Needs(_working(plan, arch, quantized), hidden, _disk(plan, arch, hidden))


def check_free_disk(plan: Plan, needs: Needs, out: Path, already_written: int = 0) -> None:
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
        f"{out}: needs {needed / 1e9:.1f} GB of disk, {folder} has {free / 1e9:.1f} GB free.",
        hint="Choose another place with -o" + (", or fewer calibration tokens." if needs.hidden_states else "."),
    )


def _distinct(decisions: Iterable[Decision]) -> list[Decision]:
    """One decision for each shape, role and treatment: 46,000 tensors have a few dozen."""
    seen: dict[tuple[object, ...], Decision] = {}
    for decision in decisions:
        spec = decision.spec
        seen.setdefault((spec.shape, spec.role, decision.action, decision.scheme, decision.method), decision)
    return list(seen.values())


def _working(plan: Plan, arch: ModelArch, quantized: list[Decision]) -> tuple[Term, ...]:
    terms = [Term("interpreter", INTERPRETER_BYTES, "Python, torch, libraries, kernels")]
    methods = {d.method for output in plan.outputs for d in output.decisions.values() if _learns(d)}
    copies = HESSIAN_COPIES + 2 * (len(methods) > 1)
    # Linears that read the residual stream come in pairs; without text each comes alone.
    paired = arch.hidden_size if plan.recipe.calibration else 0
    phases = [_quantising(decision, paired, copies) for decision in quantized]
    if plan.recipe.calibration:
        phases.append(_collecting(plan, quantized))
    terms += max(phases, key=lambda phase: sum(term.nbytes for term in phase), default=())
    terms.append(Term("kept chunk", KEPT_CHUNK_BYTES, "64 MiB"))
    return tuple(terms)


def _learns(decision: Decision) -> bool:
    """Whether a method takes whole second moments of the inputs."""
    return decision.method is not None and decision.method.needs_inputs


def _quantising(decision: Decision, paired: int, hessian_copies: int) -> tuple[Term, ...]:
    """While one linear is quantised, or two with ``paired`` in_features. Tables come in pieces."""
    heads, out_features, in_features = _matrices(decision)
    if decision.spec.table:
        return (Term("rows of a table", 4 * KEPT_CHUNK_BYTES, f"{decision.spec.name}: a piece in float32, and blocks"),)
    name, pair = decision.spec.name, 2 if in_features == paired else 1
    weight = Term(
        "weight set",
        int(pair * WEIGHT_COPIES * heads * out_features * in_features * 4),
        f"{name}: {pair} x {heads * out_features:,} x {in_features:,} x 4 B x {WEIGHT_COPIES}",
    )
    slices = Term(
        "slices",
        SLICE_BUFFERS * min(SLICE_BYTES, heads * out_features * in_features * 4),
        f"{SLICE_BUFFERS} buffers of {SLICE_BYTES // 2**20} MiB at most",
    )
    if not _learns(decision):
        return weight, slices
    copies = hessian_copies + (isinstance(decision.scheme, GgmlScheme) and not decision.scheme.has_grid)
    formula = f"{name}: {heads} x {in_features:,}^2 x 4 B x {copies}"
    return Term("Hessian set", heads * in_features**2 * 4 * copies, formula), weight, slices


def _matrices(decision: Decision) -> tuple[int, int, int]:
    """(heads, out, in) of a linear or of a part of one."""
    shape = decision.spec.shape
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (1, shape[0], shape[1])


def _collecting(plan: Plan, quantized: list[Decision]) -> tuple[Term, ...]:
    """While a batch of rows passes, through kept linears too, and the moments of its inputs are added up."""
    linears = [_matrices(decision) for decision in _dense_linears(plan)]
    # One side of a part belongs to the heads; the other is the latent, which is not there once for each head.
    widest = max(inputs if heads == 1 else heads * min(out, inputs) for heads, out, inputs in linears)
    largest = max(heads * out * inputs for heads, out, inputs in linears)
    calibration = plan.recipe.calibration
    tokens = max(BATCH_TOKENS, calibration.sequence_length if calibration else 0)
    gptq = max((d.spec.shape[-1] for d in quantized if _learns(d)), default=0)
    formula = f"{tokens:,} tokens x {widest:,} x 4 B x {ACTIVATION_COPIES}"
    return (
        Term("activations", tokens * widest * 4 * ACTIVATION_COPIES, formula),
        Term("weight", largest * READ_BYTES, f"{largest:,} x {READ_BYTES} B"),
        Term("moments", gptq**2 * 4 * 2, f"{gptq:,}^2 x 4 B x 2"),
    )


def _hidden_states(plan: Plan, arch: ModelArch) -> Term | None:
    """The streams, and the widest scratch that a block keeps beside them: what its output projection reads in the
    calibrated stream; or what routed experts read in each, while the shared one passes."""
    calibration = plan.recipe.calibration
    if calibration is None:
        return None
    dense, streams = _dense_linears(plan), _streams(plan) * arch.hidden_size
    widest = max(decision.spec.shape[-1] for decision in dense)
    outputs = [d.spec for d in dense if d.spec.role is Role.SHARED_EXPERT and d.spec.shape[0] == arch.hidden_size]
    shared = max((spec.shape[-1] for spec in outputs), default=0)
    scratch = max(widest, streams + shared)
    nbytes = _tokens(calibration) * (streams + scratch) * 4
    formula = f"{_tokens(calibration):,} tokens x ({_streams(plan)} x {arch.hidden_size:,} + {scratch:,}) x 4 B"
    return Term("hidden states", nbytes, formula)


def _dense_linears(plan: Plan) -> list[Decision]:
    decisions = plan.outputs[0].decisions.values()
    dense = [d for d in decisions if d.spec.linear and d.spec.role not in (Role.EXPERT, Role.MTP)]
    return _distinct(dense)


def _tokens(calibration: Calibration) -> int:
    """Whole rows are taken."""
    return -(-calibration.tokens // calibration.sequence_length) * calibration.sequence_length


def _streams(plan: Plan) -> int:
    return 2 if plan.follows_original else 1


def _disk(plan: Plan, arch: ModelArch, hidden: Term | None) -> tuple[Term, ...]:
    terms: list[Term] = []
    for output in plan.outputs:
        overhead = STORED_PER_TENSOR * output.tensors * HEADER_BYTES_PER_TENSOR
        terms.append(Term(f"output {output.output.name}", output.nbytes + overhead, "tensor data and headers"))
        if beside := output.target.companion_bytes:
            terms.append(Term(f"imatrix of {output.output.name}", beside, "mean squares of all inputs"))
    if hidden is not None and plan.recipe.calibration is not None:
        # A killed run resumes from the last finished layer: its state must live until the next layer's is complete.
        saved = _tokens(plan.recipe.calibration) * arch.hidden_size * 4 * _streams(plan)
        terms.append(Term("hidden states", hidden.nbytes, f"{hidden.formula} (if not in RAM)"))
        terms.append(Term("resume points", 2 * saved, f"2 x {saved / 1e9:.1f} GB, at the borders of two layers"))
    n_tensors = sum(output.tensors for output in plan.outputs)
    terms.append(
        Term("journal", n_tensors * JOURNAL_BYTES_PER_TENSOR, f"{n_tensors:,} tensors x {JOURNAL_BYTES_PER_TENSOR} B")
    )
    return tuple(terms)
