"""Sums of g g^T by blocks, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from quantkit.arch import arch_of
from quantkit.sensitivity.moments import OutputMoments, fisher, head_blocks
from tests.tiny_models import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("blocks", [1, 2, 6])
def test_diagonal_blocks_of_the_whole(blocks: int) -> None:
    g = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    moments = OutputMoments(12, blocks, device=CPU)
    moments.add(g[:20])
    moments.add(g[20:20])
    moments.add(g[20:].double())
    whole, size = g.T @ g, 12 // blocks
    expected = torch.stack([whole[i : i + size, i : i + size] for i in range(0, 12, size)])
    assert moments.n_tokens == 50
    assert (moments.sums - expected).abs().max() <= 1e-4
    assert float(fisher(g)) == pytest.approx(float(whole.trace()) / 12, rel=1e-5)


@pytest.mark.parametrize("blocks", [0, -1, 5])
def test_rows_that_cannot_be_cut(blocks: int) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        OutputMoments(12, blocks, device=CPU)


def test_linears_by_heads() -> None:
    found = head_blocks(arch_of(tiny_config()))
    assert {name.split(".")[-2] for name in found} == {"q_b_proj", "kv_b_proj"}
    assert set(found.values()) == {4}
    assert "model.layers.0.self_attn.q_proj.weight" in head_blocks(arch_of(tiny_config(q_lora_rank=None)))
