"""`evaluate` against the file that an earlier run kept of the reference, without the reference itself."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit import convert, evaluate
from quantkit.documents.evaluation import Evaluation
from quantkit.errors import QuantkitError
from quantkit.evaluate.events import EvaluationStarted, LayerPassed
from quantkit.evaluate.reference_file import is_reference_file
from tests.cli.test_cli import quantkit
from tests.evaluate.test_evaluation import BUDGET, NANO, ROOT, W4, outputs

TEXT = (str(ROOT / "calibration_data" / "eval" / "prose.txt"), str(ROOT / "calibration_data" / "eval" / "code.txt"))
CUT: dict[str, Any] = {"text": TEXT, "context": 48, "max_windows_per_file": 4, "protocol": "llama.cpp"}


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """4-bit nano for vLLM and for llama.cpp."""
    root = tmp_path_factory.mktemp("candidates") / "out"
    w4 = {"name": "w4", "format": "compressed-tensors", "rules": [W4, {"match": "*", "keep": "source"}]}
    convert(NANO, outputs(w4, {"name": "q4", "format": "gguf", "preset": "Q4_K_M"}), root, memory_budget=BUDGET)
    return [root / "w4", root / "q4"]


@pytest.fixture(scope="module")
def saved(candidates: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    """The file, and what the same run found of the candidates."""
    file = tmp_path_factory.mktemp("reference") / "nano.reference"
    return file, evaluate(NANO, candidates, save_reference=file, memory_budget=BUDGET, **CUT)


@pytest.fixture(scope="module")
def found(saved: tuple[Path, Evaluation], candidates: list[Path]) -> Evaluation:
    return evaluate(saved[0], candidates, memory_budget=BUDGET)


def test_all_but_kld_and_hidden_errors_is_the_same(saved: tuple[Path, Evaluation], found: Evaluation) -> None:
    exact = saved[1]
    assert (found.reference, found.protocol, found.text) == (exact.reference, exact.protocol, exact.text)
    assert (found.tokens_sha256, found.window_domains) == (exact.tokens_sha256, exact.window_domains)
    assert found.noise_floor == exact.noise_floor
    for ours, theirs in zip(found.candidates, exact.candidates, strict=True):
        assert ours.model == theirs.model
        own, other = ours.result.overall, theirs.result.overall
        for name in ("reference_perplexity", "perplexity", "log_ratio", "rms_probability_change"):
            for part in ("mean", "standard_error"):
                assert getattr(getattr(own, name), part) == pytest.approx(getattr(getattr(other, name), part), rel=1e-6)
        assert own.same_top == other.same_top
        assert 0.99 * other.kld.mean < own.kld.mean < other.kld.mean
        assert list(ours.result.domains) == list(theirs.result.domains)
        for layer, same in zip(ours.result.layers, theirs.result.layers, strict=True):
            assert (layer.router_agreement, layer.expert_tokens) == (same.router_agreement, same.expert_tokens)
            assert math.isnan(layer.hidden_error)
            assert layer.expert_errors is None


def test_the_document_says_what_it_could_not_know(saved: tuple[Path, Evaluation], found: Evaluation) -> None:
    assert saved[1].reference_file is None
    facts = found.reference_file
    assert facts is not None
    assert (facts.path, facts.top, facts.device) == (str(saved[0]), 512, "cpu")
    assert facts.kld.startswith("A lower bound: exact on the reference's 512 most likely tokens")
    assert list(facts.not_available) == ["hidden_error", "expert_errors"]
    assert 0 < facts.mean_rest < 0.1
    document = found.document()
    assert document["candidates"][0]["result"]["layers"][1]["hidden_error"] is None  # pyright: ignore
    assert Evaluation.model_validate_json(found.to_json()).to_json() == found.to_json()


def test_neither_the_reference_nor_its_text_is_touched(
    saved: tuple[Path, Evaluation], found: Evaluation, candidates: list[Path], tmp_path: Path
) -> None:
    """A file that was carried elsewhere, and opened by a process that has seen nothing else."""
    shutil.copy(saved[0], tmp_path / "elsewhere")
    events: list[EvaluationStarted | LayerPassed] = []
    again = evaluate(tmp_path / "elsewhere", candidates[:1], memory_budget=BUDGET, on_event=events.append)
    assert again.candidates[0] == found.candidates[0]
    assert events[0] == EvaluationStarted(1, 8, 8 * 48, 3)


def test_a_reference_alone_and_without_noise_floor(candidates: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "alone"
    alone = evaluate(NANO, save_reference=file, noise_floor=False, memory_budget=BUDGET, **CUT)
    assert (alone.candidates, alone.noise_floor) == ((), None)
    found = evaluate(file, candidates[:1], memory_budget=BUDGET)
    assert found.noise_floor is None
    assert found.reference_file is not None
    assert found.reference_file.not_available["noise_floor"] == "The file was written without it."
    assert is_reference_file(file)
    assert [path.name for path in tmp_path.iterdir()] == ["alone"]


def test_the_same_text_and_protocol_may_be_said_again(
    saved: tuple[Path, Evaluation], found: Evaluation, candidates: list[Path]
) -> None:
    assert evaluate(saved[0], candidates, memory_budget=BUDGET, **CUT) == found
    without = evaluate(saved[0], candidates, memory_budget=BUDGET, noise_floor=False)
    assert without.noise_floor is None


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("was made with --context 48, not --context 64", {"context": 64}),
        ("was made with --protocol llama.cpp, not --protocol windows", {"protocol": "windows"}),
        ("was made with --max-windows-per-file 4, not", {"max_windows_per_file": 3}),
        ("was made of other text: ", {"text": TEXT[:1]}),
        ("was made of other text: ", {"text": TEXT[::-1]}),
        ("is a reference's file already", {"save_reference": "x"}),
    ],
)
def test_what_the_file_is_not_made_of_is_refused(
    message: str, options: dict[str, Any], saved: tuple[Path, Evaluation], candidates: list[Path]
) -> None:
    with pytest.raises(QuantkitError, match=message) as refused:
        evaluate(saved[0], candidates, memory_budget=BUDGET, **options)
    assert "\n" not in str(refused.value)


def test_other_refusals(saved: tuple[Path, Evaluation], candidates: list[Path], tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match="no candidate was given"):
        evaluate(NANO, memory_budget=BUDGET)
    with pytest.raises(QuantkitError, match="is no place for a file"):
        evaluate(NANO, save_reference=tmp_path, memory_budget=BUDGET)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(QuantkitError, match="is not a folder, nor a file that --save-reference wrote"):
        evaluate(tmp_path / "text", candidates, memory_budget=BUDGET)
    (tmp_path / "cut").write_bytes(saved[0].read_bytes()[:100_000])
    with pytest.raises(QuantkitError, match="truncated"):
        evaluate(tmp_path / "cut", candidates, memory_budget=BUDGET)
    with pytest.raises(QuantkitError, match="does not exist"):
        evaluate(saved[0], [tmp_path / "absent"], memory_budget=BUDGET)


def test_the_gate_takes_evaluations_by_file_and_does_not_mix_them(
    saved: tuple[Path, Evaluation], found: Evaluation, tmp_path: Path
) -> None:
    for name, document in (("file", found), ("exact", saved[1])):
        (tmp_path / f"{name}.json").write_text(document.to_json(), encoding="utf-8")
    check = ("check", tmp_path / "file.json", "--baseline", tmp_path / "baseline.json")
    made = quantkit(*check, "--update-baseline")
    assert made.exit_code == 0, made.stderr
    passed = quantkit(*check)
    assert (passed.exit_code, "layers and experts were not compared" in passed.stdout) == (0, True)
    mixed = quantkit("check", tmp_path / "exact.json", *check[2:])
    assert (mixed.exit_code, "share of the reference's logits" in mixed.stderr) == (1, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_scores(candidates: list[Path], found: Evaluation, tmp_path: Path) -> None:
    evaluate(NANO, save_reference=tmp_path / "file", device="cuda", memory_budget=BUDGET, **CUT)
    again = evaluate(tmp_path / "file", candidates, device="cuda", memory_budget=BUDGET)
    for ours, theirs in zip(again.candidates, found.candidates, strict=True):
        assert ours.result.overall.kld.mean == pytest.approx(theirs.result.overall.kld.mean, rel=5e-3)
        assert ours.result.overall.perplexity.mean == pytest.approx(theirs.result.overall.perplexity.mean, rel=1e-3)
