"""What `evaluate` computes: models through the layers side by side, in the memory that the budget leaves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.arch.base import ModelArch
from quantkit.calibrate.hidden_states import RowStore
from quantkit.errors import PlanError
from quantkit.evaluate.compare import Comparison, Model, NewRows, Recorder, compare_all
from quantkit.evaluate.open import Evaluated, names_by_layer
from quantkit.evaluate.reference_file import ReferenceStatistics
from quantkit.evaluate.reference_scores import compare_recorded
from quantkit.evaluate.validation import rounded_to_bf16, scored_model
from quantkit.plan.machine import Machine, Stores
from quantkit.plan.memory import evaluation_needs, total
from quantkit.plan.shapes import ModelSizes


@dataclass(frozen=True, slots=True)
class EvaluationRun:
    """``top``: most likely tokens of each position that are read or written, 0 for neither. ``on_layer``: the number of
    the layer (from 1) that all models have passed."""

    machine: Machine
    arch: ModelArch
    on_layer: Callable[[int], None]
    top: int = 0

    def compare(
        self,
        original: Evaluated,
        others: Sequence[Evaluated],
        tokens: Tensor,
        first_scored: int,
        *,
        noise_floor: bool,
        recorder: Recorder | None,
    ) -> list[Comparison]:
        """The noise floor first, if it is wanted, then the candidates."""
        opened = (original, *others)
        with self._started(opened, 1 + noise_floor + len(others), tokens) as (models, new_rows, on_layer):
            reference, *rest = models
            compared = [rounded_to_bf16(self.arch, reference), *rest] if noise_floor else rest
            return compare_all(
                self.arch,
                reference,
                compared,
                tokens,
                new_rows,
                first_scored=first_scored,
                on_layer=on_layer,
                recorder=recorder,
            )

    def compare_recorded(self, reference: ReferenceStatistics, others: Sequence[Evaluated]) -> list[Comparison]:
        """Against a reference that is not there."""
        with self._started(others, len(others), reference.tokens) as (models, new_rows, on_layer):
            return compare_recorded(self.arch, reference, models, new_rows, on_layer=on_layer)

    @contextmanager
    def _started(
        self, opened: Sequence[Evaluated], n_models: int, tokens: Tensor
    ) -> Generator[tuple[list[Model], NewRows, Callable[[int], None]]]:
        stores_bytes, cache_bytes = self._share(n_models, (tokens.shape[0], tokens.shape[1]))
        models = [
            scored_model(one.arch, one.source, self.machine.device, cache_bytes, name=one.facts.path) for one in opened
        ]
        names_of = [names_by_layer(one.arch) for one in opened]

        def read_ahead(layer: int) -> None:
            for one, names in zip(opened, names_of, strict=True):
                one.source.prefetch(names.get(layer, []))

        def on_layer(layer: int) -> None:
            read_ahead(layer + 2)
            self.on_layer(layer + 1)

        with tempfile.TemporaryDirectory(prefix="quantkit-") as folder:
            stores = Stores(Path(folder), stores_bytes)

            def new_rows(n_rows: int, length: int, width: int) -> RowStore:
                return stores.new(n_rows, length, width)

            read_ahead(0)
            read_ahead(1)
            yield models, new_rows, on_layer

    def _share(self, n_models: int, shape: tuple[int, int]) -> tuple[int, int]:
        """Bytes for hidden states in memory and for weights kept between batches, of what the budget leaves."""
        working = total(evaluation_needs(ModelSizes.of(self.arch), n_models, shape, self.top))
        spare = self.machine.budget - working
        if spare < 0:
            budget, least = (f"{nbytes / 2**30:.2f} GiB" for nbytes in (self.machine.budget, working))
            raise PlanError(
                f"memory budget {budget}: this evaluation needs at least {least}.",
                hint="Raise --memory-budget, or evaluate fewer candidates or windows at a time.",
            )
        return spare // 2, spare // 3


def device_name(device: torch.device) -> str:
    """cpu, or the GPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
