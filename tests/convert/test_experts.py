"""The unit of work of an expert block is a pure function: who computes a batch, when and how often changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantkit.arch.base import ExpertBlock
from quantkit.calibrate.inputs import InputStats
from quantkit.convert.dense import GroupTask, quantize_group
from quantkit.convert.experts import ExpertsResult, ExpertsTask, quantize_experts
from quantkit.convert.layer import _apply_experts, _experts_task, expert_batches
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.outputs import Linears, OutputChoice, Quantised, quantize_linears
from quantkit.convert.routing import route
from quantkit.errors import CalibrationError
from quantkit.quantizers import Rtn
from quantkit.schemes import IntScheme
from tests.convert.layer_case import GPTQ, SCHEME, Case

pytestmark = pytest.mark.usefixtures("one_thread")

UP = "model.layers.1.mlp.experts.2.up_proj.weight"
WITH_IMPORTANCE = {"experts_at_once": 2, "importance": (UP,)}


def tasks_of(case: Case) -> tuple[LayerJob, list[ExpertsTask]]:
    """A task for each batch of experts."""
    job = case.job()
    (block,) = (b for sublayer in case.sublayers for b in sublayer if isinstance(b, ExpertBlock))
    routes = route(job, block)
    return job, [_experts_task(job, block, routes, experts) for experts in expert_batches(job, block)]


def everything_in(task: ExpertsTask) -> list[Tensor]:
    inputs = [task.calibrated, *([] if task.unquantised is None else [task.unquantised])]
    assert isinstance(task.pooled, InputStats)
    assert task.pooled.cross is not None
    return [
        *(one.weight for one in (task.gate, task.up, task.down)),
        *(one.rows.read(0, one.rows.n_rows) for one in inputs),
        *(part for one in inputs for tokens in one.tokens for part in (tokens.token, tokens.share)),
        task.pooled.hessian,
        task.pooled.cross,
    ]


def assert_same(found: ExpertsResult, expected: ExpertsResult) -> None:
    for one, other in zip(found.quantised, expected.quantised, strict=True):
        assert (one.output, one.names, one.n_tokens) == (other.output, other.names, other.n_tokens)
        assert one.batch.stored.keys() == other.batch.stored.keys()
        assert all(torch.equal(one.batch.stored[key], other.batch.stored[key]) for key in one.batch.stored)
    for one, other in zip(found.importance, expected.importance, strict=True):
        assert (one.name, one.n_tokens) == (other.name, other.n_tokens)
        assert torch.equal(one.importance, other.importance)
    assert found.unquantised is not None
    assert expected.unquantised is not None
    for outputs, others in ((found.calibrated, expected.calibrated), (found.unquantised, expected.unquantised)):
        pairs = list(zip(outputs.changes(), others.changes(), strict=True))
        assert pairs
        for one, other in pairs:
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.values, other.values)
            assert torch.equal(one.shares, other.shares)


def test_a_task_may_be_done_again_and_changes_nothing() -> None:
    case = Case(**WITH_IMPORTANCE)
    _, tasks = tasks_of(case)
    for task in tasks:
        before = [part.clone() for part in everything_in(task)]
        streams = [store.read(0, store.n_rows).clone() for store in case.streams.stores()]
        first = quantize_experts(task)
        assert_same(quantize_experts(task), first)
        assert all(map(torch.equal, everything_in(task), before))
        assert all(map(torch.equal, (s.read(0, s.n_rows) for s in case.streams.stores()), streams))
    assert not case.order
    assert not case.importances


def test_batches_computed_in_any_order_and_applied_in_theirs_give_the_same() -> None:
    ordered, shuffled = (Case(**WITH_IMPORTANCE) for _ in range(2))
    for case in (ordered, shuffled):
        job, tasks = tasks_of(case)
        if case is shuffled:
            results = [quantize_experts(task) for task in reversed(tasks)]
            for result in reversed(results):
                _apply_experts(job, result, case)
        else:
            for task in tasks:
                _apply_experts(job, quantize_experts(task), case)
    assert ordered.order == shuffled.order
    assert len(ordered.order) == 12
    for name, tensor in ordered.sinks[0].written.items():
        assert all(map(torch.equal, tensor.stored.values(), shuffled.sinks[0].written[name].stored.values())), name
    for one, other in zip(ordered.streams.stores(), shuffled.streams.stores(), strict=True):
        assert torch.equal(one.read(0, one.n_rows), other.read(0, other.n_rows))
    assert torch.equal(ordered.importances[UP].importance, shuffled.importances[UP].importance)


def test_importance_is_that_of_the_expert_before_shrinkage() -> None:
    case = Case(**WITH_IMPORTANCE)
    (importance,) = (one for task in tasks_of(case)[1] for one in quantize_experts(task).importance)
    unshrunk = replace(
        case,
        outputs=(
            {
                "*": (SCHEME, GPTQ.model_copy(update={"shrink": 0.0})),
            },
        ),
    )
    (plain,) = (one for task in tasks_of(unshrunk)[1] for one in quantize_experts(task).importance)
    assert importance.name == UP
    assert importance.importance.shape == (1, case.arch.hidden_size)
    assert torch.equal(importance.importance, plain.importance)


def test_a_group_gives_importance_of_what_every_output_keeps() -> None:
    scheme, method = IntScheme(bits=4, group_size=64), Rtn(grid=4)
    weight = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(64)[None] * torch.arange(64)
    outputs = (OutputChoice({"a": (scheme, method)}, frozenset({"kept"})), OutputChoice({}, frozenset({"a"})))
    stats = InputStats(hessian, None, (3,))
    result = quantize_group(GroupTask((Linears(("a",), weight),), ("kept", "dropped"), stats, outputs))
    assert [(one.output, one.name) for one in result.importance] == [(0, "kept"), (1, "a")]
    assert all(torch.equal(one.importance[0], torch.arange(64.0)) for one in result.importance)
    (made,) = result.quantised
    assert isinstance(made, Quantised)
    assert (made.output, made.names, made.n_tokens) == (0, ("a",), (3,))
    assert torch.equal(made.batch.decode(), method.quantizer(stats)(weight, scheme).decode())


def test_inputs_that_overflow_are_told_with_their_expert() -> None:
    """One expert's hidden units overflow when squared: the error names that expert, not the first of the batch."""
    names = ("a.0.down", "a.1.down", "a.2.down")
    hessian = torch.eye(64).repeat(3, 1, 1)
    hessian[1, 5, 5] = torch.inf
    outputs = (OutputChoice(dict.fromkeys(names, (SCHEME, GPTQ))),)
    with pytest.raises(CalibrationError, match=r"^a\.1\.down: the inputs of these linears overflow"):
        quantize_linears(outputs, (Linears(names, torch.ones(3, 8, 64)),), InputStats(hessian, None, (4, 4, 4)))
