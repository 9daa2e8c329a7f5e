"""Takes what a layer's linears become to the files of the outputs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from quantkit.convert.conversion import Conversion
from quantkit.convert.events import StageStarted, TensorDone
from quantkit.convert.outputs import Importance, Quantised
from quantkit.schemes import QuantError, QuantizedTensor
from quantkit.tensors import Role


class LayerWriter:
    """The `LayerSink` of one layer: writes at once, or on the thread that works beside a GPU.

    ``tensors``: output, name and error of each that is written, complete once the deliveries are drained.
    """

    def __init__(self, conversion: Conversion, layer: int) -> None:
        self.tensors: list[tuple[int, str, QuantError]] = []
        self._conversion = conversion
        self._layer = layer

    def begin(self, block: str, total: int) -> None:
        """See `LayerSink.begin`."""
        self._conversion.on_event(StageStarted(block, self._layer, total))

    def write(self, made: Quantised) -> None:
        """See `LayerSink.write`."""
        deliveries = self._conversion.deliveries
        if deliveries is None:
            self._write(made)
        else:
            deliveries.submit(partial(self._write, made))

    def write_importance(self, importance: Importance) -> None:
        """See `LayerSink.write_importance`."""
        sink = self._conversion.sinks[importance.output]
        sink.write_importance(importance.name, importance.importance, importance.n_tokens)

    def _write(self, made: Quantised) -> None:
        conversion = self._conversion
        for tensor in made.batch.tensors(made.names, made.n_tokens):
            conversion.sinks[made.output].write(tensor)
            self.tensors.append((made.output, tensor.name, _reported(conversion, made.output, tensor)))
            if made.output == 0:
                nbytes = conversion.plan.decision(tensor.name).source_nbytes
                conversion.on_event(TensorDone(tensor.name, tensor.error.relative_loss, nbytes))


def _reported(conversion: Conversion, output: int, tensor: QuantizedTensor) -> QuantError:
    """The error of a linear, which also says if an imatrix file was to weigh it, but does not know it."""
    mtp = conversion.plan.outputs[output].decisions[tensor.name].spec.role is Role.MTP
    if conversion.importance is None or mtp or not conversion.importance.lacks(tensor.name):
        return tensor.error
    return replace(tensor.error, fallback="not in the imatrix: all inputs count alike")
