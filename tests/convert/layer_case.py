"""A layer with its inputs, quantised with a note of what each method was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.calibrate.hidden_states import FileRows, MemoryRows, RowStore
from quantkit.calibrate.inputs import InputStats
from quantkit.convert import dense as dense_module
from quantkit.convert import experts as experts_module
from quantkit.convert import outputs as outputs_module
from quantkit.convert.hidden import Streams
from quantkit.convert.layer import quantize_layer
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.outputs import Importance, Linears, OutputChoice, Quantised
from quantkit.convert.weights import LayerWeights
from quantkit.documents.journal import ExpertRecord
from quantkit.quantizers import Gptq
from quantkit.schemes import IntScheme, QuantizedTensor
from quantkit.tensors import TensorInfo
from tests.convert.jobs import (
    small_config,
)
from tests.oracles.layer import Result, Settings, expected_statistics
from tests.tiny_models import random_weights

CPU = torch.device("cpu")


ROWS, LENGTH = 6, 16


SCHEME = IntScheme(bits=4, group_size=64)


GPTQ = Gptq(grid=8, polish=1)


MIN_TOKENS = 40


class Memory:
    """A source and a sink of tensors in memory."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.written: dict[str, QuantizedTensor] = {}
        self.expected: list[str] = []
        self.was_read: list[str] = []

    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(name, tuple(w.shape), "F32") for name, w in self.weights.items()}

    def read(self, name: str) -> Tensor:
        self.was_read.append(name)
        return self.weights[name]

    def expect(self, names: Sequence[str]) -> None:
        self.expected.extend(names)

    def write(self, tensor: QuantizedTensor) -> None:
        assert tensor.name not in self.written, "written twice"
        self.written[tensor.name] = tensor


@dataclass
class Case:
    """A layer, its inputs, and what quantising it gave."""

    layer: int = 1
    outputs: tuple[dict[str, Any], ...] = ({"*": (SCHEME, GPTQ)},)
    carries_quantised: bool = True
    two_streams: bool = True
    unloved: tuple[int, ...] = ()
    experts_at_once: int = 3
    in_files: Path | None = None
    importance: tuple[str, ...] = ()
    min_tokens: int = MIN_TOKENS
    config: dict[str, Any] = field(default_factory=small_config)

    def __post_init__(self) -> None:
        self.arch = arch_of(self.config)
        self.weights = random_weights(self.config, dtype=torch.float32)
        for expert in self.unloved:
            self.weights[f"model.layers.{self.layer}.mlp.gate.e_score_correction_bias"][expert] = -10
        random = torch.Generator().manual_seed(5)
        self.x = torch.randn(ROWS, LENGTH, self.arch.hidden_size, generator=random)
        noise = 0.1 * torch.randn(self.x.shape, generator=random)
        self.original = self.x + noise if self.two_streams else None
        self.sublayers = self.arch.sublayers(self.layer)
        self.given: dict[str, InputStats] = {}
        self.order: list[str] = []
        self.importances: dict[str, Importance] = {}
        self.begun: list[tuple[str, int]] = []
        self.experts: dict[str, tuple[ExpertRecord, ...]] = {}

    @property
    def linears(self) -> list[str]:
        """Every linear of the layer in the order of the data."""
        names = [name for sublayer in self.sublayers for block in sublayer for name in block.linears]
        return [name for name in names if name not in self.arch.parts()]

    def job(self) -> LayerJob:
        self.sinks = tuple(Memory(self.weights) for _ in self.outputs)
        outputs = tuple(
            OutputChoice(_methods(patterns, self.linears), frozenset(self.importance)) for patterns in self.outputs
        )
        self.streams = Streams(
            self.store(self.x),
            None if self.original is None else self.store(self.original),
            lambda width: self.store(torch.zeros(ROWS, LENGTH, width)),
        )
        weights = LayerWeights(
            self.sinks[0],
            {},
            carries_quantised=self.carries_quantised,
            cache_bytes=300_000,
            device=CPU,
            narrow=torch.float32,
        )
        self.counter = 0
        return LayerJob(
            outputs=outputs,
            weights=weights,
            streams=self.streams,
            experts_at_once=self.experts_at_once,
            min_expert_tokens=self.min_tokens,
        )

    def begin(self, block: str, total: int) -> None:
        self.begun.append((block, total))

    def write(self, made: Quantised) -> None:
        for tensor in made.batch.tensors(made.names, made.n_tokens):
            self.sinks[made.output].write(tensor)
            self.order.append(f"{made.output} {tensor.name}")

    def write_importance(self, importance: Importance) -> None:
        assert importance.name not in self.importances, "written twice"
        self.importances[importance.name] = importance

    def store(self, rows: Tensor) -> RowStore:
        made: RowStore = MemoryRows(*rows.shape)
        if self.in_files is not None:
            self.counter = getattr(self, "counter", 0) + 1
            made = FileRows(self.in_files / f"{len(list(self.in_files.iterdir()))}-{self.counter}", *rows.shape)
        made.write(0, rows)
        return made

    def quantised(self, monkeypatch: pytest.MonkeyPatch) -> LayerJob:
        """Run the layer, noting the statistics that each linear's method is given."""
        job = self.job()
        with monkeypatch.context() as patch:
            for module in (dense_module, experts_module):
                patch.setattr(module, "quantize_linears", noting(self.given, self.weights))
            self.experts = quantize_layer(job, self.sublayers, self).experts
        return job

    def carried(self, name: str) -> Tensor:
        """The weight that the calibrated stream must have computed with."""
        written = self.sinks[0].written.get(name)
        return self.weights[name] if written is None or not self.carries_quantised else written.decode()

    def expected(self) -> Result:
        method = next((m for _, m in self.outputs[0].values() if isinstance(m, Gptq)), GPTQ)
        settings = Settings(self.weights.__getitem__, self.carried, self.min_tokens, method.shrink, method.down_shrink)
        return expected_statistics(self.sublayers, settings, self.x, self.original)


def noting(given: dict[str, InputStats], weights: Mapping[str, Tensor]) -> Callable[..., Any]:
    """`quantize_linears`, which notes in ``given`` the statistics that each linear's method is given."""
    real = outputs_module.quantize_linears

    def note(outputs: Any, group: tuple[Linears, ...], stats: InputStats, *shrink: Any) -> Any:
        assert stats is not None
        raw = stats
        for linears in group:
            method = next((o.methods[linears.names[0]][1] for o in outputs if linears.names[0] in o.methods), None)
            stats = replace(raw, hessian=raw.hessian.clone(), cross=None if raw.cross is None else raw.cross.clone())
            if shrink and method is not None:
                stats = shrink[0](stats, method)
            for i, name in enumerate(linears.names):
                assert torch.equal(linears.weight[i], weights[name])
                cross = None if stats.cross is None else stats.cross[i : i + 1].clone()
                given[name] = InputStats(stats.hessian[i : i + 1].clone(), cross, stats.n_tokens[i : i + 1])
        return real(outputs, group, raw, *shrink)

    return note


def assert_given(given: Mapping[str, InputStats], expected: Result, tolerance: float = 1e-5) -> None:
    """The statistics are those of the plain loop."""
    for name, found in given.items():
        wanted = expected.stats[name]
        assert found.n_tokens == (wanted.n_tokens,), name
        _assert_near(found.hessian[0], wanted.hessian, name, tolerance)
        assert (found.cross is None) == (wanted.cross is None), name
        if found.cross is not None and wanted.cross is not None:
            _assert_near(found.cross[0], wanted.cross, f"cross of {name}", tolerance)


def _assert_near(found: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    distance = float((found.double() - expected).norm() / expected.norm().clamp_min(1e-12))
    assert distance < tolerance, f"{what}: {distance:.1e}"


def _methods(patterns: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: chosen for part, chosen in patterns.items() for name in names if part == "*" or part in name}
