"""What a plan works on, as shapes: tokens, dense blocks, routed experts, tables. 46,000 tensors have a few dozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from quantkit.arch.base import ModelArch
from quantkit.calibrate.dataset import Calibration
from quantkit.calibrate.documents import find_files
from quantkit.documents.sensitivity import read_sensitivity
from quantkit.errors import CalibrationError, QuantkitError
from quantkit.plan.decide import Action, Decision
from quantkit.plan.plan import Plan
from quantkit.plan.recipe_validation import Validation
from quantkit.plan.tune import Tune
from quantkit.quantizers import Awq
from quantkit.tensors import Projection, Role, TensorInfo, TensorSpec

TEXT_BYTES_PER_TOKEN = 2
"""Bytes of text that a token takes at least: a file's tokens are estimated from its size."""


@dataclass(frozen=True, slots=True)
class DenseShape:
    """Attention, a dense MLP or a shared expert. ``context``: inputs of its output projection; ``parameters`` of all
    its linears; ``largest``: of the largest one; ``widest``: numbers of a token at the widest place; ``groups``:
    linears that read the same and that some output quantises, with a decision for each linear and output."""

    role: Role
    context: int
    parameters: int
    largest: int
    widest: int
    groups: tuple[tuple[Decision, ...], ...]


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a layer. ``decisions``: one for each projection that some output quantises, by
    treatment."""

    count: int
    inter: int
    hidden: int
    decisions: tuple[Decision, ...]


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a model. Parameters of its ``largest`` linear and of all linears of its largest ``layer``; the
    ``longest`` side of a linear; ``hidden`` and ``vocabulary``: the sides of its output matrix."""

    largest: int
    layer: int
    longest: int
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, arch: ModelArch) -> ModelSizes:
        """The sizes of a family's official checkpoint."""
        layers: dict[int | None, int] = {}
        largest = longest = 0
        for spec in arch.tensors():
            if spec.linear:
                size = prod(spec.shape)
                layers[spec.layer] = layers.get(spec.layer, 0) + size
                largest, longest = max(largest, size), max(longest, *spec.shape)
        return cls(largest, max(layers.values(), default=0), longest, arch.hidden_size, arch.vocab_size)


@dataclass(frozen=True, slots=True)
class Work:
    """``top_k``: routed experts that a token takes. ``tokens``: of the calibration text, 0 without; ``length``: of a
    row; ``streams``: 2 if the unquantised model goes along; ``methods``: different ones that learn, those that rescale
    channels counted by output; ``bf16``: whether all linears of the source are.

    ``blocks`` and ``experts`` differ in shape or treatment. ``untaught``: experts without calibration, of MTP layers
    that need none or in a data-free conversion. ``mtp_layers``: those that the text goes on into. ``largest_kept``:
    bytes of the largest tensor that passes through. ``heads``: of attention. ``fisher_tokens``: of the Fisher pass that
    output-aware methods learn from. ``fits_routers``: whether routers are moved by least squares. ``windows``: of the
    validation and tokens of one, None without. ``tune``: how layers are tuned, None if they are not.
    """

    hidden: int
    top_k: int
    tokens: int
    length: int
    streams: int
    methods: int
    bf16: bool
    blocks: tuple[DenseShape, ...]
    experts: tuple[Experts, ...]
    untaught: tuple[Experts, ...]
    mtp_layers: int
    tables: tuple[Decision, ...]
    largest_kept: int
    heads: int
    fisher_tokens: int
    fits_routers: bool
    sizes: ModelSizes
    windows: tuple[int, int] | None
    tune: Tune | None = None

    @property
    def stores(self) -> int:
        """Stores of hidden states at a layer's border: its streams, and what entered a layer that is tuned."""
        return self.streams + (self.tune is not None)

    @classmethod
    def of(cls, plan: Plan, arch: ModelArch) -> Work:
        """The work that a plan asks for."""
        calibration = plan.recipe.calibration
        decisions = [decision for output in plan.outputs for decision in output.decisions.values()]
        linears = [d for d in plan.outputs[0].decisions.values() if d.spec.linear]
        experts = _experts(decisions)
        mtp = plan.calibrates_mtp
        taught = [] if calibration is None else [shape for role, shape in experts if mtp or role is not Role.MTP]
        return cls(
            hidden=arch.hidden_size,
            top_k=arch.serving().top_k,
            tokens=0 if calibration is None else tokens_of(calibration),
            length=0 if calibration is None else calibration.sequence_length,
            streams=streams_of(plan),
            methods=_factors(plan),
            bf16={d.source_dtype for d in linears} == {"BF16"},
            blocks=tuple(_blocks(decisions, calibrated=calibration is not None, mtp=mtp)),
            experts=tuple(taught),
            untaught=tuple(shape for _, shape in experts if shape.decisions and shape not in taught),
            mtp_layers=len(arch.mtp_layers()) * mtp,
            tables=tuple(distinct(d for d in decisions if d.spec.table and d.action is Action.QUANTIZE)),
            largest_kept=max((_kept_bytes(d) for d in decisions), default=0),
            heads=arch.serving().heads,
            fisher_tokens=_fisher_tokens(plan),
            fits_routers=plan.recipe.router != "keep",
            sizes=ModelSizes.of(arch),
            windows=None if plan.recipe.validation is None else _windows(plan.recipe.validation, plan.recipe.folder),
            tune=plan.recipe.tune,
        )


def _fisher_tokens(plan: Plan) -> int:
    """Of the pass that the recipe names; nothing if it is not there, which the conversion will say."""
    recipe = plan.recipe
    if recipe.sensitivity is None or not recipe.output_aware:
        return 0
    try:
        return read_sensitivity(recipe.folder / recipe.sensitivity).job.tokens
    except QuantkitError:
        return 0


def _factors(plan: Plan) -> int:
    """Methods that take a Hessian of their own: what one output rescales, no other can use."""
    found = {
        (decision.method, number if isinstance(decision.method, Awq) else None)
        for number, output in enumerate(plan.outputs)
        for decision in output.decisions.values()
        if decision.method is not None and decision.method.needs_hessian
    }
    return len(found)


def _windows(wanted: Validation, folder: Path) -> tuple[int, int]:
    """(windows, tokens of one), from the sizes of the files."""
    try:
        files = find_files(wanted.text, folder)
    except CalibrationError:  # text of another folder: the conversion will say so
        files = []
    found = [file.path.stat().st_size // TEXT_BYTES_PER_TOKEN // wanted.context for file in files]
    return sum(min(count, wanted.max_windows_per_file or count) for count in found), wanted.context


def tokens_of(calibration: Calibration) -> int:
    """Whole rows are taken."""
    return -(-calibration.tokens // calibration.sequence_length) * calibration.sequence_length


def streams_of(plan: Plan) -> int:
    """Streams of hidden states."""
    return 2 if plan.follows_original else 1


def matrices(decision: Decision) -> tuple[int, int, int]:
    """(heads, out, in) of a linear or of a part of one."""
    shape = decision.spec.shape
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (1, shape[0], shape[1])


def distinct(decisions: Iterable[Decision]) -> list[Decision]:
    """One decision for each shape, role and treatment."""
    seen: dict[tuple[object, ...], Decision] = {}
    for decision in decisions:
        seen.setdefault(_treatment(decision), decision)
    return list(seen.values())


def _treatment(decision: Decision) -> tuple[object, ...]:
    spec = decision.spec
    return (spec.shape, spec.role, spec.projection, decision.action, decision.scheme, decision.method)


def _kept_bytes(decision: Decision) -> int:
    if decision.action is not Action.KEEP:
        return 0
    return max(decision.source_nbytes, TensorInfo(decision.spec.name, decision.spec.shape, decision.dtype).nbytes)


def _blocks(decisions: list[Decision], *, calibrated: bool, mtp: bool) -> Iterator[DenseShape]:
    """Blocks that differ. Without calibration (of MTP layers: unless ``mtp``) linears are groups of one."""
    layers: dict[tuple[int | None, Role], list[Decision]] = {}
    for decision in decisions:
        spec = decision.spec
        if spec.linear and spec.base_role is not Role.EXPERT and spec.expert is None:
            layers.setdefault((spec.layer, spec.base_role), []).append(decision)
    seen: set[tuple[object, ...]] = set()
    for (_, role), members in layers.items():
        known = tuple(_treatment(decision) for decision in members)
        if known not in seen:
            seen.add(known)
            yield _block(role, members, together=calibrated and (mtp or members[0].spec.role is not Role.MTP))


def _block(role: Role, members: list[Decision], *, together: bool) -> DenseShape:
    sizes = {d.spec.name: matrices(d) for d in members}
    outputs = [d.spec for d in members if d.spec.projection in (Projection.OUT, Projection.DOWN)]
    # A part counts where its whole is not there too.
    counted = {d.spec.name: prod(sizes[d.spec.name]) for d in members if d.spec.part_of not in sizes}
    groups: dict[object, list[Decision]] = {}
    for decision in members:
        if decision.action is Action.QUANTIZE:
            alike = decision.spec.shape[:-2], decision.spec.shape[-1]
            groups.setdefault(alike if together else decision.spec.name, []).append(decision)
    return DenseShape(
        role=role,
        context=max((spec.shape[-1] for spec in outputs), default=0),
        parameters=sum(counted.values()),
        largest=max(counted.values()),
        # One side of a part belongs to the heads; the other is the latent, which is not there once for each head.
        widest=max(i if heads == 1 else heads * min(out, i) for heads, out, i in sizes.values()),
        groups=tuple(map(tuple, groups.values())),
    )


def _experts(decisions: list[Decision]) -> list[tuple[Role, Experts]]:
    """The experts of each kind of layer, with its role."""
    layers: dict[int | None, list[Decision]] = {}
    for decision in decisions:
        if decision.spec.expert is not None and decision.action is not Action.DROP:
            layers.setdefault(decision.spec.layer, []).append(decision)
    found: dict[tuple[object, ...], tuple[Role, Experts]] = {}
    for members in layers.values():
        alike = distinct(members)
        known = tuple(_treatment(decision) for decision in alike)
        if known not in found:
            count = 1 + max(decision.spec.expert or 0 for decision in members)
            quantised = tuple(decision for decision in alike if decision.action is Action.QUANTIZE)
            found[known] = (alike[0].spec.role, Experts(count, *_sides(alike[0].spec), quantised))
    return list(found.values())


def _sides(spec: TensorSpec) -> tuple[int, int]:
    """(inter, hidden) of gated experts: down is (hidden, inter), gate and up are (inter, hidden)."""
    rows, columns = spec.shape[-2:]
    return (columns, rows) if spec.projection is Projection.DOWN else (rows, columns)
