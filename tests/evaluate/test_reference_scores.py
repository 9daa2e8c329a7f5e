"""A reference's file holds what whole logits say, and gives the scores that whole logits give, KLD with one bucket for
all but the top tokens."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.documents.evaluation import CheckpointFacts, EvaluationText, ScoringProtocol
from quantkit.documents.reference import ReferenceRecord
from quantkit.errors import OutputError, SourceError
from quantkit.evaluate import reference_scores
from quantkit.evaluate.compare import Comparison, compare_all
from quantkit.evaluate.reference_file import ReferenceStatistics, ReferenceWriter, is_reference_file
from quantkit.evaluate.reference_scores import FileRecorder, compare_recorded
from quantkit.formats.casting import bytes_of
from tests.evaluate.test_compare import CONFIG, damaged, in_memory, model, plain_forward, tokens, weights

__all__ = ["damaged", "tokens", "weights"]  # fixtures

ARCH = arch_of(CONFIG)
FIRST, TOP = 3, 40
VOCAB = CONFIG["vocab_size"]


def record_of(tokens: Tensor, top: int = TOP) -> ReferenceRecord:
    n_windows, context = tokens.shape
    facts = CheckpointFacts(name="m", path="m", format="F32", fingerprint="f", weights=1, nbytes=4, notes=())
    protocol = ScoringProtocol(
        name="windows",
        description="",
        context=context,
        max_windows_per_file=None,
        scored_per_window=context - 1 - FIRST,
    )
    return ReferenceRecord(
        versions={},
        device="cpu",
        arithmetic="float32",
        reference=facts,
        config=CONFIG,
        tokenizer_sha256=None,
        protocol=protocol,
        text=(EvaluationText(file="t", sha256="s", documents=1, tokens=99, windows=n_windows),),
        window_domains=("t",) * n_windows,
        tokens_sha256=hashlib.sha256(bytes_of(tokens.int())).hexdigest(),
        top=top,
        vocab_size=VOCAB,
    )


def saved(path: Path, reference: Mapping[str, Tensor], tokens: Tensor, top: int = TOP) -> Path:
    with ReferenceWriter(path, record_of(tokens, top), tokens, ARCH.n_layers) as writer:
        compare_all(ARCH, model(reference), (), tokens, in_memory, first_scored=FIRST, recorder=FileRecorder(writer))
        writer.finish(None)
    return path


@pytest.fixture(scope="module")
def file(weights: dict[str, Tensor], tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("reference") / "m.reference", weights, tokens)


def by_file(path: Path, candidate: Mapping[str, Tensor]) -> Comparison:
    with ReferenceStatistics(path) as reference:
        (found,) = compare_recorded(ARCH, reference, [model(candidate)], in_memory)
    return found


def logits_of(weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """(windows, scored, vocab) float64."""
    states, _ = plain_forward(weights, tokens)
    x = ARCH.final_hidden(weights.__getitem__, states[-1][:, FIRST:-1].reshape(-1, ARCH.hidden_size))
    return (x @ weights[ARCH.lm_head].T).double().view(len(tokens), -1, VOCAB)


def test_the_file_holds_what_whole_logits_say(file: Path, weights: dict[str, Tensor], tokens: Tensor) -> None:
    logits = logits_of(weights, tokens)
    with ReferenceStatistics(file) as reference:
        assert torch.equal(reference.tokens, tokens)
        found = reference.positions(0, logits.shape[0] * logits.shape[1])
        part = reference.positions(7, 20)
        mean_rest = reference.mean_rest()
        chosen = [
            reference.routings(layer, [CONFIG["n_routed_experts"]] * bool(layer)) for layer in range(ARCH.n_layers)
        ]
    flat = logits.flatten(0, 1)
    best, place = flat.topk(TOP)
    assert torch.allclose(found.top_logits.double(), best, atol=1e-5)
    assert float((found.top_tokens == place).double().mean()) > 0.99  # neighbours may be as good
    assert torch.allclose(flat.gather(1, found.top_tokens), best, atol=1e-5)
    assert torch.allclose(found.log_sum, flat.logsumexp(-1), atol=1e-5)
    rest = flat.softmax(-1).scatter(1, place, 0).sum(-1)
    assert torch.allclose(found.rest, rest, rtol=1e-4)
    assert 0.01 < float(rest.mean()) < 0.99
    assert mean_rest == pytest.approx(float(rest.mean()), rel=1e-4)
    nll = -flat.log_softmax(-1).gather(1, tokens[:, FIRST + 1 :].reshape(-1, 1)).squeeze(-1)
    assert torch.allclose(found.target_nll, nll, atol=1e-5)
    assert torch.equal(found.first_token, place[:, 0])
    assert torch.equal(part.top_tokens, found.top_tokens[7:20])
    assert torch.equal(part.rest, found.rest[7:20])
    _, routed = plain_forward(weights, tokens)
    for own, expected in zip(chosen, routed, strict=True):
        assert (own == []) if expected is None else torch.equal(own[0].sort().values, expected.sort().values)


@pytest.mark.parametrize("small", [False, True])
def test_scores_are_those_of_whole_logits(
    small: bool,
    weights: dict[str, Tensor],
    damaged: dict[str, Tensor],
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However positions and vocabulary are cut."""
    if small:
        monkeypatch.setattr(reference_scores, "SCORED_GROUP", 25)
        monkeypatch.setattr(reference_scores, "POSITIONS", 7)
        monkeypatch.setattr(reference_scores, "VOCAB_BLOCK", 100)
    found = by_file(saved(tmp_path / "file", weights, tokens), damaged)
    (true,) = compare_all(ARCH, model(weights), [model(damaged)], tokens, in_memory, first_scored=FIRST)
    p, q = (logits_of(w, tokens).log_softmax(-1) for w in (weights, damaged))
    place = p.topk(TOP).indices
    p, q = p.exp(), q.exp()
    tops = [probabilities.gather(-1, place) for probabilities in (p, q)]
    events = [torch.cat((top, 1 - top.sum(-1, keepdim=True)), -1) for top in tops]
    expected = (events[0] * (events[0] / events[1]).log()).sum(-1)
    assert torch.allclose(found.tokens.kld, expected, rtol=1e-3, atol=1e-7)
    assert bool((found.tokens.kld <= true.tokens.kld + 1e-6).all())
    assert 0.3 < float(found.tokens.kld.mean() / true.tokens.kld.mean()) < 0.999
    assert torch.allclose(found.tokens.reference_nll, true.tokens.reference_nll, atol=1e-5)
    assert torch.allclose(found.tokens.candidate_nll, true.tokens.candidate_nll, atol=1e-5)
    assert torch.equal(found.tokens.same_top, true.tokens.same_top)
    for ours, theirs in zip(found.layers, true.layers, strict=True):
        assert (ours.router_agreement, ours.expert_tokens) == (theirs.router_agreement, theirs.expert_tokens)
        assert math.isnan(ours.hidden_error)
        assert (ours.window_errors, ours.expert_errors) == ((), None)


def test_with_all_tokens_on_top_nothing_is_lost(
    weights: dict[str, Tensor], damaged: dict[str, Tensor], tokens: Tensor, tmp_path: Path
) -> None:
    found = by_file(saved(tmp_path / "file", weights, tokens, VOCAB), damaged)
    (true,) = compare_all(ARCH, model(weights), [model(damaged)], tokens, in_memory, first_scored=FIRST)
    assert torch.allclose(found.tokens.kld, true.tokens.kld, rtol=1e-3, atol=1e-6)


def test_against_itself_nothing_is_lost(file: Path, weights: dict[str, Tensor]) -> None:
    found = by_file(file, weights)
    assert float(found.tokens.kld.max()) < 1e-6
    assert bool(found.tokens.same_top.all())


# ----------------------------------------------------------------------------------------------------------- the file


def test_the_header_says_what_it_is(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["kind"] == "quantkit reference statistics"
        assert opened.metadata()["reference"] == "f"
        assert "routing.1.0" in opened.keys()  # noqa: SIM118 (not a dict)
    assert is_reference_file(file)
    assert not is_reference_file(file.parent)


def test_nothing_is_left_of_a_run_that_failed(tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ReferenceWriter(tmp_path / "a", record_of(tokens), tokens, 3):
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())  # it was not finished

    def full(*words: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="the disk is full"):
        ReferenceWriter(tmp_path / "a", record_of(tokens), tokens, 3)
    assert not list(tmp_path.iterdir())


Change = Callable[[dict[str, Tensor]], Any]


def record(**changes: Any) -> Change:
    def change(stored: dict[str, Tensor]) -> None:
        fields = {**json.loads(bytes(stored["record"].tolist())), **changes}
        stored["record"] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("is no file of quantkit reference statistics", lambda t: t.pop("record")),
        ("its record is not readable", lambda t: t.update(record=t["record"][5:])),
        (r"its record is not readable \(version", record(version=2)),
        (r"its record is not readable \(extra", record(extra=1)),
        ("its record contradicts itself", record(top=0)),
        (r"top_logits is F32 \[5, 12, 40\], F32 \[5, 12, 41\] was needed", record(top=41)),
        ("its record names other windows", record(window_domains=["t"])),
        ("log_sum is missing", lambda t: t.pop("log_sum")),
        (r"rest is F32", lambda t: t.update(rest=t["rest"].float())),
        ("its tokens are not those it was made of", lambda t: t["tokens"][0].add_(1)),
        ("a logit or a loss is not finite", lambda t: t["top_logits"][1].fill_(torch.nan)),
        ("a token is outside of the vocabulary", lambda t: t["top_tokens"][1].add_(VOCAB)),
        ("a token is outside of the vocabulary", lambda t: t["first_token"].sub_(VOCAB)),
        (r"routing.1.0 is not a choice of .* experts for", lambda t: t.update({"routing.1.0": t["routing.1.0"][1:]})),
        (r"routing.1.0 is not a choice", lambda t: t.update({"routing.1.0": t["routing.1.0"][:, :0]})),
        (r"routing.1.0 is not a choice", lambda t: t.update({"routing.1.0": t["routing.1.0"].long() + 2**40})),
        (r"routing.1.0 is not a choice", lambda t: t["routing.1.0"].add_(CONFIG["n_routed_experts"])),
        (r"routing.1.0 is not a choice", lambda t: t.pop("routing.1.0")),
    ],
)
def test_damaged_files_are_refused_in_one_line(
    message: str, change: Change, file: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    with safe_open(file, "pt") as opened:
        stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    change(stored)
    save_file(stored, tmp_path / "file", {"kind": "quantkit reference statistics"})
    with pytest.raises(SourceError, match=message) as refused:
        by_file(tmp_path / "file", weights)
    assert "\n" not in str(refused.value)
