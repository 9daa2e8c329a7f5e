"""One calibrated layer against a slow float64 loop: what the methods are given, and where the hidden states go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.arch.base import ExpertBlock
from quantkit.calibrate import stream
from quantkit.convert import experts as experts_module
from quantkit.convert import layer as layer_module
from quantkit.convert.experts import ExpertsResult, ExpertsTask
from quantkit.convert.layer import quantize_layer, quantize_without_inputs
from quantkit.quantizers import Gptq, Rtn
from quantkit.schemes import IntScheme
from tests.convert.jobs import (
    small_config,
)
from tests.convert.layer_case import GPTQ, LENGTH, ROWS, SCHEME, Case, assert_given
from tests.oracles import forward


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches of rows, several chunks of an expert's tokens."""
    monkeypatch.setattr(stream, "BATCH_TOKENS", 2 * LENGTH)
    for module in (stream, experts_module):
        if hasattr(module, "EXPERT_CHUNK"):
            monkeypatch.setattr(module, "EXPERT_CHUNK", 7)


def assert_statistics(case: Case) -> None:
    assert set(case.given) == {name for name in case.linears if any(name in sink.written for sink in case.sinks)}
    assert_given(case.given, case.expected())


def assert_streams(case: Case) -> None:
    """Both streams are where the plain forward pass with their weights leads."""
    ends = [(case.streams.x, case.x, case.carried)]
    if case.original is not None:
        assert case.streams.original is not None
        ends.append((case.streams.original, case.original, case.weights.__getitem__))
    for store, before, weights in ends:
        wanted = forward.forward_layer(case.sublayers, weights, before)
        torch.testing.assert_close(store.read(0, ROWS), wanted, rtol=1e-4, atol=1e-4)


CASES = {
    "moe layer": Case(),
    "dense layer": Case(layer=0),
    "mtp layer's decoder": Case(layer=2),
    "experts one at a time": Case(experts_at_once=1),
    "one stream": Case(two_streams=False),
    "originals carry": Case(two_streams=False, carries_quantised=False),
    "originals carry, dense": Case(layer=0, two_streams=False, carries_quantised=False),
    "unloved experts": Case(unloved=(0, 3)),
    "unloved experts that borrow nothing": Case(unloved=(0, 3), min_tokens=0),
    "only experts": Case(outputs=({".experts.": (SCHEME, GPTQ)},)),
    "only down": Case(outputs=({"down_proj": (SCHEME, GPTQ)},)),
    "only gate and up": Case(outputs=({"gate_proj": (SCHEME, GPTQ), "up_proj": (SCHEME, GPTQ)},)),
    "only attention": Case(outputs=({"self_attn": (SCHEME, GPTQ)},)),
    "other shrinkage": Case(outputs=({"*": (SCHEME, Gptq(grid=4, shrink=0.5, down_shrink=0, polish=0))},)),
    "no q_lora, two shared experts": Case(config=small_config(q_lora_rank=None, n_shared_experts=2)),
    "experts that all tokens choose": Case(
        config=small_config(n_routed_experts=2, num_experts_per_tok=2, n_group=1, topk_group=1)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_methods_are_given_what_the_plain_loop_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES[name])
    case.quantised(monkeypatch)
    assert_statistics(case)
    assert_streams(case)
    expected = case.expected().tokens
    for block, counts in case.experts.items():
        assert [(c.n_tokens, c.borrowed) for c in counts] == [(len(own), len(lent)) for own, lent in expected[block]]
    if case.unloved:
        (counts,) = case.experts.values()
        assert [counts[expert].n_tokens for expert in case.unloved] == [0] * len(case.unloved)
        assert [counts[expert].borrowed for expert in case.unloved] == [case.min_tokens] * len(case.unloved)


@pytest.mark.parametrize("kept", [0, 0.05])
def test_hidden_units_that_are_not_kept_are_computed_again(kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, scarce = replace(CASES["moe layer"]), replace(CASES["moe layer"])
    whole.quantised(monkeypatch)
    found: list[bool] = []
    real = layer_module.quantize_experts

    def noting(task: ExpertsTask) -> ExpertsResult:
        result = real(task)
        found.extend(part is None for parts in result.calibrated.hidden for part in parts)
        return result

    monkeypatch.setattr(experts_module, "KEPT_HIDDEN", kept)
    monkeypatch.setattr(layer_module, "quantize_experts", noting)
    scarce.quantised(monkeypatch)
    assert any(found)
    assert all(found) == (kept == 0)
    for store, expected in zip(scarce.streams.stores(), whole.streams.stores(), strict=True):
        assert torch.equal(store.read(0, ROWS), expected.read(0, ROWS))


@pytest.mark.parametrize("shrink", [0.0, 3.0])
def test_an_expert_that_nobody_chose_is_never_quantised_silently(
    shrink: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What knows no inputs is rounded to nearest and says so; gate and up know the layer's, if they may."""
    method = Gptq(grid=4, shrink=shrink)
    case = Case(unloved=(0,), min_tokens=0, outputs=({"*": (SCHEME, method)},))
    case.quantised(monkeypatch)
    for part in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.experts.0.{part}_proj.weight"
        tensor, weight = case.sinks[0].written[name], case.weights[name]
        assert tensor.error.n_tokens == 0
        assert ("no calibration tokens" in tensor.error.fallback) == (part == "down" or shrink == 0)
        assert float((tensor.decode() - weight).norm() / weight.norm()) < 0.25


def test_gate_weights_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES["moe layer"])
    case.quantised(monkeypatch)
    (counts,) = case.experts.values()
    # Two experts a token, weights normalised to a sum of one and then scaled.
    assert sum(c.n_tokens for c in counts) == 2 * ROWS * LENGTH
    scale = case.config["routed_scaling_factor"]
    assert sum(c.gate_weight for c in counts) == pytest.approx(scale * ROWS * LENGTH, rel=1e-5)


def test_a_second_output_changes_nothing_about_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets the layer's statistics; the first one's weights carry the stream."""
    other = IntScheme(bits=3, group_size=None, symmetric=False)
    unshrunk = GPTQ.model_copy(update={"shrink": 0.0, "down_shrink": 0.0})
    case = Case(outputs=({"*": (SCHEME, GPTQ)}, {"_proj": (other, unshrunk), ".experts.1.": (SCHEME, Rtn(grid=4))}))
    alone = Case()
    alone.quantised(monkeypatch)
    case.quantised(monkeypatch)
    assert_statistics(case)
    assert_streams(case)
    assert set(case.sinks[0].written) == set(case.sinks[1].written) == set(case.linears)
    for name, tensor in alone.sinks[0].written.items():
        assert torch.equal(tensor.stored["codes"], case.sinks[0].written[name].stored["codes"]), name
        assert torch.equal(tensor.stored["scale"], case.sinks[0].written[name].stored["scale"]), name
    assert case.sinks[1].written["model.layers.1.mlp.experts.1.up_proj.weight"].scheme == SCHEME
    assert case.sinks[1].written["model.layers.1.mlp.experts.2.up_proj.weight"].scheme == other


def test_an_output_that_keeps_everything_leaves_the_stream_on_the_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(outputs=({}, {"*": (SCHEME, GPTQ)}))
    case.quantised(monkeypatch)
    assert not case.sinks[0].written
    assert_statistics(case)
    assert_streams(case)


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_the_batch_of_experts_changes_codes_at_ties_only(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = Case(experts_at_once=1), Case(experts_at_once=at_once)
    for case in (one, many):
        case.quantised(monkeypatch)
    differing = total = 0
    for name, tensor in one.sinks[0].written.items():
        other = many.sinks[0].written[name]
        differing += int((tensor.stored["codes"] != other.stored["codes"]).sum())
        total += tensor.stored["codes"].numel()
        assert other.error.relative_loss == pytest.approx(tensor.error.relative_loss, rel=0.02)
    assert differing <= (0 if at_once == 1 else total * 0.002)


def test_stores_in_files_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, files = Case(), Case(in_files=tmp_path)
    for case in (memory, files):
        case.quantised(monkeypatch)
    for name, tensor in memory.sinks[0].written.items():
        assert torch.equal(tensor.stored["codes"], files.sinks[0].written[name].stored["codes"]), name
        assert torch.equal(tensor.stored["scale"], files.sinks[0].written[name].stored["scale"]), name
    assert files.streams.original is not None
    assert memory.streams.original is not None
    assert torch.equal(memory.streams.x.read(0, ROWS), files.streams.x.read(0, ROWS))
    assert torch.equal(memory.streams.original.read(0, ROWS), files.streams.original.read(0, ROWS))
    assert not list(tmp_path.iterdir()), "stores have no names: a kill leaves nothing"
    files.streams.close()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_without_inputs_every_linear_is_rounded_by_itself(layer: int) -> None:
    method = Rtn(grid=8)
    case = Case(layer=layer, outputs=({"*": (SCHEME, method)}, {"down_proj": (SCHEME, method)}))
    blocks = tuple(block for sublayer in case.sublayers for block in sublayer)
    quantize_without_inputs(replace(case.job(), streams=None), blocks, case, None)
    assert set(case.sinks[0].written) == set(case.linears)
    assert set(case.sinks[1].written) == {name for name in case.linears if "down_proj" in name}
    for name, tensor in case.sinks[0].written.items():
        expected = method.quantize(case.weights[name][None], SCHEME, None).tensors((name,), (0,))[0]
        assert torch.equal(tensor.stored["codes"], expected.stored["codes"]), name
        assert torch.equal(tensor.stored["scale"], expected.stored["scale"]), name
        assert tensor.error.n_tokens == 0


def test_without_inputs_only_what_some_output_quantises_is_read() -> None:
    case = Case(outputs=({"up_proj": (SCHEME, Rtn(grid=4))}, {".experts.2.down": (SCHEME, Rtn(grid=4))}))
    blocks = tuple(block for sublayer in case.sublayers for block in sublayer)
    quantize_without_inputs(replace(case.job(), streams=None), blocks, case, None)
    read = case.sinks[0].was_read
    assert sorted(read) == sorted(name for sink in case.sinks for name in sink.written)
    assert case.sinks[0].expected == [name for name in read if ".experts." in name]


@pytest.mark.parametrize("name", ["moe layer", "experts one at a time", "only attention"])
def test_weights_of_experts_are_read_as_they_were_announced(name: str) -> None:
    case = replace(CASES[name])
    quantize_layer(case.job(), case.sublayers, case)
    assert case.sinks[0].expected == [name for name in case.sinks[0].was_read if ".experts." in name]


def test_every_block_is_announced_with_its_number_of_linears() -> None:
    case = Case()
    quantize_layer(case.job(), case.sublayers, case)
    experts = next(b for sublayer in case.sublayers for b in sublayer if isinstance(b, ExpertBlock))
    assert sum(total for _, total in case.begun) == len(case.linears) == len(case.order)
    assert case.begun[-1] == ("experts", 3 * experts.n_experts)
