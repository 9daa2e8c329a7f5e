"""Experts are scored before some are pruned: the calibration text goes through the original model once (REAP, arXiv
2510.13999, equation 9).

An expert's score is the mean, over the tokens that the router sends it, of gate weight times the L2 norm of its output.
An interrupted pass goes on at the last layer whose hidden states were saved, and finds the same scores.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quantkit.arch.base import ExpertBlock, ModelArch
from quantkit.calibrate.chunk_sizes import own_rows
from quantkit.calibrate.dataset import TokenRows
from quantkit.calibrate.stream import MtpEntrance, forward_layer
from quantkit.convert.events import ExpertsScored, OnEvent, StageStarted
from quantkit.convert.hidden import StreamFiles, Streams
from quantkit.documents.pruning import ExpertScore, Scores, ScoringProgress
from quantkit.documents.read import document_bytes, parsed_document
from quantkit.errors import CalibrationError
from quantkit.evaluate.compare import Model
from quantkit.evaluate.open import names_by_layer
from quantkit.evaluate.validation import model_of
from quantkit.formats.model_source import ModelSource
from quantkit.formats.preallocated import disk_errors, write_durably
from quantkit.plan.machine import Machine, Stores
from quantkit.plan.schedule import SCORING


@dataclass(slots=True)
class ExpertSums:
    """Sums over the tokens of each expert of a layer."""

    values: dict[int, float] = field(default_factory=dict[int, float])
    counts: dict[int, int] = field(default_factory=dict[int, int])

    def add(self, expert: int, outputs: Tensor, shares: Tensor) -> None:
        """Outputs (tokens, hidden) of an expert, and the gate weights (tokens,) that they are multiplied with."""
        norms = outputs.float().norm(dim=-1).double()
        value = float((norms * shares.to(norms.device).double()).sum())
        self.values[expert] = self.values.get(expert, 0.0) + value
        self.counts[expert] = self.counts.get(expert, 0) + len(outputs)

    def scores(self, n_experts: int) -> tuple[ExpertScore, ...]:
        """Of all experts; 0 for one without tokens."""
        counts = (self.counts.get(expert, 0) for expert in range(n_experts))
        return tuple(ExpertScore(self.values[e] / n if n else 0.0, n) for e, n in enumerate(counts))


@dataclass(frozen=True, slots=True)
class Scoring:
    """A scoring pass over the whole model ``arch``. ``file``: where progress is kept; ``scratch``: a folder for hidden
    states, removed at the end; ``cache``: bytes for weights that each batch of rows asks for."""

    arch: ModelArch
    source: ModelSource
    rows: TokenRows
    machine: Machine
    stores: Stores
    cache: int
    file: Path
    scratch: Path
    on_event: OnEvent

    def run(self, layers: Collection[int]) -> Scores:
        """Scores of the experts of ``layers``. Raises `CalibrationError` for outputs that are not finite, and a
        `QuantkitError` for what a file can cause."""
        progress = self._progress()
        if not progress.complete:
            progress = self._passed(progress, layers)
            write_durably(self.file, progress.model_dump_json().encode())
        shutil.rmtree(self.scratch, ignore_errors=True)
        return {layer: progress.scores[layer] for layer in sorted(layers)}

    def _progress(self) -> ScoringProgress:
        if not self.file.exists():
            return ScoringProgress()
        return parsed_document(self.file, document_bytes(self.file), ScoringProgress)

    def _passed(self, progress: ScoringProgress, layers: Collection[int]) -> ScoringProgress:
        with disk_errors(self.scratch):
            self.scratch.mkdir(exist_ok=True)
        files = StreamFiles(self.scratch, self.stores, own_rows(len(self.rows.tokens)), two=False)
        model = model_of(self.arch, self.source, self.machine.device, self.cache)
        streams = files.open(self.rows, self.arch, self.source, after=progress.after)
        scores, names = dict(progress.scores), names_by_layer(self.arch)
        first = 0 if progress.after is None else progress.after + 1
        passed = max(layers, default=-1) + 1
        self.on_event(ExpertsScored(0, passed))
        for layer in range(first, passed):
            self.source.prefetch(names.get(layer + 1, []))
            if layer >= self.arch.n_layers:
                streams = self._enter_mtp(layer, streams, files, model)
            self.on_event(StageStarted(SCORING, layer))
            scores |= self._layer(layer, streams, model)
            if layer < self.arch.n_layers - 1 and files.due():
                files.save(streams, layer)
                write_durably(self.file, ScoringProgress(after=layer, scores=scores).model_dump_json().encode())
                files.forget_before(layer)
            self.on_event(ExpertsScored(layer + 1, passed))
        streams.close()
        return ScoringProgress(complete=True, scores=scores)

    def _layer(self, layer: int, streams: Streams, model: Model) -> Scores:
        sublayers, sums = self.arch.sublayers(layer), ExpertSums()
        scratch = streams.new_rows(self.arch.hidden_size)
        forward_layer(sublayers, model.weights, streams.x, scratch, self.machine.device, sums.add)
        scratch.close()
        model.forget()
        blocks = [block for sublayer in sublayers for block in sublayer if isinstance(block, ExpertBlock)]
        if not blocks:
            return {}
        (block,) = blocks
        found = sums.scores(block.n_experts)
        for expert, (score, _) in enumerate(found):
            if not math.isfinite(score):
                raise CalibrationError(
                    f"{block.downs[expert]}: outputs of its expert are not finite, so it has no score.",
                    hint="Weights of its layer or of an earlier one are damaged, or overflow: `quantkit verify`.",
                )
        return {layer: found}

    def _enter_mtp(self, layer: int, streams: Streams, files: StreamFiles, model: Model) -> Streams:
        source, device = self.source, self.machine.device
        embed = self.arch.mtp_layers()[layer].embed
        tokens = torch.from_numpy(self.rows.tokens).long()[:, layer - self.arch.n_layers + 1 :]
        entrance = MtpEntrance.of(
            self.arch, layer, model.weights, lambda ids: source.read_rows(embed, ids.tolist()).float()
        )
        entered = files.shortened(streams, lambda old, new: entrance.enter(old, tokens, new, device))
        model.forget()
        return entered
