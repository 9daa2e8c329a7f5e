"""Tensors that no calibration reaches pass from the source to the sinks in pieces, so that a vocabulary matrix never is
in memory as a whole: kept ones, and matrices that a format stores in blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.convert.conversion import Conversion
from quantkit.convert.events import CopyDone
from quantkit.convert.repack import taken_over
from quantkit.errors import SchemeError
from quantkit.formats.model_source import ModelSource
from quantkit.plan.decide import Action, Decision
from quantkit.plan.phases import KEPT_CHUNK_BYTES
from quantkit.plan.targets import Sink
from quantkit.quantizers.rescaling import NO_FOLDING, Folding
from quantkit.ranks.shares import shared_out
from quantkit.schemes import QuantError


def copy_kept(
    conversion: Conversion,
    layer: int | None,
    foldings: Sequence[Folding] = (),
    changed: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Copy the kept tensors of one layer (None: those outside the layers) to every output that keeps them.
    ``foldings``: by output, what its methods did to input channels; tensors that absorb it are written changed.
    ``changed``: what stands for tensors of the source in every output."""
    source, parts = conversion.source, conversion.arch.parts()
    tensors = nbytes = 0
    for number, sink in enumerate(conversion.sinks):
        folding = foldings[number] if foldings else NO_FOLDING
        for name, decision in _own(conversion, number, layer, Action.KEEP):
            if decision.scheme is not None:
                sink.write(taken_over(source, decision))
            elif decision.spec.part_of is not None:
                whole = decision.spec.part_of
                sink.write_kept(name, 0, parts[name].take(folding.folded(whole, source.read(whole))))
            elif name in changed or folding.changes(name):
                weight = changed[name].cpu() if name in changed else source.read(name)
                sink.write_kept(name, 0, folding.folded(name, weight))
            else:
                _copy_rows(source, sink, name)
            tensors += 1
            nbytes += decision.source_nbytes
    conversion.on_event(CopyDone(tensors, nbytes))


def quantize_tables(conversion: Conversion, layer: int | None) -> list[tuple[int, str, QuantError]]:
    """Quantise the matrices of one layer (None: the vocabulary's) whose inputs are not calibrated, rows at a time ->
    output, name and error of each."""
    records: list[tuple[int, str, QuantError]] = []
    for number, sink in enumerate(conversion.sinks):
        for name, decision in _own(conversion, number, layer, Action.QUANTIZE):
            error = _quantize_rows(conversion.source, sink, name, decision, conversion.machine.device)
            records.append((number, name, error))
    return records


def _own(conversion: Conversion, output: int, layer: int | None, action: Action) -> list[tuple[str, Decision]]:
    """This rank's share of what an output keeps of a layer, or of the tables that it quantises; by bytes."""
    decisions = conversion.plan.outputs[output].decisions.items()
    found = [(name, one) for name, one in decisions if one.spec.layer == layer and one.action is action]
    found = [(name, one) for name, one in found if action is Action.KEEP or one.spec.table]
    owners = shared_out([one.source_nbytes for _, one in found], conversion.ranks.count)
    return [pair for pair, owner in zip(found, owners, strict=True) if owner == conversion.ranks.number]


def _quantize_rows(source: ModelSource, sink: Sink, name: str, decision: Decision, device: torch.device) -> QuantError:
    assert decision.quantising is not None, f"{name}: its decision has no method"
    scheme, method = decision.quantising
    quantize = method.quantizer(None)
    row, lost, total = 0, 0.0, 0.0
    for chunk in source.chunks(name, KEPT_CHUNK_BYTES // 2):  # a BF16 chunk is twice as large in float32
        weight = chunk.to(device).float().unsqueeze(0)
        try:
            batch = quantize(weight, scheme)
        except SchemeError as error:
            raise SchemeError(f"{name}: {error.message}", hint=error.hint) from error
        (tensor,) = batch.tensors((name,), (0,))
        sink.write(tensor, row)
        row += len(chunk)
        norm = float(weight.square().sum(dtype=torch.float64))
        lost, total = lost + tensor.error.relative_loss * norm, total + norm
    return QuantError(lost / max(total, 1e-30))


def _copy_rows(source: ModelSource, sink: Sink, name: str) -> None:
    row = 0
    for chunk in source.chunks(name, KEPT_CHUNK_BYTES):
        sink.write_kept(name, row, chunk)
        row += len(chunk) if chunk.ndim else 1
