"""`compare` against transformers' full model in float32: losses, KL divergence, first choices, however cut up."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.arch.base import ExpertBlock
from quantkit.calibrate import stream
from quantkit.calibrate.hidden_states import FileRows, MemoryRows, RowStore
from quantkit.evaluate import token_scores as token_scores_module
from quantkit.evaluate.compare import Model, compare, compare_all
from quantkit.evaluate.token_scores import TokenScores
from quantkit.evaluate.validation import model_of, rounded_to_bf16, summarise
from quantkit.formats import open_source
from tests.oracles.forward import block_output
from tests.tiny_models import random_weights, tiny_config, write_checkpoint

CPU = torch.device("cpu")
CONFIG = tiny_config()
TINY = Path(os.environ.get("QUANTKIT_SHARED", Path(__file__).parents[3] / "shared")) / "models"


def in_memory(n_rows: int, length: int, width: int) -> RowStore:
    return MemoryRows(n_rows, length, width)


def model(weights: Mapping[str, Tensor]) -> Model:
    return Model(
        weights.__getitem__,
        lambda ids: weights["model.embed_tokens.weight"][ids],
        lambda start, stop: weights["lm_head.weight"][start:stop],
    )


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, CONFIG["vocab_size"], (5, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(CONFIG, dtype=torch.float32)


@pytest.fixture(scope="module")
def damaged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every linear with noise of a tenth of its size, norms and router untouched."""
    random = torch.Generator().manual_seed(7)
    return {
        name: w + 0.1 * w.std() * torch.randn(w.shape, generator=random) if "_proj" in name else w
        for name, w in weights.items()
    }


@pytest.fixture(scope="module")
def scores(weights: dict[str, Tensor], damaged: dict[str, Tensor], tokens: Tensor) -> TokenScores:
    return scored(weights, damaged, tokens)


def scored(
    reference: Mapping[str, Tensor],
    candidate: Mapping[str, Tensor],
    tokens: Tensor,
    new_rows: Callable[[int, int, int], RowStore] = in_memory,
) -> TokenScores:
    return compare(arch_of(CONFIG), model(reference), model(candidate), tokens, new_rows)


def transformers_logits(config: Mapping[str, Any], weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """(rows, tokens, vocab) float32. Expert weights are stacked as transformers 5 keeps them."""
    transformers = pytest.importorskip("transformers")
    fields = dict(config)
    theta, scaling = fields.pop("rope_theta"), fields.pop("rope_scaling", None) or {"type": "default"}
    fields.pop("quantization_config", None)
    rope = {("rope_type" if key == "type" else key): value for key, value in scaling.items()}
    state: dict[str, Tensor] = {}
    n_layers, n_experts = config["num_hidden_layers"], config["n_routed_experts"]
    for name, weight in weights.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        if layer < n_layers and ".mlp.experts." not in name:
            state[name] = weight.float()
    for layer in range(config["first_k_dense_replace"], n_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([weights[f"{prefix}{expert}.{part}_proj.weight"].float() for expert in range(n_experts)])
            for part in ("gate", "up", "down")
        )
        state[f"{prefix}gate_up_proj"], state[f"{prefix}down_proj"] = torch.cat((gate, up), dim=1), down
    built = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **fields, rope_parameters={**rope, "rope_theta": float(theta)}, attn_implementation="eager"
        )
    ).float()
    built.load_state_dict(state, strict=True)
    with torch.inference_mode():
        return built.eval()(tokens, use_cache=False).logits


def expected_scores(reference: Tensor, candidate: Tensor, tokens: Tensor) -> TokenScores:
    """From whole logits (rows, tokens, vocab), in float64."""
    p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (reference, candidate))
    targets = tokens[:, 1:, None]
    return TokenScores(
        -p.gather(-1, targets).squeeze(-1),
        -q.gather(-1, targets).squeeze(-1),
        (p.exp() * (p - q)).sum(-1),
        p.argmax(-1) == q.argmax(-1),
    )


def assert_same(found: TokenScores, expected: TokenScores, *, rtol: float, atol: float = 1e-6) -> None:
    for column in ("reference_nll", "candidate_nll", "kld"):
        ours, theirs = getattr(found, column).double(), getattr(expected, column).double()
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda m, c=column: f"{c}: {m}")
    assert torch.equal(found.same_top, expected.same_top)


def test_scores_equal_transformers(
    scores: TokenScores, weights: dict[str, Tensor], damaged: dict[str, Tensor], tokens: Tensor
) -> None:
    both = [transformers_logits(CONFIG, w, tokens) for w in (weights, damaged)]
    expected = expected_scores(*both, tokens)
    assert expected.kld.mean() > 0.01  # else the test would see nothing
    assert not expected.same_top.all()
    assert_same(scores, expected, rtol=1e-4, atol=2e-6)
    for column in ("reference_nll", "candidate_nll", "kld"):
        torch.testing.assert_close(getattr(scores, column).mean(), getattr(expected, column).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_checkpoint_on_disk_gives_the_scores_of_its_decoded_tensors(
    fp8: bool, tokens: Tensor, tmp_path: Path
) -> None:
    """Weights are read when asked for, with a cache of nothing, of one matrix, and of all."""
    decoded = {name: w.float() for name, w in write_checkpoint(tmp_path / "m", CONFIG, fp8=fp8).items()}
    other = {name: w.float() for name, w in write_checkpoint(tmp_path / "o", CONFIG, seed=1).items()}
    expected = scored(decoded, other, tokens)
    arch = arch_of(CONFIG)
    with open_source(tmp_path / "m") as reference, open_source(tmp_path / "o") as candidate:
        for cache in (0, 100_000, 2**30):
            found = compare(
                arch,
                model_of(arch, reference, CPU, cache),
                model_of(arch, candidate, CPU, cache),
                tokens,
                in_memory,
            )
            assert_same(found, expected, rtol=0, atol=0)


def test_weights_are_let_go_layer_by_layer(weights: dict[str, Tensor], tokens: Tensor) -> None:
    """However large the cache may be: memory must not grow with the number of layers."""
    held: set[str] = set()
    most: list[int] = [0]

    def read(name: str) -> Tensor:
        held.add(name)
        most[0] = max(most[0], len({key.split(".")[2] for key in held if key.startswith("model.layers.")}))
        return weights[name]

    watched = replace(model(weights), weights=read, forget=held.clear)
    compare(arch_of(CONFIG), watched, model(weights), tokens, in_memory)
    assert most == [1]


@pytest.mark.parametrize("block", [1, 7, 64, 255, 256, 1000])
def test_the_vocabulary_may_be_cut_anywhere(
    block: int,
    scores: TokenScores,
    weights: dict[str, Tensor],
    damaged: dict[str, Tensor],
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_scores_module, "VOCAB_BLOCK", block)
    assert_same(scored(weights, damaged, tokens), scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 32])
def test_rows_may_be_cut_anywhere(
    batch_tokens: int,
    scores: TokenScores,
    weights: dict[str, Tensor],
    damaged: dict[str, Tensor],
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "BATCH_TOKENS", batch_tokens)
    assert_same(scored(weights, damaged, tokens), scores, rtol=1e-4, atol=1e-5)


def test_hidden_states_in_files_give_the_same_numbers(
    scores: TokenScores, weights: dict[str, Tensor], damaged: dict[str, Tensor], tokens: Tensor, tmp_path: Path
) -> None:
    names = iter(("a", "b", "c"))

    def in_file(n_rows: int, length: int, width: int) -> RowStore:
        return FileRows(tmp_path / next(names), n_rows, length, width)

    assert_same(scored(weights, damaged, tokens, in_file), scores, rtol=0, atol=0)
    assert not list(tmp_path.iterdir())


def test_a_model_equals_itself(weights: dict[str, Tensor], tokens: Tensor) -> None:
    found = scored(weights, weights, tokens)
    assert found.same_top.all()
    assert float(found.kld.abs().max()) < 1e-6
    assert torch.equal(found.reference_nll, found.candidate_nll)
    assert summarise(found).perplexity_ratio.mean == 1


def test_logits_far_from_zero_overflow_nowhere(weights: dict[str, Tensor], tokens: Tensor) -> None:
    """Logits of +-1,000: exp of any of them is infinite or zero."""
    loud = {**weights, "lm_head.weight": weights["lm_head.weight"] * 300}
    arch = arch_of(CONFIG)
    found = compare(arch, model(loud), model(weights), tokens, in_memory)
    assert all(torch.isfinite(getattr(found, column)).all() for column in ("reference_nll", "candidate_nll", "kld"))
    assert float(found.reference_nll.max()) > 100


def test_progress_names_each_layer(weights: dict[str, Tensor], tokens: Tensor) -> None:
    layers: list[int] = []
    compare(arch_of(CONFIG), model(weights), model(weights), tokens, in_memory, layers.append)
    assert layers == [0, 1, 2]


@pytest.mark.skipif(not (TINY / "tiny-deepseek-v3").exists(), reason="the trained model is not here")
def test_trained_model_and_its_fp8_form_equal_transformers() -> None:
    with open_source(TINY / "tiny-deepseek-v3") as bf16, open_source(TINY / "tiny-deepseek-v3-fp8") as fp8:
        arch, config = arch_of(bf16.config), dict(bf16.config)
        tokens = torch.randint(3, arch.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
        both = [
            transformers_logits(config, {name: source.read(name) for name in source.infos()}, tokens)
            for source in (bf16, fp8)
        ]
        found = compare(arch, model_of(arch, bf16, CPU, 2**24), model_of(arch, fp8, CPU, 2**24), tokens, in_memory)
    expected = expected_scores(*both, tokens)
    for column in ("reference_nll", "candidate_nll", "kld"):
        torch.testing.assert_close(getattr(found, column).mean(), getattr(expected, column).mean(), rtol=1e-4, atol=0)
    assert float((found.same_top == expected.same_top).double().mean()) == 1


# ------------------------------------------------------------------------------------------- layers, several candidates


def plain_forward(weights: Mapping[str, Tensor], tokens: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Behind each layer: hidden states (rows, tokens, hidden), and the experts of every token, if there are any."""
    arch = arch_of(CONFIG)
    x = weights[arch.embed][tokens]
    states: list[Tensor] = []
    chosen: list[Tensor | None] = []
    for layer in range(arch.n_layers):
        experts = None
        for sublayer in arch.sublayers(layer):
            for block in sublayer:
                if isinstance(block, ExpertBlock):
                    experts = block.route(weights.__getitem__, block.inputs(weights.__getitem__, x)).indices
            x = x + sum(block_output(block, weights.__getitem__, x) for block in sublayer).view_as(x)
        states.append(x)
        chosen.append(experts)
    return states, chosen


def test_layers_equal_a_plain_forward_pass(
    weights: dict[str, Tensor], damaged: dict[str, Tensor], tokens: Tensor
) -> None:
    (states, chosen), (others, theirs) = (plain_forward(w, tokens) for w in (weights, damaged))
    (found,) = compare_all(arch_of(CONFIG), model(weights), [model(damaged)], tokens, in_memory)
    assert [score.layer for score in found.layers] == [0, 1, 2]
    for score, x, y, ours, other in zip(found.layers, states, others, chosen, theirs, strict=True):
        errors = ((y - x).norm(dim=-1) / x.norm(dim=-1)).square()
        assert score.hidden_error == pytest.approx(float(errors.mean().sqrt()), rel=1e-4)
        assert score.window_errors == pytest.approx(errors.mean(1).tolist(), rel=1e-3)
        if ours is None or other is None:
            assert (score.router_agreement, score.expert_tokens, score.expert_errors) == (None, None, None)
        else:
            same = [len(set(a) & set(b)) for a, b in zip(ours.tolist(), other.tolist(), strict=True)]
            assert score.router_agreement == pytest.approx(sum(same) / ours.numel(), abs=1e-9)
            assert 0.5 < score.router_agreement < 1
            sent = [(ours == expert).any(-1) for expert in range(CONFIG["n_routed_experts"])]
            assert score.expert_tokens == tuple(int(own.sum()) for own in sent)
            by_expert = [float(errors.flatten()[own].mean().sqrt()) for own in sent]
            assert score.expert_errors == pytest.approx(by_expert, rel=1e-3, nan_ok=True)


def test_candidates_do_not_mix(weights: dict[str, Tensor], damaged: dict[str, Tensor], tokens: Tensor) -> None:
    """Each as if it were alone; from a position on: a part of all."""
    arch = arch_of(CONFIG)
    found = compare_all(arch, model(weights), [model(damaged), model(weights)], tokens, in_memory, first_scored=9)
    assert_same(found[0].tokens, cut(scored(weights, damaged, tokens), 9), rtol=1e-4, atol=1e-5)
    assert_same(found[1].tokens, cut(scored(weights, weights, tokens), 9), rtol=1e-4, atol=1e-5)
    assert [(score.hidden_error, score.router_agreement) for score in found[1].layers] == [(0, None), (0, 1), (0, 1)]


def cut(scores: TokenScores, first: int) -> TokenScores:
    columns = (scores.reference_nll, scores.candidate_nll, scores.kld, scores.same_top)
    return TokenScores(*(column[:, first:] for column in columns))


def test_bf16_rounding_is_at_the_borders_and_nowhere_else(weights: dict[str, Tensor], tokens: Tensor) -> None:
    """Against the same rounding written out: hidden states of each border, embeddings first."""
    arch = arch_of(CONFIG)
    exact = {spec.name for spec in arch.tensors() if spec.float32}
    rounded = {name: w if name in exact else w.bfloat16().float() for name, w in weights.items()}
    x = rounded[arch.embed][tokens]
    expected: list[float] = []
    for layer in range(arch.n_layers):
        for sublayer in arch.sublayers(layer):
            x = x + sum(block_output(block, rounded.__getitem__, x) for block in sublayer).view_as(x)
        x = x.bfloat16().float()
        reference = plain_forward(weights, tokens)[0][layer]
        expected.append(float(((x - reference).norm(dim=-1) / reference.norm(dim=-1)).square().mean().sqrt()))
    floor = rounded_to_bf16(arch, model(weights))
    (found,) = compare_all(arch, model(weights), [floor], tokens, in_memory)
    assert [score.hidden_error for score in found.layers] == pytest.approx(expected, rel=2e-3)
    logits = arch.final_hidden(rounded.__getitem__, x) @ rounded[arch.lm_head].T
    nll = -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert float((found.tokens.candidate_nll - nll).abs().mean()) < 1e-3
    assert 0 < float(found.tokens.kld.mean()) < 0.01
