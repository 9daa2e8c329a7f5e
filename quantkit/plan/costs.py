"""What each step of a conversion should take on a machine of known speed -> `Schedule`.

Counted for each block of a layer: the tokens' forward pass in every stream, sums of squares of inputs (2 n^2 a token),
the factor of each Hessian, the choice of codes, decoding; bytes read and written beside. No weight is read, no torch
loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from quantkit.arch.base import ModelArch
from quantkit.calibrate.chunk_sizes import BATCH_TOKENS, POSITIONS, VOCAB_BLOCK
from quantkit.documents.speed import DiskSpeed, SpeedDocument
from quantkit.plan.decide import Action, Decision
from quantkit.plan.output_memory import aware, squares
from quantkit.plan.plan import OutputPlan, Plan
from quantkit.plan.schedule import FILES, KEPT, MTP_INPUTS, OUTSIDE, SCORES, TUNING, VALIDATION, Cost, Schedule, Step
from quantkit.plan.shapes import Work, matrices
from quantkit.plan.speed import treatment_key
from quantkit.plan.tuning_cost import tuning_seconds
from quantkit.quantizers.ldlq.rows import rows_at_once
from quantkit.tensors import Projection, Role

BLOCKS = {
    Role.ATTENTION: "attention",
    Role.MLP: "mlp",
    Role.SHARED_EXPERT: "shared_experts",
    Role.EXPERT: "experts",
}
"""Roles -> names of blocks, in the order of the work."""
EXPERTS = BLOCKS[Role.EXPERT]
NUMBER = 4
"""Bytes of a float32."""
REUSED = 2**25
"""Bytes of a tensor up to which the C library has room for it from before."""
PASSES = 8
"""Passes over a block's activations beside the products: norms, gates, gathering, adding."""
DECODE_PASSES = 8
"""Passes over a weight while it is read and widened."""
LOGIT_PASSES = 12
"""Passes over the logits of each model, in validation."""
BACKWARD = 3
"""Times a forward pass that gradients of the outputs take: computed again, and the products with transposed weights."""
ROW_PASSES = 5
"""Operations for each number of an output Hessian and each input: what rows leave over, and two losses."""
BLOCK_CALLS, EXPERT_CALLS, TENSOR_CALLS = 60, 100, 60
"""Small operations for a batch of tokens in each stream, for an expert, and for a linear that is written."""


def schedule(
    plan: Plan, arch: ModelArch, work: Work, speed: SpeedDocument, disk: DiskSpeed, at_once: int = 1
) -> Schedule:
    """Steps of the conversion that ``plan`` describes. ``speed`` has all treatments of the plan; ``at_once``: experts
    that go through one sweep."""
    return tuple(_Costs(plan, arch, work, speed, disk, at_once).steps())


@dataclass(frozen=True, slots=True)
class _Member:
    """A tensor of one output. ``stored``: bytes of it there."""

    output: int
    decision: Decision
    stored: int


_Members = dict[tuple[int | None, str], list[_Member]]


@dataclass(frozen=True, slots=True)
class _Costs:
    plan: Plan
    arch: ModelArch
    work: Work
    speed: SpeedDocument
    disk: DiskSpeed
    at_once: int

    def steps(self) -> Iterator[Step]:
        members = _members(self.plan.outputs)
        share = self.plan.source_bytes / max(1, sum(_sources([m for group in members.values() for m in group])))
        for layer in (None, *sorted({layer for layer, _ in members if layer is not None})):
            if layer is not None and self.arch.n_layers <= layer < self._calibrated:
                yield Step(MTP_INPUTS, layer, Cost(self._mtp_inputs(self.work.tokens * self.work.streams)))
            for kind in (OUTSIDE, *BLOCKS.values(), TUNING, KEPT):
                if kind == TUNING and self._tunes(layer):
                    yield Step(TUNING, layer, Cost(self._tuned(layer, members)))
                if found := members.get((layer, kind)):
                    cost = self._block(layer, kind, found) + self._moved(found, share)
                    yield Step(kind, layer, cost + self._saved(layer, kind))
        for number, output in enumerate(self.plan.outputs):
            yield Step(FILES, None, Cost(output.nbytes / self.speed.hashed, reading=output.nbytes / self.disk.read))
            if self.work.windows is not None:
                yield from self._validation(number, members, share)

    @property
    def _calibrated(self) -> int:
        """Layers that the text goes through, MTP layers included."""
        return self.arch.n_layers + self.work.mtp_layers if self.work.tokens else 0

    def _tunes(self, layer: int | None) -> bool:
        return self.work.tune is not None and layer is not None and layer < self._calibrated

    def _tuned(self, layer: int | None, members: _Members) -> float:
        """Codes, scales and norms of a whole layer."""
        assert self.work.tune is not None, "only for layers that are tuned"
        decisions = [member.decision for kind in BLOCKS.values() for member in members.get((layer, kind), ())]
        kernels = self.at_once > 1
        return tuning_seconds(self.work, self.work.tune, _linears(decisions), self._forward, self._passes, kernels)

    def _mtp_inputs(self, tokens: int) -> float:
        """eh_proj and its norms."""
        hidden = self.work.hidden
        nbytes = tokens * hidden * NUMBER
        return 4 * tokens * hidden**2 / self.speed.flops + self._passes(PASSES * nbytes, nbytes)

    def _moved(self, members: list[_Member], share: float) -> Cost:
        stored = sum(member.stored for member in members)
        return Cost(writing=stored / self.disk.write, ahead=share * sum(_sources(members)) / self.disk.read)

    def _saved(self, layer: int | None, kind: str) -> Cost:
        """Hidden states after a layer, to resume from."""
        if kind != KEPT or layer is None or layer >= min(self.arch.n_layers, self._calibrated - 1):
            return Cost()
        return Cost(writing=self.work.tokens * self.work.streams * self.work.hidden * NUMBER / self.disk.write)

    # ------------------------------------------------------------------------------------------------------- a block

    def _block(self, layer: int | None, kind: str, members: list[_Member]) -> Cost:
        decisions = [member.decision for member in members]
        seconds = self._chosen(decisions) + self._widened(decisions)
        if layer is not None and layer < self._calibrated and kind in BLOCKS.values():
            carried = [member.decision for member in members if not member.output]
            seconds += self._decoded(carried)
            seconds += self._experts(decisions) if kind == EXPERTS else self._dense(decisions)
        return Cost(seconds)

    def _chosen(self, decisions: list[Decision]) -> float:
        """Codes of all linears that an output quantises, packed."""
        seconds, calls = 0.0, 0
        for (chosen, (heads, rows, n)), count in Counter(
            (d.quantising, matrices(d)) for d in decisions if d.quantising is not None
        ).items():
            kernel = self.speed.kernels[treatment_key(*chosen)]
            weights = count * heads * rows * n
            sweeps = -(-count // self.at_once)
            if chosen[1].output_aware:
                sweeps *= -(-rows // rows_at_once(rows))
            each = kernel.rescale + kernel.weight + kernel.column * n + kernel.decode
            seconds += sweeps * kernel.call * n + weights * each
            calls += count
        return seconds + calls * TENSOR_CALLS * self.speed.call

    def _decoded(self, decisions: list[Decision]) -> float:
        """Quantised weights once more as float32."""
        return sum(
            prod(d.spec.shape) * self.speed.kernels[treatment_key(*d.quantising)].decode
            for d in decisions
            if d.quantising is not None
        )

    def _widened(self, decisions: list[Decision]) -> float:
        """The source's weights as float32."""
        weights = {d.spec.official: prod(d.spec.shape) * NUMBER for d in decisions}
        return sum(self._passes(DECODE_PASSES * nbytes, nbytes) for nbytes in weights.values())

    def _passes(self, nbytes: float, at_once: float) -> float:
        """Operations on each number of ``nbytes``, in tensors of ``at_once``."""
        return nbytes / (self.speed.memory if at_once <= REUSED else self.speed.new_memory)

    def _dense(self, decisions: list[Decision]) -> float:
        tokens, streams = self.work.tokens, self.work.streams
        batches = -(-tokens // max(BATCH_TOKENS, self.work.length))
        learned = sum(tokens * self._squares(heads, n) + self._factor(heads, n) for heads, n in _hessians(decisions))
        forward = streams * self._forward(_linears(decisions), tokens, self.work.length)
        gradients = self._gradients(decisions, _linears(decisions), self.work.fisher_tokens, self.work.length)
        return learned + forward + gradients + streams * batches * BLOCK_CALLS * self.speed.call

    def _experts(self, decisions: list[Decision]) -> float:
        linears = _linears(decisions)
        count, routed = self._count(linears), self.work.tokens * self.work.top_k
        calibration = self.plan.recipe.calibration
        least = 0 if calibration is None else calibration.min_expert_tokens
        seen = min(self.work.tokens, max(routed / count, least))
        shapes = Counter(_hessians(decisions, by_tensor=True))
        learned = sum(
            number * (seen * self._squares(heads, n) + self._factor(heads, n)) for (heads, n), number in shapes.items()
        )
        pools = bool(shapes) + self.work.fits_routers
        pooled = pools * self.work.tokens * self._squares(1, self.work.hidden)
        forward = self.work.streams * self._forward(linears, routed / count, 0)
        gradients = self._gradients(decisions, linears, self.work.fisher_tokens * self.work.top_k / count, 0)
        return learned + pooled + forward + gradients + count * self.work.streams * EXPERT_CALLS * self.speed.call

    def _gradients(
        self, decisions: Sequence[Decision], linears: Sequence[Decision], tokens: float, length: int
    ) -> float:
        """Of ``tokens`` of the Fisher pass through these linears and back; their sums of squares, and the products with
        output Hessians while rows are rounded."""
        found = {d.spec.name: d for d in aware(decisions)}
        if not found:
            return 0.0
        flops = sum(squares(d, self.work.heads) * (2 * tokens + ROW_PASSES * matrices(d)[2]) for d in found.values())
        return BACKWARD * self._forward(linears, tokens, length) + flops / self.speed.flops

    @staticmethod
    def _count(linears: Sequence[Decision]) -> int:
        return max(1, len({d.spec.expert for d in linears}))

    def _forward(self, linears: Sequence[Decision], tokens: float, length: int) -> float:
        """``tokens`` of one stream through every one of these linears; scores of attention over ``length``."""
        weights = sum(prod(d.spec.shape) for d in linears)
        widths = sum(sum(matrices(d)[1:]) for d in linears)
        queries = (Projection.Q, Projection.Q_B)
        heads = sum(matrices(d)[1] for d in linears if d.spec.projection in queries)
        heads += sum(matrices(d)[2] for d in linears if d.spec.projection is Projection.OUT)
        flops = 2 * tokens * (weights + length * heads)
        widest = max((max(matrices(d)[1:]) for d in linears), default=0)
        at_once = min(tokens, max(BATCH_TOKENS, length)) * widest * NUMBER
        return flops / self.speed.flops + self._passes(tokens * widths * NUMBER * PASSES, at_once)

    def _squares(self, heads: int, n: int) -> float:
        """A token's share of the Hessians, and of the cross term if there are two streams."""
        return 2 * heads * n * n * self.work.streams / self.speed.flops

    def _factor(self, heads: int, n: int) -> float:
        methods = max(1, self.work.methods)
        return methods * heads * (self.speed.factor_square * n**2 + self.speed.factor_cube * n**3)

    # ---------------------------------------------------------------------------------------------------- validation

    def _validation(self, output: int, members: _Members, share: float) -> Iterator[Step]:
        assert self.work.windows is not None, "only a recipe with validation has windows"
        n_windows, length = self.work.windows
        tokens = n_windows * length
        for layer in range(self.arch.n_layers):
            yield Step(VALIDATION, layer, self._compared_layer(output, layer, members, share))
        sides = self.arch.vocab_size
        flops = 2 * 2 * tokens * sides * self.work.hidden / self.speed.flops
        at_once = POSITIONS * min(sides, VOCAB_BLOCK) * NUMBER
        passes = self._passes(2 * tokens * sides * NUMBER * LOGIT_PASSES, at_once)
        scores = Cost(flops + passes)
        first = self.arch.n_layers  # an MTP layer, whose drafts are compared with what the model chooses
        if any(m.output == output for m in members.get((first, EXPERTS), ())):
            drafts = Cost(2 * scores.computing + 2 * self._mtp_inputs(tokens))
            scores += drafts + self._compared_layer(output, first, members, share)
        yield Step(SCORES, None, scores)

    def _compared_layer(self, output: int, layer: int, members: _Members, share: float) -> Cost:
        """A layer of source and result, side by side."""
        assert self.work.windows is not None, "only a recipe with validation has windows"
        n_windows, length = self.work.windows
        cost = Cost()
        for kind in BLOCKS.values():
            own = [m for m in members.get((layer, kind), []) if m.output == output]
            if own:
                cost += self._compared(kind, own, n_windows * length, length, share)
        return cost

    def _compared(self, kind: str, members: list[_Member], tokens: int, length: int, share: float) -> Cost:
        """A block of source and result, side by side."""
        decisions = [member.decision for member in members]
        linears, routed = _linears(decisions), float(tokens)
        batches = 1
        if kind == EXPERTS:
            count = self._count(linears)
            routed, length, batches = tokens * self.work.top_k / count, 0, count
        forward = 2 * self._forward(linears, routed, length)
        calls = 2 * batches * EXPERT_CALLS * self.speed.call
        stored = share * sum(_sources(members)) + sum(member.stored for member in members)
        computing = forward + calls + self._decoded(decisions) + self._widened(decisions)
        return Cost(computing, reading=stored / self.disk.read)  # nothing is read ahead here


def _members(outputs: Sequence[OutputPlan]) -> _Members:
    """By layer and stage. Dropped tensors cost nothing."""
    members: _Members = {}
    for number, output in enumerate(outputs):
        stored = {tensor.name: output.stored_bytes(tensor) for tensor in output.planned}
        for name, decision in output.decisions.items():
            if decision.action is not Action.DROP:
                members.setdefault(_stage(decision), []).append(_Member(number, decision, stored.get(name, 0)))
    return members


def _stage(decision: Decision) -> tuple[int | None, str]:
    spec = decision.spec
    if spec.layer is None:
        return None, OUTSIDE
    return spec.layer, BLOCKS.get(spec.base_role, KEPT) if spec.linear and not spec.table else KEPT


def _sources(members: list[_Member]) -> Iterator[int]:
    """Decoded bytes of each tensor of the source that some output stores."""
    found = {m.decision.spec.official: m.decision.source_nbytes for m in members}
    yield from found.values()


def _linears(decisions: list[Decision]) -> list[Decision]:
    """One decision for each linear; a part counts where its whole is not there."""
    found = {d.spec.name: d for d in decisions}
    return [d for d in found.values() if d.spec.part_of not in found]


def _hessians(decisions: list[Decision], *, by_tensor: bool = False) -> list[tuple[int, int]]:
    """(heads, inputs) of each group of linears that read the same and that a method learns from. ``by_tensor``: for
    each expert."""
    groups = {
        (d.spec.expert if by_tensor else None, d.spec.shape[:-2], d.spec.shape[-1])
        for d in decisions
        if d.method is not None and d.method.needs_inputs
    }
    return [(prod(heads), n) for _, heads, n in groups]
