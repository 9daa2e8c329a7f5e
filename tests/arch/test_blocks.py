"""What blocks promise to calibration: stages that need only earlier linears, exact chunks, routing as in the paper."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.arch import arch_of, mla
from quantkit.arch.base import Block, DenseBlock, ExpertBlock, Stage
from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.arch.moe import ScoredRouter
from quantkit.arch.ops import rms_norm
from tests.arch.test_deepseek_v3 import ROOT
from tests.oracles import forward
from tests.tiny_models import random_weights, tiny_config

Lookup = Callable[[str], torch.Tensor]


def tiny(**changes: Any) -> tuple[DeepseekV3, Lookup, torch.Tensor]:
    """A random model, its weights in float32 and a residual stream (3, 20, 128)."""
    config = tiny_config(**changes)
    weights = {name: tensor.float() for name, tensor in random_weights(config, seed=4).items()}
    x = torch.randn(3, 20, config["hidden_size"], generator=torch.Generator().manual_seed(6))
    return DeepseekV3(config), weights.__getitem__, x


def blocks_of(arch: DeepseekV3) -> list[Block]:
    layers = range(arch.n_layers + arch.n_mtp_layers)
    return [block for layer in layers for sublayer in arch.sublayers(layer) for block in sublayer]


@pytest.mark.parametrize("q_lora_rank", [128, None])
def test_stages_read_only_norms_and_earlier_linears(q_lora_rank: int | None) -> None:
    arch, weights, x = tiny(q_lora_rank=q_lora_rank)
    linears = {spec.name: spec for spec in arch.tensors() if spec.linear}
    for block in blocks_of(arch):
        final: set[str] = set()
        for stage in block.stages if isinstance(block, DenseBlock) else ():
            asked: list[str] = []

            def lookup(name: str, asked: list[str] = asked) -> torch.Tensor:
                asked.append(name)
                return weights(name)

            inputs = stage.inputs(lookup, x)
            assert {name for name in asked if name in linears} <= final
            check_widths(stage, inputs, {name: spec.shape[1:] for name, spec in linears.items()}, arch)
            final |= {name for group in stage.groups for name in group.linears}


def check_widths(
    stage: Stage, inputs: tuple[torch.Tensor, ...], in_features: dict[str, tuple[int, ...]], arch: DeepseekV3
) -> None:
    """(tokens, in), and (heads, tokens, in) where each head of a part reads something else."""
    parts = arch.parts()
    assert len(inputs) == len(stage.groups)
    for group, tokens in zip(stage.groups, inputs, strict=True):
        assert tokens.dtype is torch.float32
        for name in group.linears:
            if name in parts:
                heads, _, width = parts[name].shape
                assert tuple(tokens.shape) in {(60, width), (heads, 60, width)}
            else:
                assert tuple(tokens.shape) == (60, *in_features[name])


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"v_head_dim": 96}])
@pytest.mark.parametrize("chunk_elements", [1, 3000, 6000])
def test_chunks_of_rows_and_heads_change_nothing(
    changes: dict[str, Any], chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, weights, x = tiny(**changes)
    ((attention,),) = arch.sublayers(0)[:1]
    assert isinstance(attention, DenseBlock)
    (whole,) = attention.stages[-1].inputs(weights, x)
    monkeypatch.setattr(mla, "CHUNK_ELEMENTS", chunk_elements)
    (chunked,) = attention.stages[-1].inputs(weights, x)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_rows_are_independent_and_causal() -> None:
    arch, weights, x = tiny()
    whole = forward.forward_layer(arch.sublayers(1), weights, x)
    alone = forward.forward_layer(arch.sublayers(1), weights, x[1:2, :7])
    torch.testing.assert_close(whole[1:2, :7], alone, rtol=1e-5, atol=1e-5)


def test_inputs_are_left_as_they_were() -> None:
    arch, weights, x = tiny()
    before = x.clone()
    for block in blocks_of(arch):
        forward.block_output(block, weights, x)
    assert torch.equal(x, before)
    _, fresh, _ = tiny()
    assert all(torch.equal(weights(spec.name), fresh(spec.name)) for spec in arch.tensors())


class _Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_attention_of_true_size_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of 2048 tokens through DeepSeek V3's attention, on the meta device: nothing outgrows the context."""
    arch = arch_of(json.loads((ROOT / "examples" / "deepseek-v3-671b" / "config.json").read_text()))
    shapes = {spec.name: spec.shape for spec in arch.tensors() if spec.layer == 3}
    seen: list[torch.Size] = []

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
        # On the meta device torch would show its unfused form.
        assert q.shape == k.shape == v.shape
        seen.append(q.shape)
        return torch.empty_like(q)

    monkeypatch.setattr(mla, "scaled_dot_product_attention", fused)
    ((attention,),) = arch.sublayers(3)[:1]
    assert isinstance(attention, DenseBlock)
    with _Sizes() as sizes:
        attention.stages[-1].inputs(
            lambda name: torch.empty(shapes[name], device="meta"), torch.empty(1, 2048, 7168, device="meta")
        )
    weight = 24576 * 1536
    assert sizes.largest <= max(weight, 2048 * 128 * 128)
    assert sum(shape[1] for shape in seen) == 128
    assert max(shape.numel() for shape in seen) <= mla.CHUNK_ELEMENTS


def test_rms_norm_equals_its_formula() -> None:
    x, weight = torch.randn(2, 50, 384, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind()
    x[3] = 0
    x[4] *= 1e4
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight[0]
    torch.testing.assert_close(rms_norm(x.float(), weight[0].float(), 1e-6).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n_groups", "top_groups"), [(4, 2), (1, 1), (4, 4), (2, 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_router_equals_a_loop_over_tokens(n_groups: int, top_groups: int, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(9)
    weight, h = torch.randn(16, 32, generator=generator), torch.randn(50, 32, generator=generator)
    bias = 0.5 * torch.randn(16, generator=generator)
    router = ScoredRouter("weight", 4, "sigmoid", normalize, 2.5, "bias", n_groups, top_groups)
    routing = router.route({"weight": weight, "bias": bias}.__getitem__, h)
    for token in range(50):
        expected = textbook_route(torch.sigmoid(weight @ h[token]), bias, n_groups, top_groups, 4, normalize)
        found = dict(zip(routing.indices[token].tolist(), routing.weights[token].tolist(), strict=True))
        assert found == pytest.approx({expert: 2.5 * gain for expert, gain in expected.items()}, rel=1e-5)
    torch.testing.assert_close(routing.scores, torch.sigmoid(h @ weight.T) + bias)


def textbook_route(
    affinity: torch.Tensor, bias: torch.Tensor, n_groups: int, top_groups: int, top_k: int, normalize: bool
) -> dict[int, float]:
    """arXiv 2412.19437 section 2.1.2, one token: expert -> weight before scaling."""
    size = len(affinity) // n_groups
    biased = (affinity + bias).tolist()
    group_rank = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(n_groups)]
    kept = sorted(range(n_groups), key=lambda g: -group_rank[g])[:top_groups]
    allowed = [expert for g in kept for expert in range(g * size, (g + 1) * size)]
    chosen = sorted(allowed, key=lambda expert: -biased[expert])[:top_k]
    total = sum(affinity[expert].item() for expert in chosen) if normalize else 1.0
    return {expert: affinity[expert].item() / total for expert in chosen}


def test_expert_block_equals_a_loop_over_tokens() -> None:
    arch, weights, x = tiny()
    block = arch.sublayers(1)[1][1]
    assert isinstance(block, ExpertBlock)
    h = block.inputs(weights, x)
    routing = block.route(weights, h)
    expected = torch.zeros_like(h)
    for token in range(len(h)):
        for expert, gain in zip(routing.indices[token].tolist(), routing.weights[token], strict=True):
            hidden = torch.nn.functional.silu(weights(block.gates[expert]) @ h[token])
            hidden = hidden * (weights(block.ups[expert]) @ h[token])
            expected[token] += gain * (weights(block.downs[expert]) @ hidden)
    torch.testing.assert_close(forward.block_output(block, weights, x), expected, rtol=1e-4, atol=1e-5)


def test_activate_keeps_its_arguments() -> None:
    arch, _, _ = tiny()
    block = arch.sublayers(1)[1][1]
    assert isinstance(block, ExpertBlock)
    gate, up = torch.ones(2, 3), torch.ones(2, 3)
    block.activate(gate, up)
    assert torch.equal(gate, torch.ones(2, 3))
    assert torch.equal(up, torch.ones(2, 3))
