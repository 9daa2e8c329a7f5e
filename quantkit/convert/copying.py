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
    for number, (output, sink) in enumerate(zip(conversion.plan.outputs, conversion.sinks, strict=True)):
        folding = foldings[number] if foldings else NO_FOLDING
        for name, decision in output.decisions.items():
            if decision.spec.layer != layer or decision.action is not Action.KEEP:
                continue
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
    for number, (output, sink) in enumerate(zip(conversion.plan.outputs, conversion.sinks, strict=True)):
        for name, decision in output.decisions.items():
            if decision.spec.layer == layer and decision.action is Action.QUANTIZE and decision.spec.table:
                records.append(
                    (number, name, _quantize_rows(conversion.source, sink, name, decision, conversion.machine.device))
                )
    return records


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
