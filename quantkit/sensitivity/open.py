"""The folder of a finished Fisher pass, for later conversions of the same checkpoint: scalars by name, and the
gradients of the outputs of any sublayer's linears by a backward of that sublayer alone.

    found = open_sensitivity(folder, source, arch)
    with found.sublayer(layer, number, weights, new_rows, device) as sublayer:
        for name, g in sublayer.dense(block): ...           # (n, out), batch of rows by batch of rows
        experts = sublayer.experts(block)
        for name, g in experts.named(expert): ...           # gate, up and down, chunk by chunk
        experts.close()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantkit.arch.base import DenseBlock, ExpertBlock, ModelArch
from quantkit.calibrate.hidden_states import RowStore
from quantkit.documents.sensitivity import LinearFisher, SensitivityDocument, read_sensitivity
from quantkit.formats.model_source import ModelSource
from quantkit.plan.same_model import check_model
from quantkit.sensitivity.backward import LayerPass, NewRows
from quantkit.sensitivity.layer_files import INPUT, check_file, file_name, fill, gradient_name
from quantkit.sensitivity.output_gradients import ExpertGradients, Named, dense_gradients

if TYPE_CHECKING:
    from quantkit.arch.base import Weights

NewStore = Callable[[int, int, int], RowStore]
"""(rows, tokens of each, width) -> a float32 store, such as `quantkit.plan.machine.Stores.new`."""


@dataclass(frozen=True, slots=True)
class SublayerGradients:
    """One sublayer as the pass left it. ``x``: its input, ``gradient``: of the loss at its output. Use it in ``with``,
    which frees both."""

    layer_pass: LayerPass
    x: RowStore
    gradient: RowStore

    def dense(self, block: DenseBlock) -> Iterator[Named]:
        """(linear, gradients of its output (n, out)): each linear once for each batch of rows."""
        return dense_gradients(block, self.layer_pass.weights, self.x, self.gradient, self.layer_pass.device)

    def experts(self, block: ExpertBlock) -> ExpertGradients:
        """The routed experts, to be taken one by one and closed. Routes all tokens, by the original weights."""
        own = self.layer_pass
        return ExpertGradients.of(block, own.weights, self.x, self.gradient, own.new_rows, own.device)

    def __enter__(self) -> SublayerGradients:
        return self

    def __exit__(self, *exception: object) -> None:
        self.x.close()
        self.gradient.close()


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """A finished pass. ``places``: by layer, where the tensors of its file begin."""

    folder: Path
    document: SensitivityDocument
    arch: ModelArch
    places: tuple[dict[str, int], ...]

    def fisher(self, name: str) -> LinearFisher | None:
        """Tokens and Fisher scalar of a linear; None for one that the loss does not depend on smoothly, or that lies
        outside the decoder layers."""
        return self.document.linears.get(name)

    def sublayer(
        self, layer: int, number: int, weights: Weights, new_store: NewStore, device: torch.device
    ) -> SublayerGradients:
        """Sublayer ``number`` of a decoder layer. ``weights``: of the original model, by official name.

        Its input is computed again by the sublayers before it. Raises `SourceError` for a file that was truncated.
        """
        job = self.document.job

        def new_rows() -> RowStore:
            return new_store(job.rows, job.length, job.hidden)

        own = LayerPass(weights, new_rows, device)
        x = self.read(layer, INPUT, new_rows)
        own.forward(self.arch.sublayers(layer)[:number], x)
        return SublayerGradients(own, x, self.read(layer, gradient_name(number), new_rows))

    def gradient_after(self, layer: int, new_store: NewStore) -> RowStore:
        """The gradient of the loss at a layer's output, for `output_metric`."""
        job = self.document.job
        name = gradient_name(job.sublayers[layer] - 1)
        return self.read(layer, name, lambda: new_store(job.rows, job.length, job.hidden))

    def read(self, layer: int, name: str, new_rows: NewRows, rows: Sequence[int] | None = None) -> RowStore:
        """A tensor of a layer's file, or some ``rows`` of it, in a new store."""
        store = new_rows()
        fill(self.folder / file_name(layer), self.places[layer][name], self.document.job, store, rows)
        return store


def open_sensitivity(folder: Path, source: ModelSource, arch: ModelArch) -> Sensitivity:
    """The pass in ``folder``, which must be of this checkpoint. Reads the document, and headers of the layers' files.

    Raises `OutputError` or `SourceError` in one line: no finished pass, another checkpoint's, damaged or truncated
    files.
    """
    document = read_sensitivity(folder)
    check_model(folder, document, source.fingerprint(), arch)
    places = tuple(check_file(folder, document.job, layer) for layer in range(arch.n_layers))
    return Sensitivity(folder, document, arch, places)
