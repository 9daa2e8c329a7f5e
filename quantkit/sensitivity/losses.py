"""Predicted losses of types: what rounding a linear to nearest would cost, from a finished Fisher pass.

The rise of the cross-entropy by a small error E of a linear's weights is, to second order,

    1 / (2 N) * sum over tokens t of sum over outputs k of g_tk^2 (E x_t)_k^2    ~    s / (2 N) * tr(E H E^T)

with N the tokens of the pass, s its Fisher scalar (sum over tokens of the mean over outputs of g^2), and H the second
moments of the linear's inputs; here |E x|^2 is averaged over some tokens, which is tr(E H E^T) with their H. It is the
mean KL divergence in nats per token as long as errors of different linears do not meet. Rows are a sample, and so are
the experts that a caller asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.arch.base import DenseBlock, ExpertBlock, LinearPart, ModelArch, Sublayer
from quantkit.arch.ops import linear
from quantkit.calibrate.hidden_states import MemoryRows, RowStore
from quantkit.calibrate.stream import forward_layer, route_all, row_batches
from quantkit.calibrate.weight_cache import WeightCache
from quantkit.documents.sensitivity import SensitivityDocument
from quantkit.formats.model_source import ModelSource
from quantkit.plan.allocation.felt import felt
from quantkit.plan.machine import Machine
from quantkit.quantizers import Rtn
from quantkit.quantizers.rtn import floored
from quantkit.schemes import ChosenScheme
from quantkit.sensitivity.layer_files import INPUT
from quantkit.sensitivity.open import Sensitivity
from quantkit.sensitivity.weights import original_weights

TOKENS = 8192
"""Tokens that a layer's linears read here."""
ROWS = 64
"""Rows of a linear that are rounded."""
MOST_TOKENS = 2048
"""Of one linear."""

Schemes = Mapping[str, Mapping[str, ChosenScheme]]
"""Linear, or part of one -> label -> scheme."""
Found = dict[str, dict[str, float]]
"""Linear, or part of one -> label -> predicted loss in nats per token."""
_RTN = Rtn.model_validate({})


Asked = Mapping[str, Sequence[tuple[str, LinearPart | None]]]
"""Linear -> what is wanted of it: itself (None), its parts."""


def measure_losses(
    found: Sensitivity,
    source: ModelSource,
    machine: Machine,
    wanted: Schemes,
    keep: Callable[[SensitivityDocument], None],
    on_layer: Callable[[int, int], None],
) -> SensitivityDocument:
    """The document of a pass with the losses of ``wanted`` added to those that it has. Reads the layers that hold
    these linears once. ``keep``: is given the document after each layer; ``on_layer``: is told (layers done,
    layers)."""
    asked, document = _asked(wanted, found.arch), found.document
    layers = sorted({spec.layer for spec in found.arch.tensors() if spec.layer is not None and spec.name in asked})
    losses: Found = {name: dict(own) for name, own in (found.document.losses or {}).items()}
    room = machine.device_bytes // 20 if machine.device.type == "cuda" else machine.budget // 4
    weights = original_weights(source, machine.device, document.job, room)
    scalars = felt(found.arch.tensors(), document.linears)
    on_layer(0, len(layers))
    for done, layer in enumerate(layers):
        for name, own in _Layer(found, machine, weights, wanted, asked, scalars, layer).losses().items():
            losses.setdefault(name, {}).update(own)
        weights.forget()
        ordered = {name: dict(sorted(own.items())) for name, own in sorted(losses.items())}
        document = document.model_copy(update={"losses": ordered})
        keep(document)
        on_layer(done + 1, len(layers))
    return document


def _asked(wanted: Schemes, arch: ModelArch) -> Asked:
    parts = arch.parts()
    asked: dict[str, list[tuple[str, LinearPart | None]]] = {}
    for name in wanted:
        part = parts.get(name)
        asked.setdefault(name if part is None else part.whole, []).append((name, part))
    return asked


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer."""

    found: Sensitivity
    machine: Machine
    weights: WeightCache
    wanted: Schemes
    asked: Asked
    scalars: Mapping[str, float]
    layer: int

    def losses(self) -> Found:
        """Of what is wanted of it."""
        losses: Found = {}
        x = self._sampled_rows()
        sublayers = self.found.arch.sublayers(self.layer)
        for number, sublayer in enumerate(sublayers):
            for name, inputs in self._inputs(sublayer, x):
                losses.update(self._of_linear(name, inputs))
            if number + 1 < len(sublayers):
                forward_layer((sublayer,), self.weights, x, self._new(x), self.machine.device)
        return losses

    def _sampled_rows(self) -> RowStore:
        """The residual stream before the layer, of some of the pass's rows, evenly spread."""
        job = self.found.document.job
        count = min(job.rows, max(1, TOKENS // job.length))
        rows = [place * job.rows // count for place in range(count)]
        return self.found.read(self.layer, INPUT, lambda: MemoryRows(count, job.length, job.hidden), rows)

    def _new(self, x: RowStore) -> RowStore:
        return MemoryRows(x.n_rows, x.length, x.width)

    def _inputs(self, sublayer: Sublayer, x: RowStore) -> Iterator[tuple[str, Tensor]]:
        """(linear, its inputs (n, in)) of whole linears of which something is wanted."""
        for block in sublayer:
            if isinstance(block, DenseBlock):
                yield from self._dense(block, x)
            if isinstance(block, ExpertBlock):
                yield from self._experts(block, x)

    def _dense(self, block: DenseBlock, x: RowStore) -> Iterator[tuple[str, Tensor]]:
        for stage in block.stages:
            parts = [
                stage.inputs(self.weights, x.read(start, stop).to(self.machine.device))
                for start, stop in row_batches(x, self.machine.device)
            ]
            for place, group in enumerate(stage.groups):
                for name in group.linears:
                    if name in self.asked:
                        yield name, torch.cat([part[place] for part in parts])

    def _experts(self, block: ExpertBlock, x: RowStore) -> Iterator[tuple[str, Tensor]]:
        h = self._new(x)
        tokens, _ = route_all(block, self.weights, x, h, self.machine.device)
        for expert in range(block.n_experts):
            gate, up, down = block.gates[expert], block.ups[expert], block.downs[expert]
            if not {gate, up, down} & self.asked.keys():
                continue
            own = h.gather(_tokens_for(tokens.of_expert(expert)[0], h)).to(self.machine.device)
            yield gate, own
            yield up, own
            yield down, block.activate(linear(own, self.weights(gate)), linear(own, self.weights(up)))

    def _of_linear(self, name: str, inputs: Tensor) -> Found:
        """Losses of a linear and of its parts."""
        scale = self.scalars.get(name, 0.0) / (2 * self.found.document.job.tokens)
        step = max(1, len(inputs) // MOST_TOKENS)
        x = inputs[::step].float()
        losses: Found = {}
        for asked, part in self.asked.get(name, ()):
            weight, schemes = self.weights(name), self.wanted[asked]
            errors = _errors(weight, x, schemes) if part is None else _part_errors(weight, x, part, schemes)
            losses[asked] = {label: scale * error for label, error in errors.items()}
        return losses


def _tokens_for(own: Tensor, h: RowStore) -> Tensor:
    """Numbers of the tokens whose inputs stand for an expert's: ``own`` (n,), and where none of this sample reached it
    those of all experts."""
    if len(own):
        return own[:MOST_TOKENS]
    n_tokens = h.n_rows * h.length
    return torch.arange(0, n_tokens, -(-n_tokens // MOST_TOKENS))


def _errors(weight: Tensor, x: Tensor, schemes: Mapping[str, ChosenScheme]) -> dict[str, float]:
    """tr(E H E^T) of some rows, as if of all. weight (out, in), x (n, in) float32."""
    count = min(ROWS, len(weight))
    rows = weight[torch.arange(count, device=weight.device) * len(weight) // count].float().unsqueeze(0)
    importance = floored(x.square().mean(0, keepdim=True))
    found: dict[str, float] = {}
    for label, scheme in schemes.items():
        error = _RTN.quantize(rows, scheme, importance).decode()[0] - rows[0]
        found[label] = float((x @ error.T).square().sum()) / len(x) * len(weight) / count
    return found


def _part_errors(weight: Tensor, x: Tensor, part: LinearPart, schemes: Mapping[str, ChosenScheme]) -> dict[str, float]:
    """tr(E H E^T) of a part of a linear, all its rows; H as the whole linear reads it. A part that is stored turned
    has inputs of its own: its scales are searched without importance."""
    whole = weight.float()
    own = part.take(whole)
    turned = own.shape[-1] != whole.shape[1]
    importance = None if turned else floored(x.square().mean(0, keepdim=True)).expand(len(own), -1)
    found: dict[str, float] = {}
    for label, scheme in schemes.items():
        error = torch.zeros_like(whole)
        part.put(error, _RTN.quantize(own.contiguous(), scheme, importance).decode() - own)
        found[label] = float((x @ error.T).square().sum()) / len(x)
    return found
