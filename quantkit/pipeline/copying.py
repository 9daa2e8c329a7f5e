"""Tensors that are kept pass from the source to the sinks in pieces, so that a vocabulary matrix never is in memory as
a whole."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.formats.compressed_tensors import CompressedTensorsSink
from quantkit.formats.fp8_source import Fp8Source
from quantkit.pipeline.events import CopyDone, OnEvent
from quantkit.pipeline.memory import KEPT_CHUNK_BYTES
from quantkit.pipeline.plan import Action, Plan
from quantkit.schemes import Float8Scheme, QuantError, QuantizedTensor


def copy_kept(
    source: Fp8Source, plan: Plan, sinks: Sequence[CompressedTensorsSink], layer: int | None, on_event: OnEvent
) -> None:
    """Copy the kept tensors of one layer (None: those outside the layers) to every output that keeps them."""
    tensors = nbytes = 0
    for output, sink in zip(plan.outputs, sinks, strict=True):
        for name, decision in output.decisions.items():
            if decision.spec.layer != layer or decision.action is not Action.KEEP:
                continue
            if isinstance(decision.scheme, Float8Scheme):
                codes, scale = source.read_float8(name)
                stored = {"codes": codes, "scale": scale}
                sink.write(QuantizedTensor(name, decision.scheme, stored, QuantError(0.0)))
            else:
                _copy_rows(source, sink, name)
            tensors += 1
            nbytes += source.infos()[name].nbytes
    on_event(CopyDone(tensors, nbytes))


def _copy_rows(source: Fp8Source, sink: CompressedTensorsSink, name: str) -> None:
    row = 0
    for chunk in source.chunks(name, KEPT_CHUNK_BYTES):
        sink.write_kept(name, row, chunk)
        row += len(chunk) if chunk.ndim else 1
