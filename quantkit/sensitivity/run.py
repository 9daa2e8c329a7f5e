"""The Fisher pass: the original model over some text, layer by layer, then the gradient of a sampled loss back through
it, each layer recomputed.

Every step reads what it needs from the layers' files and writes what the next one needs, so a killed pass goes on at
the last border, and its files are the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.stream import embed
from quantkit.calibrate.weight_cache import WeightCache
from quantkit.documents.conversion import CalibrationFile
from quantkit.documents.sensitivity import FisherJob, FisherProgress, LinearFisher, SensitivityDocument
from quantkit.errors import CalibrationError
from quantkit.evaluate.open import names_by_layer
from quantkit.formats.source import checkpoint_name
from quantkit.plan.benchmark import product_rate
from quantkit.plan.machine import Machine, Stores
from quantkit.plan.memory import LEAST_CACHE, total
from quantkit.sensitivity.backward import FisherSums, LayerPass
from quantkit.sensitivity.events import FisherLayer, FisherStarted, OnFisher
from quantkit.sensitivity.folder import PassFolder
from quantkit.sensitivity.head import SampledHead
from quantkit.sensitivity.layer_files import INPUT, LayerFiles, gradient_name
from quantkit.sensitivity.needs import check_memory, needs_of, schedule_of
from quantkit.sensitivity.prepare import FisherRequest
from quantkit.sensitivity.weights import original_weights
from quantkit.version import __version__

DEVICE_STORES_SHARE = 0.4
"""Hidden states take at most this share of a GPU's memory; weights and autograd's graph have the rest."""


def run(request: FisherRequest, machine: Machine, on_event: OnFisher) -> SensitivityDocument:
    """Do a pass, or go on with one that was killed. Raises a `QuantkitError` with one line for whatever a file or the
    machine can cause."""
    job = job_of(request, machine)
    needs = needs_of(request.arch, job)
    check_memory(needs, machine)
    with PassFolder(request.folder, job, restart=request.restart) as folder:
        files = LayerFiles(folder.path, job, begun=folder.progress.forward > 0)
        spare = max(0, machine.budget - total(needs.working)) if machine.device.type == "cpu" else machine.budget
        work = _Pass(request, machine, job, folder, files, on_event, spare)
        on_event(
            FisherStarted(
                layers=request.arch.n_layers,
                rows=job.rows,
                tokens=job.tokens,
                disk=needs.disk,
                memory=needs.memory,
                forward=folder.progress.forward,
                backward=folder.progress.backward,
                warnings=request.rows.warnings,
                schedule=schedule_of(request.arch, job, product_rate(machine.device)),
            )
        )
        work.forward()
        work.backward()
        document = SensitivityDocument(
            job=job,
            model=checkpoint_name(request.source.directory),
            text=_text(request),
            linears=_in_order(request, folder.progress),
        )
        folder.finish(document)
    return document


def job_of(request: FisherRequest, machine: Machine) -> FisherJob:
    """What the numbers follow from."""
    arch, tokens = request.arch, request.rows.tokens
    return FisherJob(
        quantkit=__version__,
        torch=torch.__version__,
        source=request.source.fingerprint(),
        tokenizer=request.tokenizer,
        tokens_sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
        rows=tokens.shape[0],
        length=tokens.shape[1],
        seed=request.seed,
        device=machine.device_name,
        threads=torch.get_num_threads(),
        dtype="BF16" if _narrow(request, machine) else "F32",
        hidden=arch.hidden_size,
        sublayers=tuple(len(arch.sublayers(layer)) for layer in range(arch.n_layers)),
    )


def _narrow(request: FisherRequest, machine: Machine) -> bool:
    """Whether the streams compute in bfloat16: on a GPU with kernels, from a source of BF16 or FP8."""
    infos = request.source.infos()
    stored = {infos[spec.name].dtype for spec in request.arch.tensors() if spec.linear and spec.name in infos}
    return machine.scratch_dtype == torch.bfloat16 and stored == {"BF16"}


def _text(request: FisherRequest) -> tuple[CalibrationFile, ...]:
    return tuple(
        CalibrationFile(file=p.file, sha256=p.sha256, documents=p.documents, tokens=p.tokens, rows=p.rows)
        for p in request.rows.provenance
    )


def _in_order(request: FisherRequest, progress: FisherProgress) -> dict[str, LinearFisher]:
    """The linears in the order of the model."""
    found = progress.linears
    return {spec.name: found[spec.name] for spec in request.arch.tensors() if spec.name in found}


def _checked(sums: Mapping[str, tuple[int, float]]) -> dict[str, LinearFisher]:
    """Raises `CalibrationError` for a sum that is not finite."""
    for name, (_, value) in sums.items():
        if not math.isfinite(value):
            raise CalibrationError(
                f"{name}: gradients of its output are not finite.",
                hint="Weights of its layer or of a later one are damaged, or overflow: `quantkit verify` says more.",
            )
    return {name: LinearFisher(tokens=count, fisher=value) for name, (count, value) in sums.items()}


@dataclass(frozen=True, slots=True)
class _Pass:
    """Everything that the steps share. ``spare``: bytes of RAM beside what the work needs, for hidden states and
    weights that are kept."""

    request: FisherRequest
    machine: Machine
    job: FisherJob
    folder: PassFolder
    files: LayerFiles
    on_event: OnFisher
    spare: int

    def forward(self) -> None:
        """Up to the gradient at the last layer's output."""
        arch, last = self.request.arch, self.request.arch.n_layers - 1
        weights, new_rows = self._weights(), self._new_rows()
        layer_pass = LayerPass(weights, new_rows, self.machine.device)
        for layer in range(self.folder.progress.forward, arch.n_layers):
            self._read_ahead(layer + 1)
            with closing(new_rows()) as x:
                if layer == 0:
                    self._embed(x)
                    self.files.save(0, INPUT, x)
                self.files.load(layer, INPUT, x)
                layer_pass.forward(arch.sublayers(layer), x)
                if layer < last:
                    self.files.save(layer + 1, INPUT, x)
                else:
                    SampledHead(arch, weights, self._head_rows, self.machine.device).backward(x, self.job.seed)
                    self.files.save(layer, gradient_name(self.job.sublayers[layer] - 1), x)
            weights.forget()
            self.folder.save(self.folder.progress.model_copy(update={"forward": layer + 1}))
            self.on_event(FisherLayer("forward", layer + 1, arch.n_layers))

    def backward(self) -> None:
        """Down to the gradient at the first layer's first sublayer."""
        n_layers = self.request.arch.n_layers
        weights = self._weights()
        layer_pass = LayerPass(weights, self._new_rows(), self.machine.device)
        for done in range(self.folder.progress.backward, n_layers):
            layer = n_layers - 1 - done
            self._read_ahead(layer - 1)
            sums = FisherSums()
            self._back_through(layer, layer_pass, sums)
            weights.forget()
            found = _checked(sums.values())
            progress = self.folder.progress
            self.folder.save(
                progress.model_copy(update={"backward": done + 1, "linears": {**progress.linears, **found}})
            )
            self.on_event(FisherLayer("backward", done + 1, n_layers))

    def _back_through(self, layer: int, layer_pass: LayerPass, sums: FisherSums) -> None:
        sublayers = self.request.arch.sublayers(layer)
        with closing(layer_pass.new_rows()) as gradient:
            self.files.load(layer, gradient_name(len(sublayers) - 1), gradient)
            for number in reversed(range(len(sublayers))):
                with closing(layer_pass.new_rows()) as x:
                    self.files.load(layer, INPUT, x)
                    layer_pass.forward(sublayers[:number], x)
                    layer_pass.backward(sublayers[number], x, gradient, sums)
                if number:
                    self.files.save(layer, gradient_name(number - 1), gradient)
                elif layer:
                    self.files.save(layer - 1, gradient_name(self.job.sublayers[layer - 1] - 1), gradient)

    def _embed(self, x: RowStore) -> None:
        source, arch = self.request.source, self.request.arch
        tokens = torch.from_numpy(self.request.rows.tokens).long()
        embed(lambda ids: source.read_rows(arch.embed, ids.tolist()).float(), tokens, x)

    def _head_rows(self, start: int, stop: int) -> Tensor:
        return self.request.source.read(self.request.arch.lm_head, (start, stop)).to(self.machine.device).float()

    def _weights(self) -> WeightCache:
        on_gpu = self.machine.device.type == "cuda"
        room = self.machine.device_bytes // 20 if on_gpu else max(LEAST_CACHE, self.spare // 3)
        return original_weights(self.request.source, self.machine.device, self.job, room)

    def _new_rows(self) -> Callable[[], RowStore]:
        on_gpu = int(self.machine.device_bytes * DEVICE_STORES_SHARE)
        stores = Stores(self.folder.path, self.spare // 2, self.machine.device, on_gpu)
        return lambda: stores.new(self.job.rows, self.job.length, self.job.hidden)

    def _read_ahead(self, layer: int) -> None:
        self.request.source.prefetch(names_by_layer(self.request.arch).get(layer, []))
