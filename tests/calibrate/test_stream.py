"""One stream through a model: equal to the plain forward pass, whatever the batches and the kind of store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.arch import arch_of
from quantkit.calibrate import stream
from quantkit.calibrate.hidden_states import FileRows, MemoryRows
from quantkit.calibrate.stream import ExpertTokens, embed, forward_layer, row_batches
from tests.oracles import forward
from tests.tiny_models import random_weights, tiny_config

N_ROWS, LENGTH = 5, 12


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 24, 2048])
@pytest.mark.parametrize("shared", [1, 2])
def test_a_stream_is_the_plain_forward_pass(
    in_file: bool, batch_tokens: int, shared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(stream, "EXPERT_CHUNK", max(3, batch_tokens // 4))
    config = tiny_config(n_shared_experts=shared)
    arch, weights = arch_of(config), random_weights(config, dtype=torch.float32)
    tokens = torch.randint(0, 256, (N_ROWS, LENGTH), generator=torch.Generator().manual_seed(1))

    def store(name: str) -> MemoryRows | FileRows:
        size = (N_ROWS, LENGTH, arch.hidden_size)
        return FileRows(tmp_path / name, *size) if in_file else MemoryRows(*size)

    x, scratch = store("x"), store("scratch")
    embed(lambda ids: weights[arch.embed][ids], tokens, x)
    expected = weights[arch.embed][tokens]
    assert torch.equal(x.read(0, N_ROWS), expected)
    for layer in range(arch.n_layers):
        routings = forward_layer(arch.sublayers(layer), weights.__getitem__, x, scratch, torch.device("cpu"))
        assert [r.shape for r in routings] == ([(N_ROWS * LENGTH, 3)] if layer else [])
        expected = forward.forward_layer(arch.sublayers(layer), weights.__getitem__, expected)
        torch.testing.assert_close(x.read(0, N_ROWS), expected, rtol=1e-4, atol=1e-4)


def test_row_batches_cover_all_rows_and_take_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryRows(7, 10, 1)
    for limit, sizes in ((1, [1] * 7), (29, [2, 2, 2, 1]), (1000, [7])):
        monkeypatch.setattr(stream, "BATCH_TOKENS", limit)
        spans = list(row_batches(store))
        assert [stop - start for start, stop in spans] == sizes
        assert [start for start, _ in spans[1:]] == [stop for _, stop in spans[:-1]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_expert_tokens_are_every_choice_once_in_rising_order(data: st.DataObject) -> None:
    n_experts = data.draw(st.integers(2, 6))
    top_k = data.draw(st.integers(1, n_experts))
    experts = st.permutations(range(n_experts)).map(lambda order: order[:top_k])
    chosen = data.draw(st.lists(experts, min_size=1, max_size=8))
    weights = torch.rand(len(chosen), top_k)
    tokens = ExpertTokens.of(torch.tensor(chosen), weights, n_experts)
    for expert in range(n_experts):
        expected = [(t, float(weights[t, c.index(expert)])) for t, c in enumerate(chosen) if expert in c]
        token, weight = tokens.of_expert(expert)
        assert list(zip(token.tolist(), weight.tolist(), strict=True)) == expected
        assert tokens.count(expert) == len(expected)
