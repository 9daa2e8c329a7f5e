"""`evaluate`: files of every format on nano against transformers' full model and llama.cpp's logits; protocols,
refusals, memory."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit import convert, evaluate
from quantkit.arch import arch_of
from quantkit.arch.parts import in_parts
from quantkit.calibrate.dataset import eval_windows
from quantkit.documents.evaluation import Evaluation, Scores
from quantkit.errors import QuantkitError
from quantkit.evaluate import stream as evaluation_stream
from quantkit.evaluate.events import EvaluationStarted, LayerPassed, ignore
from quantkit.evaluate.prepare import Asked, prepared
from quantkit.evaluate.run import evaluate as evaluate_prepared
from quantkit.evaluate.statistics import scores_of
from quantkit.formats.gguf.source import GgufSource
from quantkit.plan.machine import Machine, Stores
from quantkit.plan.recipe import Recipe
from quantkit.tensors import Role
from tests.convert.jobs import decoded, write_model, write_text
from tests.evaluate.test_compare import expected_scores, transformers_logits
from tests.oracles import gguf_reader, gguf_writer
from tests.oracles.llama_cpp import LlamaModel
from tests.tiny_models import FP8_BLOCK, encode_fp8_blocks, write_shards

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "examples" / "nano-deepseek-v3"
SHARED = Path(os.environ.get("QUANTKIT_SHARED", ROOT.parent / "shared")) / "models"
TEXT = ("builtin:eval",)
CONTEXT = 96
BUDGET = 2 * 2**30
LINEARS = "role:attention|mlp|shared_expert|expert"
W4 = {"match": LINEARS, "scheme": {"kind": "int", "bits": 4, "group_size": 128}, "method": {"kind": "rtn"}}


def outputs(*listed: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"version": 1, "outputs": list(listed)})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano as w4, q4 and f32 by quantkit, and with noise on its linears as bf16 and fp8."""
    root = tmp_path_factory.mktemp("candidates")
    w4 = {"name": "w4", "format": "compressed-tensors", "rules": [W4, {"match": "*", "keep": "source"}]}
    q4 = {"name": "q4", "format": "gguf", "preset": "Q4_K_M"}
    f32 = {"name": "f32", "format": "gguf", "preset": "F32", "split_max_size": "12MB"}
    convert(NANO, outputs(w4, q4, f32), root / "out", memory_budget=BUDGET)
    noisy = noisy_weights(gguf_writer.read_weights(NANO))
    config = json.loads((NANO / "config.json").read_text(encoding="utf-8"))
    quantized = config.pop("quantization_config")
    write_shards(root / "bf16", noisy)
    (root / "bf16" / "config.json").write_text(json.dumps(config))
    stored = dict(noisy)
    for name in [name for name in noisy if "_proj" in name and "eh_proj" not in name]:
        stored[name], stored[f"{name}_scale_inv"] = encode_fp8_blocks(noisy[name].float())
    assert quantized["weight_block_size"] == [FP8_BLOCK, FP8_BLOCK]
    write_shards(root / "fp8", stored)
    (root / "fp8" / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    return root


def noisy_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    return {
        name: (w + 0.05 * w.float().std() * torch.randn(w.shape, generator=random)).to(w.dtype)
        if "_proj" in name
        else w
        for name, w in weights.items()
    }


@pytest.fixture(scope="module")
def candidates(files: Path) -> dict[str, Path]:
    return {"bf16": files / "bf16", "fp8": files / "fp8", "w4": files / "out" / "w4", "q4": files / "out" / "q4"}


@pytest.fixture(scope="module")
def found(candidates: dict[str, Path]) -> Evaluation:
    return run(*candidates.values())


def run(*candidates: Path, reference: Path = NANO, **options: Any) -> Evaluation:
    chosen: dict[str, Any] = {"text": TEXT, "context": CONTEXT, "max_windows_per_file": 1, **options}
    return evaluate(reference, candidates, memory_budget=BUDGET, **chosen)


def weights_of(path: Path) -> dict[str, Tensor]:
    """Decoded by the oracles; compressed-tensors by quantkit's reader, which has its own tests."""
    if (path / "quantkit.json").exists():
        return {name: w.float() for name, w in decoded(path).items()}
    return {name: w.float() for name, w in gguf_writer.read_weights(path).items()}


def windows_of(**options: Any) -> tuple[Tensor, tuple[str, ...]]:
    rows = eval_windows(TEXT, options.pop("context", CONTEXT), NANO, Path(), 1, **options)
    return torch.from_numpy(rows.tokens).long(), rows.domains


def assert_same_scores(found: Scores, expected: Scores, rtol: float = 1e-4) -> None:
    for value, other in (
        (found.reference_perplexity.mean, expected.reference_perplexity.mean),
        (found.perplexity.mean, expected.perplexity.mean),
        (found.kld.mean, expected.kld.mean),
        (found.kld.standard_error, expected.kld.standard_error),
        (found.log_ratio.standard_error, expected.log_ratio.standard_error),
        (found.rms_probability_change.mean, expected.rms_probability_change.mean),
    ):
        assert value == pytest.approx(other, rel=rtol)
    assert found.same_top.mean == pytest.approx(expected.same_top.mean, abs=1.5 / found.tokens)


# -------------------------------------------------------------------------------------------------- scores by oracles


@pytest.fixture(scope="module")
def reference_logits() -> Tensor:
    return transformers_logits(config_of(NANO), weights_of(NANO), windows_of()[0])


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def named(found: Evaluation, name: str) -> Any:
    return next(candidate for candidate in found.candidates if candidate.model.name == name)


@pytest.mark.parametrize("name", ["bf16", "fp8", "w4"])
def test_folders_equal_transformers(
    name: str, found: Evaluation, candidates: dict[str, Path], reference_logits: Tensor
) -> None:
    tokens, domains = windows_of()
    logits = transformers_logits(config_of(NANO), weights_of(candidates[name]), tokens)
    expected = expected_scores(reference_logits, logits, tokens)
    result = named(found, name).result
    assert expected.kld.mean() > 1e-3
    assert_same_scores(result.overall, scores_of(expected))
    assert list(result.domains) == list(dict.fromkeys(domains))
    for row, domain in enumerate(domains):  # one window of each file
        assert result.domains[domain].kld.mean == pytest.approx(float(expected.kld[row].mean()), rel=1e-3)
        assert math.isnan(result.domains[domain].kld.standard_error)


@pytest.fixture(scope="module")
def llama_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp")
    path = tmp_path_factory.mktemp("llama") / "reference.gguf"
    gguf_writer.write_f32(NANO, path)
    return path


def llama_logits(path: Path, tokens: Tensor) -> Tensor:
    with LlamaModel(path) as model, model.context(tokens.shape[1]) as context:
        return torch.from_numpy(np.stack([context.logits(row.numpy()) for row in tokens]))


def test_gguf_equals_llama_cpp(
    found: Evaluation, candidates: dict[str, Path], llama_reference: Path, tmp_path: Path
) -> None:
    """Decoded by gguf-py into a float32 file: of block types llama.cpp would round what they are multiplied with."""
    (q4,) = candidates["q4"].glob("*.gguf")
    config, tokens = config_of(NANO), windows_of()[0]
    decoded_q4 = tmp_path / "decoded.gguf"
    keys = {**gguf_writer.metadata(config), "tokenizer.ggml.model": "no_vocab"}
    gguf_writer.write(decoded_q4, keys, gguf_writer.tensors(config, gguf_reader.read_weights(q4)))
    expected = expected_scores(llama_logits(llama_reference, tokens), llama_logits(decoded_q4, tokens), tokens)
    assert_same_scores(named(found, "q4").result.overall, scores_of(expected))


@pytest.mark.parametrize("context", [96, 33])
def test_protocol_of_llama_cpp(context: int, files: Path, llama_reference: Path) -> None:
    """The whole protocol written out: llama.cpp's own tokens of a text with BOS, chunks, BOS in front of each, the
    logits of the second half."""
    text = ROOT / "calibration_data" / "eval" / "prose.txt"
    first, n_chunks = context // 2, 3
    with LlamaModel(llama_reference) as model, model.context(context) as llama:
        ids = model.tokenize(text.read_text(encoding="utf-8"), add_special=True)
        chosen = np.unique(np.linspace(0, len(ids) // context - 1, n_chunks).astype(int))
        losses: list[float] = []
        for chunk in chosen:
            window = ids[chunk * context : (chunk + 1) * context].copy()
            window[0] = 0
            log_probs = torch.from_numpy(llama.logits(window)).double().log_softmax(-1)
            losses += [-float(log_probs[i, window[i + 1]]) for i in range(first, context - 1)]
    found = run(
        files / "out" / "f32",
        text=(str(text),), context=context, max_windows_per_file=n_chunks, protocol="llama.cpp", noise_floor=False,
    )  # fmt: skip
    scores = found.candidates[0].result.overall
    assert scores.tokens == len(losses) == n_chunks * found.protocol.scored_per_window
    for perplexity in (scores.perplexity.mean, scores.reference_perplexity.mean):
        assert perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.skipif(not (SHARED / "tiny-deepseek-v3").exists(), reason="the trained model is not here")
def test_the_larger_trained_model_equals_transformers() -> None:
    reference, candidate = SHARED / "tiny-deepseek-v3", SHARED / "tiny-deepseek-v3-fp8"
    text = (str(ROOT / "calibration_data" / "eval" / "prose.txt"),)
    found = run(candidate, reference=reference, text=text, max_windows_per_file=2, noise_floor=False)
    tokens = torch.from_numpy(eval_windows(text, CONTEXT, reference, Path(), 2).tokens).long()
    both = [transformers_logits(config_of(reference), weights_of(path), tokens) for path in (reference, candidate)]
    assert_same_scores(found.candidates[0].result.overall, scores_of(expected_scores(*both, tokens)))


# ------------------------------------------------------------------------------------------------------- the document


def test_document(found: Evaluation, candidates: dict[str, Path]) -> None:
    assert [candidate.model.name for candidate in found.candidates] == list(candidates)
    assert [candidate.model.format for candidate in found.candidates] == [
        "BF16", "FP8 blocks", "compressed-tensors", "GGUF",
    ]  # fmt: skip
    assert len({model.fingerprint for model in (found.reference, *(c.model for c in found.candidates))}) == 5
    assert [text.windows for text in found.text] == [1] * 8
    assert found.text[0].file == "builtin:eval/arithmetic.txt"
    bpw = [candidate.model.bpw for candidate in found.candidates]
    assert bpw[0] > 16 > bpw[1] > bpw[2] > bpw[3] > 4.5  # the bias is F32; MTP stays FP8 in w4
    floor = found.noise_floor
    assert floor is not None
    assert 0 < floor.result.overall.kld.mean < 1e-3 < min(c.result.overall.kld.mean for c in found.candidates)
    assert [layer.router_agreement is None for layer in floor.result.layers] == [True, False, False]
    assert Evaluation.model_validate_json(found.to_json()).to_json() == found.to_json()


def test_same_job_same_bytes_on_disk_or_in_memory(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states in files give the same document; nothing of the run is in it, but times if they are asked for."""
    first = run(files / "out" / "w4", context=16)
    monkeypatch.setattr(evaluation_stream, "Stores", lambda folder, budget: Stores(folder, 0))
    timed = run(files / "out" / "w4", context=16, times=True)
    assert list(timed.seconds or {}) == ["open", "stream"]
    assert timed.model_copy(update={"seconds": None}).to_json() == first.to_json()


def test_a_model_against_itself_is_nothing(files: Path) -> None:
    """FP8, and its decoded weights in a split GGUF: the same numbers."""
    found = run(NANO, files / "out" / "f32", context=32, noise_floor=False)
    for candidate in found.candidates:
        scores = candidate.result.overall
        assert (scores.log_ratio.mean, scores.same_top.mean, scores.rms_probability_change.mean) == (0, 1, 0)
        assert scores.kld.max < 1e-6
        assert all(layer.hidden_error == 0 for layer in candidate.result.layers)
    assert found.noise_floor is None


def test_rows_of_gguf_tensors_are_decoded_together(files: Path) -> None:
    arch = arch_of(config_of(NANO))
    (path,) = (files / "out" / "q4").glob("*.gguf")
    names = {spec.name: arch.gguf().stored_name(spec.name) for spec in in_parts(arch) if spec.role is not Role.MTP}
    expert, whole = "model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.self_attn.kv_b_proj.weight"
    with GgufSource(path, names, tuple(arch.parts().values())) as source:
        for name in (arch.embed, expert, whole):
            rows = [7, 0, 7, 5]
            assert torch.equal(source.read_rows(name, rows), source.read(name)[rows])
            assert source.read_rows(name, []).shape == (0, *source.infos()[name].shape[1:])


def test_events(files: Path) -> None:
    events: list[EvaluationStarted | LayerPassed] = []
    run(files / "bf16", context=16, noise_floor=False, on_event=events.append)
    assert events == [EvaluationStarted(1, 8, 8 * 16, 3), *(LayerPassed(layer, 3) for layer in (1, 2, 3))]


# ----------------------------------------------------------------------------------------------------------- refusals


def refusal(*candidates: Path, **options: Any) -> str:
    with pytest.raises(QuantkitError) as caught:
        run(*candidates, **options)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, with a text."""
    folder = tmp_path_factory.mktemp("small")
    write_model(folder / "model")
    write_text(folder / "eval.txt")
    return folder


def changed_config(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    (target / "config.json").write_text(json.dumps({**config_of(source), **changes}))
    return target


def test_what_is_no_checkpoint_is_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    assert "holds neither safetensors nor GGUF" in refusal(tmp_path / "empty")
    assert "is no GGUF file" in refusal(tmp_path / "notes.txt")
    assert "is a folder of 3 outputs" in refusal(files / "out")
    assert "does not exist" in refusal(tmp_path / "absent")
    assert "is not a folder" in refusal(files / "bf16", reference=tmp_path / "notes.txt")
    assert "holds GGUF files; the reference is a folder" in refusal(files / "bf16", reference=files / "out" / "q4")
    hqq = changed_config(files / "bf16", tmp_path / "hqq", quantization_config={"quant_method": "hqq"})
    assert "is quantised as 'hqq'" in refusal(hqq)
    awq = changed_config(files / "bf16", tmp_path / "awq", quantization_config={"quant_method": "awq"})
    assert "says 'awq', but no tensor is named *.qweight" in refusal(awq)


def test_another_model_is_refused(files: Path, small: Path, tmp_path: Path) -> None:
    assert "has n_layers 2, the reference has 3" in refusal(small / "model")
    other = changed_config(files / "bf16", tmp_path / "other", architectures=["LlamaForCausalLM"])
    assert str(other) in refusal(other)
    fewer = changed_config(files / "bf16", tmp_path / "fewer", vocab_size=1024)
    assert "has vocab_size 1,024, the reference has 1,280" in refusal(fewer)
    weights = gguf_writer.read_weights(files / "bf16")
    del weights["model.layers.2.mlp.experts.11.down_proj.weight"]
    shutil.copytree(files / "bf16", tmp_path / "part")
    for path in (tmp_path / "part").glob("*.safetensors*"):
        path.unlink()
    write_shards(tmp_path / "part", weights)
    assert "lacks the tensor model.layers.2.mlp.experts.11.down_proj.weight" in refusal(tmp_path / "part")


def test_gguf_of_another_model_is_refused(small: Path, tmp_path: Path) -> None:
    config = config_of(small / "model")
    weights = gguf_writer.read_weights(small / "model")
    options: dict[str, Any] = {"reference": small / "model", "text": (str(small / "eval.txt"),), "noise_floor": False}

    def write(name: str, left_out: str = "-", **changes: Any) -> Path:
        keys = {**gguf_writer.metadata(config), "tokenizer.ggml.model": "no_vocab"}
        keys.update({f"deepseek2.{key}": value for key, value in changes.items()})
        keys = {key: value for key, value in keys.items() if value is not None}
        tensors = gguf_writer.tensors(config, weights)
        gguf_writer.write(tmp_path / name, keys, ((n, t) for n, t in tensors if left_out not in n))
        return tmp_path / name

    assert "deepseek2.expert_weights_scale is 1.0, config.json needs 2.5" in refusal(
        write("a.gguf", expert_weights_scale=1.0), **options
    )
    assert "lacks the tensor blk.1.attn_v_b.weight" in refusal(write("b.gguf", "blk.1.attn_v_b"), **options)
    assert "deepseek2.block_count is 9, config.json needs 2" in refusal(write("c.gguf", block_count=9), **options)


def test_another_tokenizer_is_noted(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "bf16", tmp_path / "bf16")
    (tmp_path / "bf16" / "tokenizer.json").write_text("{}")
    (note,) = run(tmp_path / "bf16", context=16, noise_floor=False).candidates[0].model.notes
    assert "tokenizer.json differs" in note


def test_a_budget_that_is_too_small_and_a_context_without_a_half_are_refused(files: Path) -> None:
    with (
        prepared(NANO, [files / "bf16"], Asked(context=CONTEXT), None) as opened,
        pytest.raises(QuantkitError, match="this evaluation needs at least"),
    ):
        evaluate_prepared(opened, Machine.of("cpu", 2**20), ignore, noise_floor=True, times=False)
    assert "leaves nothing to score" in refusal(files / "bf16", context=2, protocol="llama.cpp")


def test_words_that_are_no_options_are_refused(files: Path) -> None:
    assert "protocol is 'vllm', windows or llama.cpp was needed" in refusal(files / "bf16", protocol="vllm")
    with pytest.raises(QuantkitError, match="device 'tpu': auto, cpu or cuda was needed"):
        evaluate(NANO, [files / "bf16"], device="tpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_scores(found: Evaluation, candidates: dict[str, Path]) -> None:
    """Float32 sums in another order may turn a router's near tie, so not to the last digit."""
    for ours, theirs in zip(run(*candidates.values(), device="cuda").candidates, found.candidates, strict=True):
        assert_same_scores(ours.result.overall, theirs.result.overall, rtol=5e-3)
