"""Drafts of the MTP layer against transformers' model and `MtpLayer`, from tokens to choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit import evaluate
from quantkit.arch import arch_of
from quantkit.calibrate.dataset import eval_windows
from quantkit.calibrate.hidden_states import MemoryRows
from quantkit.documents.evaluation import Evaluation
from quantkit.evaluate import drafts as drafts_module
from quantkit.evaluate.compare import Model, compare_all
from quantkit.evaluate.drafts import Draft
from quantkit.text.evaluation import evaluation_text
from tests.arch.test_forward import mtp_state, read_decoded, reference_model
from tests.convert.jobs import int4, recipe_of, run, write_model, write_text
from tests.tiny_models import write_shards

transformers = pytest.importorskip("transformers")
NANO = Path(__file__).parents[2] / "examples" / "nano-deepseek-v3"
MTP = 3
"""nano's layer."""


@pytest.fixture(scope="module")
def nano() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return read_decoded(NANO)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    windows = eval_windows(["builtin:eval"], 64, NANO, NANO, 1)
    return torch.from_numpy(windows.tokens).long()


def model_of(weights: dict[str, Tensor]) -> Model:
    embed, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]

    def embed_rows(ids: Tensor) -> Tensor:
        return embed[ids].float()

    def head_rows(start: int, stop: int) -> Tensor:
        return head[start:stop].float()

    draft = Draft(MTP, embed_rows, head_rows)
    return Model(lambda name: weights[name].float(), embed_rows, head_rows, draft=draft)


def transformers_choices(
    config: dict[str, Any], weights: dict[str, Tensor], tokens: Tensor, folder: Path
) -> tuple[Tensor, Tensor]:
    """The most likely token of the model at each position (rows, length), and of its MTP layer at all but the last."""
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    write_shards(folder, weights, 1)
    (folder / "config.json").write_text((NANO / "config.json").read_text().replace('"quantization_config"', '"unused"'))
    model = reference_model(folder)
    layer = MtpLayer(model.config, deepseek.DeepseekV3DecoderLayer, deepseek.DeepseekV3RMSNorm, MTP).eval()
    state = mtp_state(weights, f"model.layers.{MTP}.", config["n_routed_experts"])
    layer.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    with torch.inference_mode():
        output = model(tokens, output_hidden_states=True)
        hidden, embedded = output.hidden_states[-1][:, :-1], model.get_input_embeddings()(tokens[:, 1:])
        positions = torch.arange(hidden.shape[1])[None]
        mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        rotation = model.model.rotary_emb(hidden, positions)
        drafted = model.lm_head(layer(embedded, hidden, rotation, mask, positions, None))
    return output.logits.argmax(-1), drafted.argmax(-1)


@pytest.mark.parametrize("first", [0, 20])
def test_drafts_equal_transformers(
    first: int,
    nano: tuple[dict[str, Any], dict[str, Tensor]],
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model's choice one position later, for each scored position; the vocabulary in uneven blocks."""
    config, weights = nano
    monkeypatch.setattr(drafts_module, "VOCAB_BLOCK", 500)
    monkeypatch.setattr(drafts_module, "POSITIONS", 50)
    chosen, drafted = transformers_choices(config, weights, tokens, tmp_path)
    expected = drafted[:, first:] == chosen[:, first + 1 :]
    models = model_of(weights), model_of(weights)
    (found,) = compare_all(arch_of(config), models[0], models[1:], tokens, MemoryRows, first_scored=first)
    assert found.drafts is not None
    assert found.drafts.reference is not None
    assert torch.equal(found.drafts.candidate, expected)
    assert torch.equal(found.drafts.reference, expected)
    assert found.drafts.candidate.shape == found.tokens.kld.shape
    assert 0.4 < expected.double().mean() < 0.95  # a trained layer


def test_a_candidate_without_an_mtp_layer_has_no_drafts(
    nano: tuple[dict[str, Any], dict[str, Tensor]], tokens: Tensor
) -> None:
    config, weights = nano
    whole = model_of(weights)
    asked: list[str] = []

    def watched(name: str) -> Tensor:
        asked.append(name)
        return weights[name].float()

    candidates = [replace(whole, draft=None)]
    (found,) = compare_all(arch_of(config), replace(whole, weights=watched), candidates, tokens[:2], MemoryRows)
    assert found.drafts is None
    assert not [name for name in asked if f".layers.{MTP}." in name]  # nor is the reference's computed


DROP = {"match": "role:mtp", "drop": True}


def test_documents_and_texts_say_what_drafts_are_worth(tmp_path: Path) -> None:
    """Of a reference in a file nothing is known; of a dropped layer there is nothing to say."""
    write_text(tmp_path / "calibration.txt")
    write_text(tmp_path / "eval.txt", 200)
    write_model(tmp_path / "model")
    reports = {
        name: run(tmp_path / "model", recipe_of(*rules, tokens=None, validated=True), tmp_path / name)
        for name, rules in (("kept", (int4(kind="rtn"),)), ("dropped", (DROP, int4(kind="rtn"))))
    }
    score = _evaluator(tmp_path)
    found = score(tmp_path / "model", save_reference=tmp_path / "reference")
    kept, dropped = (candidate.result.draft for candidate in found.candidates)
    assert dropped is None
    assert kept is not None
    assert kept.reference is not None
    assert found.noise_floor is not None
    assert found.noise_floor.result.draft is not None
    assert "MTP draft agreement" in evaluation_text(found)
    recorded = score(tmp_path / "reference").candidates[0].result.draft
    assert recorded is not None
    assert (recorded.reference, recorded.candidate) == (None, kept.candidate)
    validated = reports["kept"].outputs[0].validation
    assert validated is not None
    assert validated.scores.draft is not None
    assert validated.scores.draft.reference is not None
    without = reports["dropped"].outputs[0].validation
    assert without is not None
    assert without.scores.draft is None
    assert Evaluation.model_validate_json(found.to_json()) == found


def _evaluator(folder: Path) -> Callable[..., Evaluation]:
    candidates = [folder / "kept", folder / "dropped"]

    def score(reference: Path, **options: Any) -> Evaluation:
        return evaluate(reference, candidates, context=32, text=[str(folder / "eval.txt")], **options)

    return score
