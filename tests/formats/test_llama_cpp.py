"""llama.cpp, run on a GGUF, computes what the checkpoint's own forward pass computes.

The same asserts hold for quantkit's files and for those of an independent writer (tests/oracles/gguf_writer.py), which
prove the harness.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from quantkit import convert
from quantkit.arch import arch_of
from quantkit.arch.base import ExpertBlock, ModelArch
from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.arch.deepseek_v3_gguf import key_values
from quantkit.formats import open_source
from quantkit.plan.recipe import Recipe
from tests.arch.test_deepseek_v3 import CHECKPOINTS, ROOT, SHARED
from tests.oracles import gguf_reader, gguf_writer
from tests.oracles.forward import block_output, logits
from tests.oracles.llama_cpp import CacheType, LlamaError, LlamaModel, render_chat
from tests.tiny_models import YARN, random_weights, tiny_config

TEXTS = {"nano": ROOT / "calibration_data" / "eval", "tiny": SHARED / "models" / "text" / "eval"}
LENGTH = 192
"""Tokens of a row."""
TOLERANCE = 2e-3
"""On a logit, with everything in float32: another order of summation moves far less."""
NEAR_TIE = 1e-5
"""In router scores, which are sums of a sigmoid and a bias: float32 noise may turn such a decision."""

Metadata = dict[str, gguf_writer.Value]
VERSION = "general.quantization_version"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model, its texts (one a domain), some of them as rows (n_rows, LENGTH) int64 with BOS in front, and our
    own forward pass on those: logits (n_rows, LENGTH, vocab) and router margins (n_rows, LENGTH)."""

    folder: Path
    texts: tuple[str, ...]
    config: dict[str, Any]
    weights: dict[str, Tensor]
    rows: Tensor
    logits: Tensor
    margins: Tensor


@pytest.fixture(scope="module", autouse=True)
def _runtime() -> None:
    pytest.importorskip("xllamacpp")


@functools.cache
def read_checkpoint(name: str) -> Checkpoint:
    folder = CHECKPOINTS[name]
    if not folder.exists():
        pytest.skip(f"{name} is not here")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {key: tensor.float() for key, tensor in gguf_writer.read_weights(folder).items()}
    texts = tuple(file.read_text(encoding="utf-8") for file in sorted(TEXTS[name].glob("*.txt")))
    rows = torch.stack([row_of(folder, text) for text in texts[:: 2 if len(texts) > 8 else 1]])
    with torch.inference_mode():
        logits, margins = forward(arch_of(config), weights.__getitem__, rows, config)
    return Checkpoint(folder, texts, config, weights, rows, logits, margins)


@pytest.fixture(scope="module", params=["nano by oracle", "nano", "tiny"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Checkpoint, Path]]:
    """A checkpoint, and a float32 GGUF of it; quantkit's is in splits."""
    name, *by_oracle = request.param.split(" by ")
    checkpoint, folder = read_checkpoint(name), tmp_path_factory.mktemp("gguf")
    if by_oracle:
        gguf_writer.write_f32(checkpoint.folder, folder / "oracle.gguf")
    else:
        outputs = [{"name": "f32", "format": "gguf", "preset": "F32", "split_max_size": "12MB"}]
        convert(checkpoint.folder, recipe_of(outputs), folder / "out", memory_budget=2 * 2**30)
    yield checkpoint, min(folder.rglob("*.gguf"))
    shutil.rmtree(folder)


def recipe_of(outputs: list[dict[str, Any]]) -> Recipe:
    return Recipe.model_validate({"version": 1, "outputs": outputs})


@pytest.fixture(scope="module")
def nano() -> Checkpoint:
    return read_checkpoint("nano")


def row_of(folder: Path, text: str) -> Tensor:
    """BOS and the first tokens of a text (its first characters hold enough), (LENGTH,) int64."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text[: 8 * LENGTH], add_special_tokens=False).ids
    return torch.tensor([0, *ids[: LENGTH - 1]])


# ------------------------------------------------------------------------------------------------- our own side


def forward(
    arch: ModelArch, weights: Callable[[str], Tensor], rows: Tensor, config: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """rows (n_rows, n) -> logits (n_rows, n, vocab), and each token's smallest router margin over the layers."""
    x = weights(arch.embed)[rows]
    margins = torch.full(rows.shape, torch.inf)
    for layer in range(arch.n_layers):
        for sublayer in arch.sublayers(layer):
            for block in sublayer:
                if isinstance(block, ExpertBlock):
                    scores = block.route(weights, block.inputs(weights, x)).scores
                    margins = torch.minimum(margins, router_margin(scores, config).view(rows.shape))
            x = x + sum(block_output(block, weights, x) for block in sublayer).view_as(x)
    return arch.final_hidden(weights, x) @ weights(arch.lm_head).T, margins


def router_margin(scores: Tensor, config: dict[str, Any]) -> Tensor:
    """scores (tokens, experts) -> (tokens,): how far the last group and the last expert that are taken lie above the
    first ones that are not."""
    groups, kept, top_k = (config[key] for key in ("n_group", "topk_group", "num_experts_per_tok"))
    grouped = scores.view(len(scores), groups, -1)
    ranks = grouped.topk(2).values.sum(-1)
    ordered = ranks.sort(descending=True)
    chosen = grouped.gather(1, ordered.indices[:, :kept, None].expand(-1, -1, grouped.shape[-1])).flatten(1)
    experts = chosen.topk(top_k + 1).values
    between_experts = experts[:, top_k - 1] - experts[:, top_k]
    return torch.minimum(ordered.values[:, kept - 1] - ordered.values[:, kept], between_experts)


def log_probs(logits: Tensor, rows: Tensor) -> Tensor:
    """Log-probability of each next token: (n_rows * (n - 1),) float64."""
    return -cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none").double()


# ------------------------------------------------------------------------------------------------ llama.cpp's side


def llama_logits(path: Path, rows: Tensor, cache: CacheType = "f32") -> Tensor:
    """(n_rows, n, vocab) float32, each row in an empty cache."""
    with LlamaModel(path) as model, model.context(rows.shape[1], cache=cache) as context:
        return torch.from_numpy(np.stack([context.logits(row.numpy()) for row in rows]))


def assert_same_logits(found: Tensor, checkpoint: Checkpoint) -> None:
    """Equal within TOLERANCE, but where a router's near tie fell the other way, and after it in the same row."""
    assert found.shape == checkpoint.logits.shape
    assert checkpoint.logits.std() > 0.5
    near = checkpoint.margins < NEAR_TIE
    assert near.float().mean() <= 0.005
    differs = (found - checkpoint.logits).abs().amax(-1) > TOLERANCE
    excused = (differs & near).cumsum(1) > 0
    assert excused.float().mean() <= 0.1
    assert not (differs & ~excused).any()


def assert_close_log_probs(found: Tensor, checkpoint: Checkpoint) -> None:
    """What llama.cpp's default of a float16 cache costs."""
    ours, theirs = log_probs(checkpoint.logits, checkpoint.rows), log_probs(found, checkpoint.rows)
    assert (ours - theirs).abs().mean() <= 0.01
    assert (ours.mean() - theirs.mean()).abs() <= 1e-3


def test_float32_file_gives_our_logits(case: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = case
    assert_same_logits(llama_logits(path, checkpoint.rows), checkpoint)


def test_float16_cache_costs_little(case: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = case
    found = llama_logits(path, checkpoint.rows, "f16")
    assert_close_log_probs(found, checkpoint)
    with pytest.raises(AssertionError):  # the cache really was another one
        assert_same_logits(found, checkpoint)


def test_tokenizer_is_the_checkpoint_s(case: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = case
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    chat = "<｜User｜>How?\n<｜Assistant｜>So.<｜end▁of▁sentence｜>"
    with LlamaModel(path, vocab_only=True) as model:
        for text in (text[:20_000] for text in checkpoint.texts):
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert model.tokenize(text).tolist() == expected
        assert model.tokenize(chat, add_special=True, parse_special=True).tolist() == tokenizer.encode(chat).ids


def test_chat_template_is_rendered(case: tuple[Checkpoint, Path]) -> None:
    _, path = case
    messages = [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "你好?"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": " And now {{ this }}? "},
    ]
    turn = "<｜User｜>你好?<｜Assistant｜>Hello.<｜end▁of▁sentence｜><｜User｜> And now {{ this }}? <｜Assistant｜>"
    assert render_chat(path, messages) == f"<｜begin▁of▁sentence｜>Be brief.\n{turn}"
    with pytest.raises(LlamaError, match="No such file"):  # the server took the log, the harness listens again
        LlamaModel(path.with_name("absent.gguf"))


def test_metadata_is_read(case: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = case
    with LlamaModel(path, vocab_only=True) as model:
        assert model.metadata("general.architecture") == "deepseek2"
        assert model.metadata("deepseek2.rope.scaling.yarn_log_multiplier") == "0.100000"
        assert model.metadata("absent") is None
        assert model.vocab_size == checkpoint.config["vocab_size"]


# ------------------------------------------------------------------------------------------- block types, by preset


QUANTISED = ("Q8_0", "Q4_K_M", "IQ4_XS", "MXFP4_MOE", "Q3_K_M", "IQ3_S", "Q2_K")


@pytest.fixture(scope="module")
def quantised(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano under several presets, data-free: a folder with one for each."""
    out = tmp_path_factory.mktemp("quantised") / "out"
    outputs = [{"name": preset, "format": "gguf", "preset": preset} for preset in QUANTISED]
    convert(nano.folder, recipe_of(outputs), out, memory_budget=2 * 2**30)
    return out


@pytest.mark.parametrize("preset", QUANTISED)
def test_perplexity_of_quantised_files_is_ours(nano: Checkpoint, quantised: Path, preset: str) -> None:
    """llama.cpp rounds what block types are multiplied with to 8 bits, so that its logits are not ours."""
    (path,) = (quantised / preset).glob("*.gguf")
    weights = gguf_reader.read_weights(path)
    rows = nano.rows[::2]
    with torch.inference_mode():
        expected = logits(arch_of(nano.config), weights.__getitem__, rows)
    ours, theirs = (log_probs(found, rows) for found in (expected, llama_logits(path, rows, "f16")))
    assert abs(math.exp(ours.mean() - theirs.mean()) - 1) <= 0.015
    assert (ours - theirs).abs().mean() <= 0.1
    assert (ours - log_probs(nano.logits[::2], rows)).abs().max() > 1e-3  # they are quantised


# ----------------------------------------------------------------------------------- other configs, and MTP


YARN_40 = {"rope_scaling": {**YARN, "factor": 40, "original_max_position_embeddings": 16}}
RUNNABLE: dict[str, dict[str, Any]] = {
    "no q_lora": {"q_lora_rank": None},
    "no yarn": {"rope_scaling": None},
    "yarn x40": YARN_40,
    "one group": {"n_group": 1, "topk_group": 1},
    "every group": {"n_group": 4, "topk_group": 4},
    "two shared experts": {"n_shared_experts": 2},
    "weights not normalised": {"norm_topk_prob": False},
    "wide values": {"v_head_dim": 96, "qk_nope_head_dim": 16},
    "all dense": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("changes", RUNNABLE.values(), ids=RUNNABLE.keys())
def test_our_metadata_of_other_configs_gives_our_logits(changes: dict[str, Any], tmp_path: Path) -> None:
    """quantkit's keys with the oracle's tensors, random weights."""
    config = tiny_config(**changes)
    arch = DeepseekV3(config)
    weights = {name: tensor.float() for name, tensor in random_weights(config, seed=1).items()}
    keys: Metadata = {**key_values(arch.config, mtp=False), "tokenizer.ggml.model": "no_vocab"}
    gguf_writer.write(tmp_path / "a.gguf", keys, gguf_writer.tensors(config, weights))
    rows = torch.randint(0, config["vocab_size"], (1, 150), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = logits(arch, weights.__getitem__, rows)
    assert (llama_logits(tmp_path / "a.gguf", rows) - expected).abs().max() <= 1e-4


def test_mtp_block_is_carried_and_not_run(nano: Checkpoint, tmp_path: Path) -> None:
    outputs = [{"name": "mtp", "format": "gguf", "preset": "F32", "mtp": "keep"}]
    convert(nano.folder, recipe_of(outputs), tmp_path / "out", memory_budget=2 * 2**30)
    (path,) = (tmp_path / "out").rglob("*.gguf")
    with LlamaModel(path, vocab_only=True) as model:
        assert model.metadata("deepseek2.nextn_predict_layers") == "1"
    assert_same_logits(llama_logits(path, nano.rows), nano)


@pytest.mark.parametrize("mtp", [False, True])
def test_our_metadata_is_what_the_independent_writer_writes(nano: Checkpoint, mtp: bool) -> None:
    ours = key_values(DeepseekV3(nano.config).config, mtp=mtp)
    theirs = gguf_writer.metadata(nano.config, mtp=mtp)
    assert ours == {key: value for key, value in theirs.items() if key not in ("general.file_type", VERSION)}


# --------------------------------------------------------------------------- what the asserts above would notice


def write_changed(checkpoint: Checkpoint, path: Path, change: Callable[[Metadata], None]) -> Path:
    """An oracle file without a vocabulary whose metadata went through ``change``."""
    keys: Metadata = {**gguf_writer.metadata(checkpoint.config), "tokenizer.ggml.model": "no_vocab"}
    change(keys)
    gguf_writer.write(path, keys, gguf_writer.tensors(checkpoint.config, checkpoint.weights))
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_group_count", None),
        ("expert_gating_func", None),
        ("expert_weights_norm", None),
        ("expert_weights_scale", 1.0),
        ("rope.scaling.yarn_log_multiplier", 1.0),
        ("attention.layer_norm_rms_epsilon", 1e-3),
    ],
)
def test_wrong_metadata_loads_but_is_noticed(nano: Checkpoint, tmp_path: Path, key: str, value: float | None) -> None:
    def change(keys: Metadata) -> None:
        del keys[f"deepseek2.{key}"]
        if value is not None:
            keys[f"deepseek2.{key}"] = value
        if key == "expert_group_count":
            del keys["deepseek2.expert_group_used_count"]

    few = replace(nano, rows=nano.rows[:2], logits=nano.logits[:2], margins=nano.margins[:2])
    found = llama_logits(write_changed(nano, tmp_path / "changed.gguf", change), few.rows)
    with pytest.raises(AssertionError):
        assert_same_logits(found, few)


def test_refusal_carries_the_message_of_llama_cpp(nano: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match=r"absent\.gguf.*No such file"):
        LlamaModel(tmp_path / "absent.gguf")
    path = write_changed(nano, tmp_path / "a.gguf", lambda keys: keys.pop("deepseek2.attention.q_lora_rank"))
    with pytest.raises(LlamaError, match=r"key not found in model: deepseek2\.attention\.q_lora_rank"):
        LlamaModel(path)


# ------------------------------------------------------------------------------------------------- repacked experts

PACKED = {
    "Q4_0": {"kind": "int", "bits": 4, "group_size": 32},
    "MXFP4": {"kind": "mxfp4"},
}
"""Block type -> the scheme of compressed-tensors with the same numbers."""


@pytest.mark.parametrize("kind", PACKED)
def test_repacked_experts_compute_what_the_packed_ones_do(kind: str, nano: Checkpoint, tmp_path: Path) -> None:
    """llama.cpp rounds the inputs of such experts to 8 bits, which moves logits a little; packing moved them over ten
    times as far. That the weights are the same to the bit is tested with gguf-py."""
    plain = {"match": "role:attention|mlp|shared_expert|lm_head|embed", "keep": "f32"}
    packed = {"match": "role:expert", "scheme": PACKED[kind], "method": {"kind": "rtn"}}
    rules = [{"match": "role:mtp", "drop": True}, packed, plain, {"match": "*", "keep": "source"}]
    outputs = [{"name": "packed", "format": "compressed-tensors", "rules": rules}]
    convert(nano.folder, recipe_of(outputs), tmp_path / "packed", memory_budget=2 * 2**30)
    repack = {"match": "role:expert", "scheme": kind, "method": {"kind": "repack"}}
    outputs = [{"name": "repacked", "format": "gguf", "rules": [repack, {"match": "*", "keep": "source"}]}]
    convert(tmp_path / "packed", recipe_of(outputs), tmp_path / "repacked", memory_budget=2 * 2**30)
    arch = arch_of(nano.config)
    with open_source(tmp_path / "packed") as source, torch.inference_mode():
        ours, _ = forward(arch, lambda name: source.read(name).float(), nano.rows[:4], nano.config)
    with LlamaModel(min((tmp_path / "repacked").rglob("*.gguf"))) as model, model.context(LENGTH) as context:
        theirs = torch.stack([torch.from_numpy(context.logits(row.numpy())) for row in nano.rows[:4]])
    assert kl(ours, theirs) < 1e-3
    assert kl(nano.logits[:4], ours) > 10 * kl(ours, theirs)


def kl(reference: Tensor, candidate: Tensor) -> float:
    """Mean KL divergence of a token in nats."""
    reference, candidate = reference.log_softmax(-1), candidate.log_softmax(-1)
    return float((reference.exp() * (reference - candidate)).sum(-1).mean())
