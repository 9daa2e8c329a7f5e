"""A layer that is quantised and then tuned as a whole: results of the methods are held back until that is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantkit.arch.base import ExpertBlock, Sublayer
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.stream import forward_layer, row_batches
from quantkit.convert.conversion import Conversion
from quantkit.convert.events import LayerTuned, StageStarted, TuningStep
from quantkit.convert.layer import LayerResult, quantize_layer
from quantkit.convert.layer_job import LayerJob, LayerSink
from quantkit.convert.outputs import Importance, Quantised
from quantkit.convert.tuned_linears import TunedLinears, tuned_linears
from quantkit.documents.journal import TuningRecord
from quantkit.plan.decide import Action
from quantkit.plan.schedule import TUNING
from quantkit.plan.tune import Tune
from quantkit.plan.tuning_memory import DECODED_BYTES
from quantkit.sensitivity.moments import output_metric
from quantkit.tensors import DTYPES, Role
from quantkit.tuning.experts import TunedExperts, groups_of
from quantkit.tuning.layer import TunedLayer, TunedNorm
from quantkit.tuning.tune import TuneTask, metric_factor, seed_of, tune


@dataclass(frozen=True, slots=True)
class HeldResults:
    """A `LayerSink` that keeps what it is given, but for importance."""

    sink: LayerSink
    made: list[Quantised] = field(default_factory=list[Quantised])

    def begin(self, block: str, total: int) -> None:
        """See `LayerSink.begin`."""
        self.sink.begin(block, total)

    def write(self, made: Quantised) -> None:
        """See `LayerSink.write`."""
        self.made.append(made)

    def write_importance(self, importance: Importance) -> None:
        """See `LayerSink.write_importance`."""
        self.sink.write_importance(importance)


def quantize_and_tune(
    conversion: Conversion, layer: int, job: LayerJob, sublayers: tuple[Sublayer, ...], sink: LayerSink
) -> LayerResult:
    """As `quantize_layer`; what is handed to ``sink``, and what the calibrated stream goes on with, is tuned."""
    settings = conversion.plan.recipe.tune
    assert settings is not None, "the recipe does not ask for it"
    held = HeldResults(sink)
    x = job.hidden.x
    with closing(conversion.stores.new(x.n_rows, x.length, x.width)) as before:
        copy_rows(x, before, job.device)
        result = quantize_layer(job, sublayers, held)
        if held.made:
            conversion.on_event(StageStarted(TUNING, layer))
            work = _Work(conversion, layer, job, sublayers, settings, before)
            result = work.tuned(held, result)
    for made in held.made:
        sink.write(made)
    return result


def copy_rows(source: RowStore, target: RowStore, device: torch.device) -> None:
    """Make ``target`` equal ``source``."""
    for start, stop in row_batches(source, device):
        target.write(start, source.read(start, stop))


@dataclass(frozen=True, slots=True)
class _Work:
    """What tuning one layer needs. ``before``: what entered the layer."""

    conversion: Conversion
    layer: int
    job: LayerJob
    sublayers: tuple[Sublayer, ...]
    settings: Tune
    before: RowStore

    def tuned(self, held: HeldResults, result: LayerResult) -> LayerResult:
        """Tune; where that helped, replace what is held, and carry the calibrated stream through the tuned layer."""
        conversion, job = self.conversion, self.job
        linears = self._linears(held)
        tuned = self._layer(linears, result.changed)
        seed = seed_of(self.settings, self.layer)
        with closing(self._target()) as target:
            task = TuneTask(tuned, self.before, target, self._metric(), self.settings, seed, job.device)
            outcome = tune(task, lambda done, of: conversion.on_event(TuningStep(self.layer, done, of)))
        changed, norms = 0, dict[str, Tensor]()
        if outcome.epoch:
            held.made[:], changed = linears.replaced(held.made)
            norms = {name: norm.value().detach() for name, norm in tuned.norms.items() if bool(norm.change.any())}
            self._carry(tuned, linears)
        conversion.on_event(LayerTuned(self.layer, outcome.before, outcome.after, outcome.epoch))
        record = TuningRecord(
            loss_before=outcome.before,
            loss_after=outcome.after,
            epoch=outcome.epoch,
            codes=linears.codes,
            codes_changed=changed,
        )
        return replace(result, changed={**result.changed, **norms}, tuning=record)

    def _linears(self, held: HeldResults) -> TunedLinears:
        blocks = (block for sublayer in self.sublayers for block in sublayer if isinstance(block, ExpertBlock))
        experts = tuple(names for block in blocks for names in (block.gates, block.ups, block.downs))
        adam = self.settings.optimizer == "adam"
        return tuned_linears(held.made, self.job.weights, self.conversion.arch.parts(), experts, adam=adam)

    def _layer(self, linears: TunedLinears, changed: Mapping[str, Tensor]) -> TunedLayer:
        weights, arch = self.job.weights, self.conversion.arch
        experts = {
            block.name: self._experts(block, linears)
            for sublayer in self.sublayers
            for block in sublayer
            if isinstance(block, ExpertBlock)
        }
        return TunedLayer(
            sublayers=self.sublayers,
            dense=linears.dense,
            fixed=linears.fixed,
            parts=arch.parts(),
            norms=self._norms() if self.settings.scale_lr else {},
            experts=experts,
            moving=linears.moving,
            others=lambda name: changed[name] if name in changed else weights.original(name),
        )

    def _experts(self, block: ExpertBlock, linears: TunedLinears) -> TunedExperts:
        weights = self.job.weights
        dtype = weights.dtype(block.gates[0])
        names = (block.gates[0], block.ups[0], block.downs[0])
        nbytes = dtype.itemsize * sum(math.prod(weights.shape(name)) for name in names)
        at_once = max(1, DECODED_BYTES // nbytes)
        projections = (block.gates, block.ups, block.downs)
        placed = linears.experts
        groups = groups_of(lambda e: tuple(placed[names[e]] for names in projections), block.n_experts, at_once)
        return TunedExperts(block.activate, groups, dtype)

    def _norms(self) -> dict[str, TunedNorm]:
        """Norms of the layer that are kept as numbers of their own."""
        found: dict[str, TunedNorm] = {}
        for name, decision in self.conversion.plan.outputs[0].decisions.items():
            spec = decision.spec
            if (spec.layer, spec.base_role, decision.action) == (self.layer, Role.NORM, Action.KEEP):
                stored: torch.dtype = getattr(torch, DTYPES[decision.dtype][1])
                found[name] = TunedNorm(self.job.weights.original(name), stored)
        return found

    def _target(self) -> RowStore:
        """alpha times the original layer's output in the unquantised stream, and the rest of it in the quantised."""
        alpha, hidden, device = self.settings.alpha, self.job.hidden, self.job.device
        target = self.conversion.stores.new(self.before.n_rows, self.before.length, self.before.width)
        if alpha < 1:
            copy_rows(self.before, target, device)
            self._through(target, self.job.weights.original)
        if alpha > 0:
            assert hidden.original is not None, "the plan lets the unquantised stream go along"
            for start, stop in row_batches(target, device):
                own, far = (store.read(start, stop).to(device) for store in (target, hidden.original))
                target.write(start, far if alpha == 1 else own + alpha * (far - own))
        return target

    def _through(self, store: RowStore, weights: Callable[[str], Tensor]) -> None:
        scratch = self.job.hidden.new_rows(store.width)
        forward_layer(self.sublayers, weights, store, scratch, self.job.device)
        scratch.close()

    def _carry(self, tuned: TunedLayer, linears: TunedLinears) -> None:
        """The calibrated stream through the tuned layer."""
        copy_rows(self.before, self.job.hidden.x, self.job.device)
        with torch.no_grad():
            dense = tuned.step_weights()
            self._through(self.job.hidden.x, lambda name: linears.expert(name, dense))

    def _metric(self) -> Tensor | None:
        """The factor of the Fisher pass's moments at the layer's output; None without one."""
        sensitivity = self.conversion.sensitivity
        if sensitivity is None or self.layer >= self.conversion.arch.n_layers:
            return None
        gradient = sensitivity.gradient_after(self.layer, self.conversion.stores.new)
        moments = output_metric(gradient, self.job.device)
        gradient.close()
        return metric_factor(moments)
